"""What a run leaves to be seen: its record, a page that shows it, and the way back to any of its steps."""
