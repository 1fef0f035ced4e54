"""Exported networks: files that other runtimes read, run and timed where they will be used."""
