"""New adapters out of others, or out of two checkpoints; no model is built (floor 6)."""
