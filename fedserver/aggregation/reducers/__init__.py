"""Rules that make one update out of many; one rule a file."""
