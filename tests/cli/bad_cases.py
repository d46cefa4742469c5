"""Commands with wrong input, each with what its one message has to say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .conftest import write_rows


@dataclass(frozen=True)
class Place:
    """What a case may use: its own folder, and the session's base, data and adapter."""

    here: Path
    base: Path
    other: Path
    pairs: Path
    labelled: Path
    adapter: Path

    def train(self, *flags: object, data: Path | None = None) -> list[str]:
        """A training command that works but for `flags`."""
        words = ["train", "--base", self.base, "--data", data or self.pairs, "--steps", 1]
        return [str(word) for word in (*words, "--output", self.here / "out", *flags)]

    def file(self, name: str, text: str) -> Path:
        path = self.here / name
        path.write_text(text)
        return path

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.here / name))


def broken_line_7(place: Place) -> list[str]:
    lines = place.pairs.read_text().splitlines()
    lines[6] = '{"prompt": "a"'
    return place.train(data=place.file("d.jsonl", "\n".join(lines)))


def mixed_labels(place: Place) -> list[str]:
    rows = [{"text": "a b", "label": 1}, {"text": "c d"}, {"text": "e f", "label": [2]}]
    return place.train(data=write_rows(place.here / "d.jsonl", rows))


def nothing_to_learn(place: Place) -> list[str]:
    rows = [{"prompt": "a", "completion": ""}] * 3
    return place.train(data=write_rows(place.here / "d.jsonl", rows))


def too_long_to_learn(place: Place) -> list[str]:
    return place.train("--max-tokens", 3)


def other_base(place: Place) -> list[str]:
    words = ["eval", "--base", place.other, "--adapter", place.adapter, "--data", place.pairs]
    return [str(word) for word in words]


