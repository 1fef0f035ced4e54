"""Prune image classifiers in one tracked pipeline."""
