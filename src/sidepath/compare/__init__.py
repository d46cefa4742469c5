"""The comparison (floor 6): methods on the same data, budget and seeds, told apart."""
