"""Commands on wrong folders: bases, adapters, and outputs that are taken."""

from __future__ import annotations

import json

from tests.faults import flip_bit

from .place import Case, Place, generate, merge_command


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


def base_of_absurd_sizes(place: Place) -> list[str]:
    base = place.copy(place.base, "base")
    config = json.loads((base / "config.json").read_bytes())
    config |= {"num_hidden_layers": 2**31, "num_labels": 2**40}
    (base / "config.json").write_text(json.dumps(config))
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
    flip_bit(place.adapter / "adapter_model.safetensors")
    return generate(place)


def adapter_without_settings(place: Place) -> list[str]:
    (place.adapter / "adapter_config.json").unlink()
    return generate(place)


def folder_of_someone_else(place: Place) -> list[str]:
    (place.here / "out").mkdir()
    place.file("out/thesis.txt", "do not delete")
    return place.train("--overwrite")


def output_exists(place: Place) -> list[str]:
    return place.train("--output", place.adapter)


def left_checkpoints(place: Place) -> list[str]:
    (place.here / "out.checkpoints" / "step-00000001").mkdir(parents=True)
    return place.train()


FOLDERS: dict[str, Case] = {
    "base missing": (lambda p: p.train("--base", p.here / "nowhere"), ("no such base folder",)),
    "base is an adapter": (lambda p: ["plan", str(p.adapter)], ("an adapter's folder",)),
    "base without config": (base_without_config, ("no config.json",)),
    "base with broken config": (base_with_broken_config, ("config cannot be used",)),
    "base of absurd sizes": (base_of_absurd_sizes, ("num_hidden_layers", "num_labels", "absurd")),
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
}
