"""Subcommands of `secateur` that write settings, and nothing that a stage imports."""
