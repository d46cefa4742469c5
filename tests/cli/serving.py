"""`sidepath serve` as a process of its own, which must end well."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Serving:
    """A server under way; `out` is what it printed, once it has ended."""

    process: subprocess.Popen[str]
    said: str
    url: str
    out: str = ""

    def end(self) -> None:
        """Tell it to end."""
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serving(*flags: object) -> Iterator[Serving]:
    """A server on a free port, which has ended well when the block ends; the block tells it to."""
    words = [sys.executable, "-m", "sidepath", "serve", "--json", "--port", "0"]
    process = subprocess.Popen(
        [*words, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+/v1)\n", said)
        assert found is not None, said + process.stderr.read()
        server = Serving(process, said, found[1])
        yield server
        server.out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    finally:
        process.kill()
        process.communicate()
