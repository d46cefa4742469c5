"""The benchmark (floor 6): every figure beside its peer, interleaved in one process."""
