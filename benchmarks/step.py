"""A training step over the floor, beside PEFT's and full fine-tuning's.

The same as `sidepath bench step`; its flags are that command's.

    python benchmarks/step.py [--rounds 7] [--threads 2] [--output FOLDER] [--json]
"""

from common import family

if __name__ == "__main__":
    family("step")
