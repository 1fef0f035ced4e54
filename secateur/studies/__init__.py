"""Studies: many runs planned as one graph, run by an executor, and reported on one page."""
