"""Exported networks: files for other runtimes, tested and timed in these runtimes."""
