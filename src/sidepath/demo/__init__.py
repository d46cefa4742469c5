"""The demonstration: three tasks, three adapters, each step proved (floor 6)."""
