"""One layer: the matrix a module holds, and the named deltas beside it (floor 1, torch only)."""
