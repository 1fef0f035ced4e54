"""The page of a comparison: tables, statistics, plots, and what experiments have left."""
