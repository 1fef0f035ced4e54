"""Execution of a study's pieces of work: copies of the project, keys, executors, experiments."""
