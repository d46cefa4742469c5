"""From patterns to places, and adapters put in and taken out of a model (floor 3)."""
