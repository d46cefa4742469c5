"""Putting adapters in, loading, activating and changing the merged one, beside PEFT's.

The same as `sidepath bench switching`; its flags are that command's.

    python benchmarks/switching.py [--rounds 7] [--threads 2] [--output FOLDER] [--json]
"""

from common import family

if __name__ == "__main__":
    family("switching")
