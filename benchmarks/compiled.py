"""Training steps and forward passes under torch.compile, beside the eager ones; takes minutes.

The same as `sidepath bench compiled`; its flags are that command's.

    python benchmarks/compiled.py [--rounds 7] [--threads 2] [--output FOLDER] [--json]
"""

from common import family

if __name__ == "__main__":
    family("compiled")
