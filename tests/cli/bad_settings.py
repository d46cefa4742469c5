"""Commands with wrong words: flags, settings files, values, places, prompts."""

from __future__ import annotations

from .place import Case, merge_command

SETTINGS: dict[str, Case] = {
    "settings file missing": (lambda p: p.train("--config", p.here / "no.toml"), ("no.toml",)),
    "settings file not TOML": (
        lambda p: p.train("--config", p.file("s.toml", "[lora\n")),
        ("s.toml", "not TOML"),
    ),
    "settings file with a number of 5,000 digits": (
        lambda p: p.train("--config", p.file("s.toml", "[lora]\nr = " + "9" * 5000)),
        ("s.toml", "not TOML"),
    ),
    "settings file nested too deeply": (
        lambda p: p.train("--config", p.file("s.toml", "[lora]\nr = " + "[" * 5000)),
        ("s.toml", "not TOML"),
    ),
    "settings file too large": (
        lambda p: p.train("--config", p.file("s.toml", "#" * (2**20 + 1))),
        ("s.toml", "too large"),
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
    "text for a parity that is skipped": (
        lambda p: merge_command(p, p.base, p.adapter, p.here / "out", "--skip-parity", "--data", 1),
        ("data = '1'",),
    ),
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
