"""Where the pieces of a study run: copies of the project, keys, executors, experiments."""