def base_without_config(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    (base / "config.json").unlink()
    return ["plan", str(base)]


def base_with_broken_config(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    (base / "config.json").write_text("{")
    return ["plan", str(base)]


def base_of_no_known_kind(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    (base / "config.json").write_text('{"model_type": "abacus"}')
    return ["plan", str(base)]


def base_without_tokenizer(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    for path in base.glob("tokenizer*"):
        path.unlink()
    return place.train("--base", base)


def truncated_base(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return place.train("--base", base)


def pickled_base(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return place.train("--base", base)


def base_that_lacks_weights(place: Place) -> list[str]:
    from safetensors.torch import load_file, save_file

    base = place.copy(place.base, "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return place.train("--base", base)


def pickled_adapter(place: Place) -> list[str]:
    (place.adapter / "adapter_model.safetensors").unlink()
    (place.adapter / "sidepath.json").unlink()
    (place.adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    return generate(place)


def flipped_bit(place: Place) -> list[str]:
    path = place.adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    return generate(place)


def adapter_without_settings(place: Place) -> list[str]:
    (place.adapter / "adapter_config.json").unlink()
    return generate(place)


def generate(place: Place) -> list[str]:
    words = ["generate", "--base", place.base, "--adapter", place.adapter, "--prompt", "a"]
    return [str(word) for word in words]


def folder_of_someone_else(place: Place) -> list[str]:
    (place.here / "out").mkdir()
    place.file("out/thesis.txt", "do not delete")
    return place.train("--overwrite")


def output_exists(place: Place) -> list[str]:
    return place.train("--output", place.adapter)


def held_out_with_other_labels(place: Place) -> list[str]:
    rows = [{"text": "a", "label": 7}]
    other = write_rows(place.here / "eval.jsonl", rows)
    return place.train("--eval-data", other, data=place.labelled)


def left_checkpoints(place: Place) -> list[str]:
    (place.here / "out.checkpoints" / "step-00000001").mkdir(parents=True)
    return place.train()


def merge_command(place: Place, *words: object) -> list[str]:
    return [str(word) for word in ("merge", *words)]


def million_rows_with_a_broken_one(place: Place) -> list[str]:
    path = place.here / "d.jsonl"
    with path.open("w") as file:
        for at in range(1, 1_000_001):
            file.write("{broken\n" if at == 500_000 else '{"text": "a"}\n')
    return place.train("--stream", data=path)


def parquet(place: Place, **columns: object) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path = place.here / "d.parquet"
    write_table(pyarrow.table(columns), path)
    return path


def truncated_parquet(place: Place) -> list[str]:
    path = parquet(place, text=[f"row {at}" for at in range(1000)])
    path.write_bytes(path.read_bytes()[:-100])
    return place.train(data=path)


def mixed_schemas(place: Place) -> list[str]:
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}, {"messages": []}]
    return place.train(data=write_rows(place.here / "d.jsonl", rows))


def with_second(place: Place, *flags: object, rows: list[dict[str, object]]) -> list[str]:
    return place.train("--data", write_rows(place.here / "second.jsonl", rows), *flags)


def label_out_of_range(place: Place) -> list[str]:
    rows = [{"text": "a", "label": at} for at in (0, 1, 2)]
    other = write_rows(place.here / "eval.jsonl", rows)
    return place.train("--eval-data", other, data=place.labelled)


def base_with_template(place: Place, template: str) -> Path:
    import json

    base = place.copy(place.base, "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return base


def template_that_fails(place: Place, template: str) -> list[str]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows(place.here / "d.jsonl", [{"messages": turns}])
    return place.train("--base", base_with_template(place, template), data=data)


GOOD = [{"prompt": "a", "completion": "b"}]

Case = tuple[Callable[[Place], list[str]], tuple[str, ...]]
CASES: dict[str, Case] = {
    "data file missing": (
        lambda p: p.train(data=p.here / "none.jsonl"),
        ("none.jsonl", "No such file"),
    ),
    "data file empty": (lambda p: p.train(data=p.file("d.jsonl", "")), ("no rows",)),
    "data file is a folder": (lambda p: p.train(data=p.adapter), ("adapter",)),
    "data file of no known format": (lambda p: p.train(data=p.file("d.xyz", "a")), (".xyz",)),
    "data file not text": (
        lambda p: p.train(data=p.adapter / "adapter_model.safetensors"),
        (".safetensors",),
    ),
    "broken JSON on line 7": (broken_line_7, ("line 7",)),
    "data file is a folder of a known format": (
        lambda p: p.train(data=p.copy(p.adapter, "d.jsonl")),
        ("d.jsonl", "directory"),
    ),
    "Parquet truncated": (truncated_parquet, ("d.parquet", "damaged")),
    "Parquet of wrong types": (
        lambda p: p.train(data=parquet(p, prompt=["a", "b"], completion=[1, 2])),
        ("row 1", "row 2", "expected text, found int"),
    ),
    "Parquet empty": (lambda p: p.train(data=p.file("d.parquet", "")), ("damaged, or is none",)),
    "schemas mixed in a file": (mixed_schemas, ("line 2", "line 3", "kind messages")),
    "schemas mixed between files": (
        lambda p: with_second(p, rows=[{"text": "c"}]),
        ("pairs.jsonl", "second.jsonl", "different schemas"),
    ),
    "second file broken": (
        lambda p: with_second(p, rows=[*GOOD, {"prompt": 1, "completion": "b"}]),
        ("second.jsonl, line 2",),
    ),
    "second file empty": (lambda p: with_second(p, rows=[]), ("second.jsonl", "no rows")),
    "data named twice": (lambda p: p.train("--data", p.pairs), ("named twice",)),
    "too few weights": (
        lambda p: with_second(p, "--weights", 1, rows=GOOD),
        ("1 weights for 2 sources",),
    ),
    "weight of zero": (
        lambda p: with_second(p, "--weights", "1,0", rows=GOOD),
        ("weights", "found: 0.0"),
    ),
    "weight below zero": (
        lambda p: with_second(p, "--weights", "1", "--weights=-2", rows=GOOD),
        ("weights", "found: -2.0"),
    ),
    "weight that is no number": (
        lambda p: with_second(p, "--weights", "1,x", rows=GOOD),
        ("--weights", "'x'"),
    ),
    "label out of range": (label_out_of_range, ("line 3", '"2"', "expected 0, 1")),
    "template not Jinja": (
        lambda p: template_that_fails(p, "{% if %}"),
        ("line 1", "not valid Jinja"),
    ),
    "template that raises": (
        lambda p: template_that_fails(p, "{{ raise_exception('never') }}"),
        ("line 1", "refuses the conversation: never"),
    ),
    "template that rewrites": (
        lambda p: template_that_fails(p, "{{ messages | length }}{{ messages[0].content }}"),
        ("line 1", "cannot be told from the rest"),
    ),
    "hub name malformed": (
        lambda p: p.train(data=Path("hub:nobody")),
        ("hub:nobody", "hub:OWNER/NAME"),
    ),
    "no such column": (
        lambda p: p.train(data=p.file("d.csv", "question,answer\na,b\n")),
        ("answer, question",),
    ),
    "column named wrong": (
        lambda p: p.train(
            *("--columns", "prompt=questoin", "--columns", "completion=answer"),
            data=p.file("d.csv", "question,answer\na,b\n"),
        ),
        ('"questoin"', '"question"'),
    ),
    "labels mixed": (mixed_labels, ("line 2", "line 3")),
    "completions empty": (nothing_to_learn, ("no row is left", "3 empty")),
    "completions too long": (too_long_to_learn, ("no row is left", "over-long")),
    "held-out labels unknown": (held_out_with_other_labels, ("7",)),
    "settings file missing": (lambda p: p.train("--config", p.here / "no.toml"), ("no.toml",)),
    "settings file not TOML": (
        lambda p: p.train("--config", p.file("s.toml", "[lora\n")),
        ("s.toml", "not TOML"),
    ),
    "settings file with unknown field": (
        lambda p: p.train("--config", p.file("s.toml", "[lora]\nalhpa = 3\n")),
        ('"alhpa"', '"alpha"', "s.toml"),
    ),
    "unknown flag": (lambda p: p.train("--lerning-rate", 1), ('"--learning-rate"',)),
    "unknown command": (lambda p: ["trian"], ('"train"',)),
    "unknown method": (lambda p: p.train("--method", "lorra"), ('"lora"',)),
    "flag without value": (lambda p: p.train("--alpha"), ("--alpha", "expected one argument")),
    "flag of a wrong type": (lambda p: p.train("--r", "eight"), ("--r", "'eight'", "int")),
    "needed flag missing": (lambda p: ["train", "--data", "d.csv"], ("--output is needed",)),
    "place missing": (lambda p: merge_command(p, p.base), ("merge takes BASE ADAPTER... OUT",)),
    "too many places": (lambda p: ["plan", str(p.base), "more"], ("plan takes MODEL", "more")),
    "r is zero": (lambda p: p.train("--r", 0), ("r = 0",)),
    "alpha is NaN": (lambda p: p.train("--alpha", "nan"), ("alpha = nan",)),
    "no steps": (lambda p: p.train("--steps", 0), ("steps = 0",)),
    "no rows wanted": (lambda p: p.train("--limit", 0), ("limit = 0",)),
    "target misspelt": (lambda p: p.train("--targets", "q_porj"), ('"q_porj"', '"q_proj" (2)')),
    "plan with target misspelt": (
        lambda p: ["plan", str(p.base), "--targets", "q_porj"],
        ('"q_proj" (2)',),
    ),
    "GPU of no memory": (lambda p: ["plan", str(p.base), "--gpu-gib", "0"], ("gpu_gib = 0",)),
    "base missing": (lambda p: p.train("--base", p.here / "nowhere"), ("no such base folder",)),
    "base is an adapter": (lambda p: ["plan", str(p.adapter)], ("an adapter's folder",)),
    "base without config": (base_without_config, ("no config.json",)),
    "base with broken config": (base_with_broken_config, ("config cannot be used",)),
    "base of no known kind": (base_of_no_known_kind, ("abacus",)),
    "base without tokenizer": (base_without_tokenizer, ("tokenizer",)),
    "base truncated": (truncated_base, ("cannot be loaded",)),
    "base is a pickle": (pickled_base, ("pytorch_model.bin", "never loaded")),
    "base lacks weights": (base_that_lacks_weights, ("model.layers.1.mlp.up_proj.weight",)),
    "adapter missing": (
        lambda p: [*generate(p), "--adapter", str(p.here / "none")],
        ("no such adapter folder",),
    ),
    "adapter folder empty": (
        lambda p: [*generate(p), "--adapter", str(p.file("x", "").parent)],
        ("holds no adapter",),
    ),
    "adapter is a pickle": (pickled_adapter, ("pickle",)),
    "adapter with a flipped bit": (flipped_bit, ("not those that were saved",)),
    "adapter without its settings": (adapter_without_settings, ("adapter_config.json",)),
    "adapter of another base": (other_base, ("another base",)),
    "merge of another base's": (
        lambda p: merge_command(p, p.other, p.adapter, p.here / "out"),
        ("another base",),
    ),
    "merge into the base itself": (
        lambda p: merge_command(p, p.copy(p.base, "base"), p.adapter, p.here / "base"),
        ("base",),
    ),
    "inspect beside another base": (
        lambda p: ["inspect", str(p.adapter), "--base", str(p.other)],
        ("another base",),
    ),
    "inspect what is no adapter": (lambda p: ["inspect", str(p.base)], ("no adapter",)),
    "output holds an adapter": (output_exists, ("--overwrite",)),
    "output holds other files": (folder_of_someone_else, ("thesis.txt",)),
    "output is a file": (
        lambda p: p.train("--output", p.file("taken", "")),
        ("exists and is not a folder",),
    ),
    "output below a file": (
        lambda p: p.train("--output", p.file("taken", "") / "out"),
        ("cannot be written", "taken"),
    ),
    "output of an impossible name": (
        lambda p: p.train("--output", p.here / "my adapter!"),
        ("my adapter!",),
    ),
    "checkpoints of an unfinished run": (left_checkpoints, ("--resume",)),
    "generate without prompt": (lambda p: ["generate", "--base", str(p.base)], ("--prompt",)),
    "generate from rows without prompts": (
        lambda p: ["generate", "--base", str(p.base), "--data", str(p.labelled)],
        ("line 1: no prompt",),
    ),
    "prompt too long": (
        lambda p: ["generate", "--base", str(p.base), "--prompt", "a" * 500],
        ("context",),
    ),
    "classifier data on a base alone": (
        lambda p: ["eval", "--base", str(p.base), "--data", str(p.labelled)],
        ("--adapter",),
    ),
    "unknown metric": (
        lambda p: ["eval", "--base", str(p.base), "--data", str(p.pairs), "--metrics", "blue"],
        ('"bleu"',),
    ),
}
