"""What a module logs, and how it is reduced."""
