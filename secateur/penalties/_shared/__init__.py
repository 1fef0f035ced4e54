"""What several penalties share; no penalties themselves."""
