"""Many runs planned as one graph, run where there is room, and read as one page."""
