"""Bytes kept for the backward pass, and the peak of a training step, beside PEFT's.

The same as `sidepath bench memory`; its flags are that command's.

    python benchmarks/memory.py [--rounds 7] [--threads 2] [--output FOLDER] [--json]
"""

from common import family

if __name__ == "__main__":
    family("memory")
