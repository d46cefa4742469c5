"""torchrun: two processes give the adapter of one, and a killed one is started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidepath.store.adapter import load

from .conftest import Run, write_rows

SECONDS = 300
QUICKLY = "--no-forgetting"
"""Where runs are killed and compared, what they forgot is not asked."""


def launch(*flags: object, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun ... -m sidepath -- train`: without `--` torchrun takes `--r` for one of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, "-m", "sidepath", "--", "train", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"count {at}:", "completion": " " + "ab" * (at % 7 + 1)} for at in range(40)],
    )


def flags_of(base: Path, rows: Path, output: Path, **more: object) -> list[object]:
    flags: dict[str, object] = {
        "base": base,
        "data": rows,
        "output": output,
        "steps": 8,
        "batch-size": 4,
        "accumulate": 2,
        "learning-rate": 1e-2,
        "r": 2,
        **more,
    }
    return [item for name, value in flags.items() for item in (f"--{name}", value)] + ["--json"]


def same_adapter(one: Path, other: Path) -> None:
    """Equal names, shapes and, within rounding, values, read again from disk."""
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    # A quick run of two in "ddp" is the next test's, and its numbers are training/test_processes'.
    "distributed",
    [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"],
)
def test_two_processes_give_the_adapter_of_one(
    run: Run, tiny_base: Path, rows: Path, tmp_path: Path, distributed: str
) -> None:
    alone = run("train", *flags_of(tiny_base, rows, tmp_path / "alone"))
    assert alone.code == 0, alone.err
    output = tmp_path / distributed
    process = launch(*flags_of(tiny_base, rows, output, distributed=distributed))
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    found = json.loads(out)  # one document, from one process
    assert found["steps"] == 8
    assert found["loss"]["last"] == pytest.approx(alone.document["loss"]["last"], rel=1e-4)
    assert err.count("step 8/8") == 1
    same_adapter(tmp_path / "alone", output)
    from transformers import AutoModelForCausalLM

    load(AutoModelForCausalLM.from_pretrained(tiny_base), output, "saved")


def test_a_killed_process_is_started_anew_and_resumes(
    run: Run, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    more = {"steps": 60, "dropout": 0.1, "checkpoint-every": 1, "distributed": "ddp"}
    seldom = more | {"checkpoint-every": 60}
    whole = launch(*flags_of(tiny_base, rows, tmp_path / "whole", **seldom), QUICKLY)
    out, err = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, err
    output = tmp_path / "out"
    process = launch(*flags_of(tiny_base, rows, output, **more), QUICKLY, restarts=2)
    checkpoints = tmp_path / "out.checkpoints"
    until(lambda: any(checkpoints.glob("step-*")), process)
    os.kill(worker(output, rank=1), signal.SIGKILL)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert "resumed after step" in err
    assert json.loads(out)["steps"] == 60
    one, other = (path / "adapter_model.safetensors" for path in (tmp_path / "whole", output))
    assert one.read_bytes() == other.read_bytes(), "the unbroken run's bits"


def until(holds: object, process: subprocess.Popen[str]) -> None:
    """Wait until `holds()`, or fail when the process ends first."""
    assert callable(holds)
    end = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def worker(output: Path, rank: int) -> int:
    """The process of that rank which writes to `output`."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(output).encode() in command and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError("no such process")


def test_flags_and_launcher_must_fit(
    run: Run, tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of(tiny_base, rows, tmp_path / "out")
    ran = run("train", *flags, "--distributed", "ddp")
    assert ran.code == 2
    assert "torchrun --nproc-per-node" in ran.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = run("train", *flags)
    assert ran.code == 2
    assert "add --distributed ddp" in ran.err
    assert not (tmp_path / "out").exists()


def test_sigterm_saves_and_the_same_command_goes_on(
    run: Run, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    more = {"steps": 120, "dropout": 0.1}
    whole = run("train", *flags_of(tiny_base, rows, tmp_path / "whole", **more), QUICKLY)
    assert whole.code == 0, whole.err
    flags = [*flags_of(tiny_base, rows, tmp_path / "out", **more), QUICKLY]
    command = [sys.executable, "-m", "sidepath", "train", *map(str, flags)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/120"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, err
    assert out == ""
    assert "stopped after step" in err
    assert "--resume" in err
    assert not (tmp_path / "out").exists()
    done = run("train", *flags, "--resume")
    assert done.code == 0, done.err
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


RESTARTED = """
import os, signal
import torch.distributed as dist
from sidepath.cli.launch import meet
meet("gloo")
dist.barrier()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < 4 and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
if attempt < 4:
    raise SystemExit(1)
if dist.get_rank() == 0:
    print("met after", attempt, flush=True)
"""


@pytest.mark.slow  # a run that is killed and started anew is above
def test_processes_meet_again_after_every_restart(tmp_path: Path) -> None:
    """Torchrun keeps one store over its restarts; what the dead left there must not be read."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--max-restarts", "4", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "met after 4"
