"""Rows of many adapters in one pass, over the base alone, beside PEFT's.

The same as `sidepath bench routed`; its flags are that command's.

    python benchmarks/routed.py [--rounds 7] [--threads 2] [--output FOLDER] [--json]
"""

from common import family

if __name__ == "__main__":
    family("routed")
