"""Decoding and prefill with one adapter that is not merged, over the base, beside PEFT's.

The same as `sidepath bench decode`; its flags are that command's.

    python benchmarks/decode.py [--rounds 7] [--threads 2] [--output FOLDER] [--json]
"""

from common import family

if __name__ == "__main__":
    family("decode")
