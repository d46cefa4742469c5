"""The adapters of the soak, several versions of each name, and what each version says by itself."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sidepath
from sidepath.store.manifest import NAME, read_manifest, write_manifest

BASE = "base"
LEAD = 1e-3
"""Logits by which every token of an answer leads. A server adds in another order than `generate`:
what is nearer than that may be chosen either way, and would say nothing about adapters."""
_TARGETS = (("q_proj", "v_proj"), ("all-linear",), ("down_proj", "k_proj"))


@dataclass(frozen=True)
class Question:
    """A prompt, as text or as a chat's message."""

    text: str
    chat: bool

    def body(self, model: str, new: int) -> dict[str, Any]:
        """The body that asks a model for its greedy answer of so many tokens."""
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.text}]}
            if self.chat
            else {"prompt": self.text}
        )
        return {"model": model, **asked, "max_tokens": new, "temperature": 0}

    def tokens(self, tokenizer: Any) -> list[int]:
        """What the base reads."""
        if not self.chat:
            return list(tokenizer(self.text)["input_ids"])
        messages = [{"role": "user", "content": self.text}]
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])


@dataclass
class Library:
    """`root` has a folder `NAME-V` for version V of each name, and `bad` ones; `served` has
    version 0 of each under its name.
    """

    root: Path
    served: Path
    names: list[str]
    versions: int
    new: int
    bad: tuple[str, ...] = ("nan", "flipped", "pickle")
    said: dict[tuple[str, Question], str] = field(default_factory=dict)
    """The greedy text of each folder's adapter (and of the base) alone, where it is beyond
    doubt (`LEAD`)."""

    def questions(self, name: str) -> list[Question]:
        """Those that every version of a name answers beyond doubt."""
        folders = [BASE] if name == BASE else [f"{name}-{v}" for v in range(self.versions)]
        every = dict.fromkeys(question for _, question in self.said)
        return [each for each in every if all((folder, each) in self.said for folder in folders)]


def make_library(
    place: Path, *, names: int, versions: int, questions: int, new: int, seed: int = 0
) -> Library:
    """Random adapters of many ranks over the embedded base, saved as `train` saves them."""
    torch.manual_seed(seed)
    library = Library(
        place / "root", place / "served", [f"a{number}" for number in range(names)], versions, new
    )
    model = AutoModelForCausalLM.from_pretrained(sidepath.embedded_base()).eval()
    for number, name in enumerate(library.names):
        for version in range(versions):
            rank = 2 + (3 * number + 5 * version) % 15
            config = sidepath.LoRA(r=rank, alpha=8, targets=_TARGETS[(number + version) % 3])
            adapter = sidepath.inject(model, config, name="new")
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.normal_(std=0.3)
            adapter.save(library.root / f"{name}-{version}")
            sidepath.remove(model, "new")
        shutil.copytree(library.root / f"{name}-0", library.served / name)
    _make_bad(library)
    _listen(library, model, _asked(questions, seed))
    return library


def _make_bad(library: Library) -> None:
    """Folders that nobody may load: NaN, a flipped bit, a pickle."""
    good = library.root / f"{library.names[0]}-0"
    manifest, _ = read_manifest(good)
    assert manifest is not None
    for name in library.bad:
        shutil.copytree(good, library.root / name)
    for name in ("nan", "flipped"):
        weights = library.root / name / "adapter_model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-4:] = b"\x00\x00\xc0\x7f" if name == "nan" else bytes([*raw[-4:-1], raw[-1] ^ 1])
        weights.write_bytes(raw)
    (library.root / "nan" / NAME).unlink()
    write_manifest(library.root / "nan", manifest)  # no digest is refused first
    (library.root / "pickle" / "adapter_model.safetensors").unlink()
    (library.root / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x04.")


def _asked(count: int, seed: int) -> list[Question]:
    rng = random.Random(seed)
    words = (
        "count",
        "red",
        "birds",
        "over",
        "seven",
        "old",
        "towns",
        "name",
        "one",
        "river",
        "song",
    )
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 40))) for _ in range(count)]
    return [Question(text, chat=number % 3 == 2) for number, text in enumerate(texts)]


def _listen(library: Library, model: Any, questions: Sequence[Question]) -> None:
    """Fill in what everyone says; a question that two answer alike tells nobody apart."""
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    folders = sorted(place.name for place in library.root.iterdir())
    for name in (BASE, *(folder for folder in folders if folder not in library.bad)):
        if name != BASE:
            sidepath.load(model, library.root / name, name="heard")
        for question in questions:
            text = _heard(model, tokenizer, question.tokens(tokenizer), library.new)
            if text is not None:
                library.said[name, question] = text
        if name != BASE:
            sidepath.remove(model, "heard")
    for question in questions:
        own = [text for (_, asked), text in library.said.items() if asked == question]
        if len(set(own)) < len(own):
            library.said = {key: t for key, t in library.said.items() if key[1] != question}


def _heard(model: Any, tokenizer: Any, prompt: list[int], new: int) -> str | None:
    """The greedy text of `generate`; None where a token leads by too little, or for no text."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits)[:, 0].topk(2).values
    if (best[:, 0] - best[:, 1]).min() < LEAD:
        return None
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    return str(whole[len(before) :]) or None
