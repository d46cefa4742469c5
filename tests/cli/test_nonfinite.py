"""NaN on the command line: one message, exit code 2, the last good checkpoint stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sidepath.training.checkpoint import latest
from tests.cli.conftest import Run, write_rows


def test_a_row_whose_loss_is_not_a_number(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    letter = 3 + sorted_letters().index("Q")
    tensors["model.embed_tokens.weight"][letter] = torch.inf
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": f"{'Q' if n == 8 else 'q'}{n}:", "completion": f" {n}"} for n in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["train", "--base", base, "--output", tmp_path / "out", "--r", 2, "--targets", "q_proj"]
    flags += ["--steps", 12, "--batch-size", 1, "--checkpoint-every", 1, "--data"]
    stopped = run(*flags, data)
    assert stopped.code == 2
    assert "Traceback" not in stopped.err
    assert stopped.err.count("the loss is not finite") == 1
    assert "line 9" in stopped.err.replace("lines 9", "line 9")
    assert not (tmp_path / "out").exists()
    found, notices = latest(tmp_path / "out.checkpoints")
    assert found is not None
    assert notices == []
    assert f"step {found.step + 1}: the loss is not finite" in stopped.err
    # It stops there again, and the checkpoint is still there.
    again = run(*flags, data, "--resume")
    assert again.code == 2
    assert f"step {found.step + 1}: the loss is not finite" in again.err
    # Mended data are other data: refused by name; what a user can do is to start anew.
    rows[8]["prompt"] = "q8:"
    mended = write_rows(tmp_path / "mended.jsonl", rows)
    refused = run(*flags, mended, "--resume")
    assert refused.code == 2
    assert "data.digest: the checkpoint has" in refused.err
    assert latest(tmp_path / "out.checkpoints")[0].step == found.step  # type: ignore[union-attr]
    left = run(*flags, mended)
    assert left.code == 2
    assert "--resume, or delete that folder" in left.err
    shutil.rmtree(tmp_path / "out.checkpoints")
    assert run(*flags, mended).code == 0


def sorted_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
