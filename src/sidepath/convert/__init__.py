"""Adapters in other tools' formats, both ways (floor 5)."""
