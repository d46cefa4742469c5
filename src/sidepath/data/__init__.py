"""Data (floor 5): rows of any source become audited examples; knows nothing of training."""
