"""What every stage and plug-in stands on; imports nothing else of ours, and no tracking."""
