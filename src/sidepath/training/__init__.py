"""Training (floor 5): steps, checkpoints, several processes, several adapters, evaluation."""
