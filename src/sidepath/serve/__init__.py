"""One base, many adapters, many requests at a time (floor 5)."""
