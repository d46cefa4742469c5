"""The command line's surface: verbs, flags, places, exit codes, and a quick start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sidepath import __version__
from sidepath.cli import main
from sidepath.cli.options import flags_of
from sidepath.cli.surface import VERBS, sections_of

from .conftest import Run

COMMON = "--base --dtype --device --quantise"
LORA = (
    "--r --alpha --dropout --targets --exclude --rank-pattern --alpha-pattern --layers --bias"
    " --train-whole --token-rows --scaling --start --dora --b-rate"
)
TRAIN = (
    "--steps --epochs --batch-size --accumulate --packing --workers --optimizer --learning-rate"
    " --schedule --warmup --weight-decay --beta1 --beta2 --clip --seed --autocast --kernels"
    " --gradient-checkpointing --eval-share --eval-every --patience"
    " --checkpoint-every --keep-checkpoints --label-smoothing --watch"
)
RUN = (
    f"{COMMON} --data --output --method --new-tokens --beside --eval-data --weights --stream"
    " --columns"
    " --max-tokens --limit --distributed --dry-run --forgetting --forgetting-data --track"
    " --resume --overwrite"
)
SURFACE = {
    "demo": "--output --seed",
    "plan": (
        f"--method --new-tokens --batch-size --max-tokens --dtype --gpu-gib {LORA} --lora-dtype"
    ),
    "train": f"{RUN} {LORA} --lora-dtype {TRAIN}",
    "eval": (
        f"{COMMON} --data --adapter --beside --allow-other-base --columns --batch-size"
        " --max-new-tokens --metrics --max-tokens --limit"
    ),
    "generate": (
        f"{COMMON} --prompt --data --adapter --beside --allow-other-base --columns --max-new-tokens"
        " --temperature --batch-size --limit --seed"
    ),
    "compare": (
        f"{COMMON} --data --eval-data --otherwise --metric --columns --preset --learning-rates"
        " --seeds --validation --limit --eval-limit --max-tokens --max-new-tokens --latency"
        " --rounds --output --workers --through --intrinsic --share --dimensions --subspace"
        f" {TRAIN} --train-workers"
    ),
    "inspect": (
        f"{COMMON} --widest --alpha --html --merged --truncate --output --overwrite --advise"
        " --tolerance --data --metric --columns --limit --max-tokens --max-new-tokens --batch-size"
    ),
    "merge": "--skip-parity --data --dtype --quantise --allow-other-base --overwrite",
    "push": "--private --message --licence --parity",
    "library": "--base --method",
    "convert": "--to --from --for --base --alpha --fused --component --overwrite",
    "combine": (
        "--kind --weights --layer-weights --r --energy --density --seed --base --allow-other-base"
        " --overwrite"
    ),
    "extract": "--r --energy --targets --exclude --whole --seed --overwrite",
    "serve": (
        f"{COMMON} --keys --new-key --key-admin --key-models --key-per-minute --key-at-once"
        " --allow-loading --max-rank --max-adapter-bytes --max-prompt-tokens --max-new-tokens"
        " --connections --head-seconds --body-seconds --stall-seconds --drain-seconds"
        " --engine --adapters --port --name --allow-other-base --rows --slots --context"
        " --cached-tokens --step-tokens --queue --adapter-memory --host-memory --laid-out"
        " --prefixes --merge --replicas"
    ),
    "bench": "--rounds --threads --device --output --quick",
    "config": f"{RUN} {LORA} --lora-dtype {TRAIN}",
    "doctor": "",
    "completion": "",
}
PLACES = {
    "plan": ("MODEL",),
    "compare": ("[CONFIG]",),
    "inspect": ("ADAPTER", "[OTHER]"),
    "merge": ("BASE", "ADAPTER...", "OUT"),
    "push": ("ADAPTER", "TARGET"),
    "library": ("FOLDER",),
    "convert": ("IN", "[OUT]"),
    "combine": ("ADAPTER...", "OUT"),
    "extract": ("BASE", "TUNED", "OUT"),
    "bench": ("[FIGURE]...",),
    "completion": ("SHELL",),
}


def test_the_surface_is_what_it_was() -> None:
    found = {
        name: {flag.name for flag in flags_of(sections_of(verb, "lora"))}
        for name, verb in VERBS.items()
    }
    assert found == {name: set(flags.split()) for name, flags in SURFACE.items()}
    assert {name: verb.places for name, verb in VERBS.items() if verb.places} == PLACES


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["-h"]])
def test_help_and_version_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    script = (
        "import sys, json; from sidepath.cli import main; code = main(sys.argv[1:]);"
        "print(json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    code, modules = json.loads(ran.stdout.splitlines()[-1])
    assert code == 0
    assert not {"torch", "transformers", "numpy", "rich"} & set(modules)


def test_module_and_version(run: Run) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "sidepath", "--version"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, f"sidepath {__version__}\n")
    assert run("--version").out == ran.stdout


def test_help_names_every_verb(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(f"\n  {verb} " in ran.out for verb in VERBS)


def test_no_command_prints_the_overview_and_is_an_error(run: Run) -> None:
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert "usage: sidepath COMMAND" in ran.err


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sidepath.cli.verbs.config", interrupted)
    ran = run("config")
    assert (ran.code, ran.err) == (130, "sidepath config: interrupted\n")


def test_an_internal_fault_is_one_line_and_says_how_to_see_more(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the flux\nis inverted")

    monkeypatch.setattr("sidepath.cli.verbs.config", broken)
    ran = run("config")
    assert ran.code == 1
    assert ran.err == (
        "sidepath config: internal fault: RuntimeError: the flux is inverted"
        " (SIDEPATH_DEBUG=1 shows the traceback)\n"
    )
    monkeypatch.setenv("SIDEPATH_DEBUG", "1")
    assert "Traceback" in run("config").err


def test_what_a_library_prints_stays_out_of_the_document(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidepath.cli.verbs import config

    def chatty(call: object) -> object:
        print("loading ...")
        return config(call)  # type: ignore[arg-type]

    monkeypatch.setattr("sidepath.cli.verbs.config", chatty)
    ran = run("config", "--json")
    assert ran.document["lora"]["r"]["source"] == "default"
    assert "loading ..." in ran.err


def test_a_reader_that_leaves_is_not_an_error_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "sidepath", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_main_does_not_exit() -> None:
    assert main(["--version"]) == 0
