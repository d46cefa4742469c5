"""What replicas do not serve, said in one message by a process that leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_an_adapter_that_cannot_be_served(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "good").symlink_to(folders[0])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text("{")
    flags = ["--port", "0", "--replicas", "1", "--adapters", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "sidepath", "serve", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert "1 of 2 adapters cannot be served" in ran.stderr
    assert "Traceback" not in ran.stderr
