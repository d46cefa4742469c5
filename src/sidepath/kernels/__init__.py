"""Pure functions of tensors; each fast form stands beside its plain one (floor 1)."""
