"""What a module logs, and how it is reduced over steps and ranks."""
