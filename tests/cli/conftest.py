"""A tiny random base with a byte tokenizer, data files and an adapter, made once a session."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sidepath.cli import main

SHARED = Path(__file__).resolve().parents[3] / "shared"


@dataclass(frozen=True)
class Ran:
    """What one command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document it has to be."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process."""

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def write_tokenizer(folder: Path) -> None:
    """One token a byte, plus start, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_base(folder: Path, seed: int) -> Path:
    """A random Llama of two layers in a transformers folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that most tests use."""
    return write_base(tmp_path_factory.mktemp("bases") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base of the same shapes."""
    return write_base(tmp_path_factory.mktemp("bases") / "other", seed=1)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions."""
    rows = [{"prompt": f"count {n}:", "completion": f" {n} {n + 1}"} for n in range(8)]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with labels."""
    rows = [{"text": f"{'good' if n % 2 else 'bad'} film {n}", "label": n % 2} for n in range(8)]
    return write_rows(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


@pytest.fixture(scope="session")
def trained(tiny_base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny base, trained by the command line."""
    output = tmp_path_factory.mktemp("adapters") / "counting"
    flags = f"--base {tiny_base} --data {pairs} --output {output} --r 2 --steps 3 --batch-size 4"
    assert main(["train", *flags.split(), "--learning-rate", "0.05"]) == 0
    return output


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained adapter that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def stories() -> Path:
    """The pre-trained base of 260K parameters that lies beside the checkout."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared material (stories260K) is not beside the checkout")
    return folder


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    """The first 200 rows of the E2E development set."""
    source = SHARED / "data" / "e2e" / "devset.csv"
    if not source.is_file():
        pytest.skip("the shared material (E2E) is not beside the checkout")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "e2e.csv"
    path.write_text("".join(lines[:201]), encoding="utf-8")
    return path
