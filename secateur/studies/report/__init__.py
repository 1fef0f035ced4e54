"""The page of a comparison: tables, statistics, plots, and artifacts of experiments."""
