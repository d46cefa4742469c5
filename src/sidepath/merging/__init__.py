"""Adapters folded into a copy of their base on disk, tensor by tensor, with proof (floor 5)."""
