"""Lightning's names."""
