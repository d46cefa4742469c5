"""Figures on one GPU: a Llama of 6.7 billion random numbers, ours beside PEFT's.

    python benchmarks/gpu.py [FIGURE]... [--rounds 7] [--output FOLDER] [--quick]

Needs about 70 GiB of GPU memory. Training steps in bfloat16 and over an NF4 base, peak memory,
decoding with one adapter and with one a row; and the Triton kernels beside the plain forms that
they take the place of, at this model's widths. `--quick` is a tiny model, to see that it runs, on
a CPU too. What each kernel's trial came to is told at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.bench.decode import BASE, PROMPT, Decode, Decoder, Prefill, forward_of
from sidepath.bench.figure import OURS, PEER, Figure, figure_of
from sidepath.bench.memory import Memory, peak_bytes
from sidepath.bench.models import make, token_ids
from sidepath.bench.peers import has_peft, require_agreement, with_ours, with_peft
from sidepath.bench.report import notes, table_rows, write
from sidepath.bench.routed import Routed
from sidepath.bench.setting import Bench, Measure
from sidepath.bench.step import Step, labelled_loss, our_loss, step_of
from sidepath.bench.table import measured
from sidepath.injection.quantising import quantise_
from sidepath.kernels import triton_nf4, triton_routed
from sidepath.kernels.checked import TRIALS
from sidepath.kernels.tiles import tiles_of

SHAPE = "llama-7b"
DTYPE = "bfloat16"
TOLERANCE = 8e-2
"""How far ours and PEFT's logits may be apart, over the largest: 32 blocks in bfloat16."""


def packed(bench: Bench) -> nn.Module:
    """The model with its linear layers in NF4, as transformers would have loaded it."""
    model: Any = make(SHAPE, DTYPE, bench.device, quick=bench.quick)
    quantise_(model)
    model.is_loaded_in_4bit = True  # what PEFT asks a model for
    torch.cuda.empty_cache()
    return model  # type: ignore[no-any-return]


def packed_ways(bench: Bench) -> dict[str, nn.Module]:
    """Ours and PEFT's adapter, each over a 4-bit base of its own."""
    ways = {OURS: with_ours(packed(bench))}
    if has_peft():
        ways[PEER] = with_peft(packed(bench))
    return ways


@dataclass(frozen=True)
class PackedStep:
    """A training step over a 4-bit base beside one over the base in bfloat16."""

    rows: int
    tokens: int

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = {way: model.train() for way, model in packed_ways(bench).items()}
        plain = "ours in bfloat16"
        models[plain] = with_ours(make(SHAPE, DTYPE, bench.device, quick=bench.quick)).train()
        ids_BT = token_ids(models[OURS], bench.rows(self.rows), bench.tokens(self.tokens))
        losses = {
            way: (labelled_loss if way == PEER else our_loss)(model, ids_BT)
            for way, model in models.items()
        }
        require_agreement({way: loss().detach() for way, loss in losses.items()}, 2e-2)
        peaks = {way: peak_bytes(models[way], loss) for way, loss in losses.items()}
        actions = {
            way: step_of(models[way], loss, False, fused=False) for way, loss in losses.items()
        }
        samples, _ = bench.timed(actions, warmup=1)
        what = f"training step over NF4, {SHAPE}, {ids_BT.shape[0]} x {ids_BT.shape[1]} tokens"
        told = [f"{way} {size / 2**20:,.0f}" for way, size in peaks.items()]
        note = f"peak over what is resident, MiB: {', '.join(told)}"
        return figure_of(name, what, samples, {}, notes=[note], also=[f"{OURS} / {plain}"])


@dataclass(frozen=True)
class PackedDecode:
    """Decoding over a 4-bit base, one adapter that is not merged, beside the 4-bit base alone."""

    rows: int

    def __call__(self, name: str, bench: Bench) -> Figure:
        models = {BASE: packed(bench), **packed_ways(bench)}
        ids_BT = token_ids(models[BASE], bench.rows(self.rows), bench.tokens(PROMPT))
        for model in models.values():
            model.eval()
        found = {way: forward_of(model, ids_BT)() for way, model in models.items()}
        logits: dict[str, Tensor] = {way: output.logits for way, output in found.items()}  # type: ignore[attr-defined]
        require_agreement(logits, TOLERANCE)
        decoders = {way: Decoder(model, ids_BT) for way, model in models.items()}
        samples, _ = bench.timed(
            {way: decoder.run for way, decoder in decoders.items()},
            before={way: decoder.reset for way, decoder in decoders.items()},
        )
        what = f"decode over NF4, {SHAPE}, {ids_BT.shape[0]} rows, one adapter that is not merged"
        return figure_of(name, what, samples, {}, reference=BASE)


@dataclass(frozen=True)
class RoutedKernel:
    """The routed product of one layer: Triton beside a loop over the adapters in torch."""

    rows: int
    adapters: int
    rank: int = 16
    widths: tuple[int, int] = (4096, 11_008)

    def __call__(self, name: str, bench: Bench) -> Figure:
        device, (inner, width) = bench.device, (64, 96) if bench.quick else self.widths
        x_NI = torch.randn(self.rows, inner, device=device, dtype=torch.bfloat16)
        ranks = self.adapters * self.rank
        A_SI = torch.randn(ranks, inner, device=device, dtype=torch.bfloat16) * 0.02
        B_SO = torch.randn(ranks, width, device=device, dtype=torch.bfloat16) * 0.02
        starts = tuple(range(0, ranks + 1, self.rank))
        slots_N = torch.arange(self.rows) % self.adapters
        ones = (1.0,) * self.adapters
        tiles = tiles_of(slots_N, starts, ones, device)
        places = [(slots_N == slot).nonzero()[:, 0].to(device) for slot in range(self.adapters)]
        y_NO = torch.zeros(self.rows, width, device=device, dtype=torch.bfloat16)

        def triton() -> None:
            triton_routed.add_routed_(y_NO, x_NI, A_SI, B_SO, starts, ones, slots_N, tiles=tiles)

        def loop() -> None:
            for slot, at in enumerate(places):
                part = slice(starts[slot], starts[slot + 1])
                y_NO.index_add_(0, at, x_NI[at] @ A_SI[part].T @ B_SO[part])

        with torch.no_grad():
            agree({"triton": _added(triton, y_NO), "loop": _added(loop, y_NO)})
            samples, _ = bench.timed({OURS: repeated(triton), "loop": repeated(loop)})
        what = f"routed product, {self.rows} rows of {self.adapters} adapters of rank {self.rank}"
        told = f"{REPEATS} calls a time; x {inner} -> {width}, bfloat16"
        return figure_of(name, what, samples, {}, notes=[told], also=[f"loop / {OURS}"])


@dataclass(frozen=True)
class PackedKernel:
    """The product with a 4-bit matrix: Triton beside bitsandbytes' own, and bfloat16's."""

    rows: int
    widths: tuple[int, int] = (4096, 11_008)

    def __call__(self, name: str, bench: Bench) -> Figure:
        from bitsandbytes import functional

        inner, width = (64, 96) if bench.quick else self.widths
        W_OI = torch.randn(width, inner, device=bench.device, dtype=torch.bfloat16) * 0.02
        codes, state = functional.quantize_4bit(
            W_OI, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        x_NI = torch.randn(self.rows, inner, device=bench.device, dtype=torch.bfloat16)
        form = triton_nf4.packed_of(codes, state)
        ways: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: triton_nf4.product(x_NI, form),
            "unpacked first": lambda: x_NI @ functional.dequantize_4bit(codes, state).T,
            "bfloat16": lambda: x_NI @ W_OI.T,
        }
        if self.rows == 1:
            ways["bitsandbytes"] = lambda: functional.gemv_4bit(x_NI[None], codes.t(), state=state)[
                0
            ]
        with torch.no_grad():
            agree({way: run() for way, run in ways.items() if way != "bfloat16"})
            samples, _ = bench.timed({way: repeated(run) for way, run in ways.items()})
        what = f"product with an NF4 matrix of {width} x {inner}, {self.rows} rows"
        also = [f"{way} / {OURS}" for way in ways if way != OURS]
        return figure_of(name, what, samples, {}, notes=[f"{REPEATS} calls a time"], also=also)


REPEATS = 50


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """Many calls as one: a launch is as long as a small kernel."""

    def runs() -> None:
        for _ in range(REPEATS):
            run()

    return runs


def _added(add: Callable[[], None], y: Tensor) -> Tensor:
    y.zero_()
    add()
    return y.clone()


def agree(found: Mapping[str, Tensor]) -> None:
    """End the script unless all results are alike: else nothing was compared."""
    first, *others = found.items()
    for name, result in others:
        apart = float((result.double() - first[1].double()).norm() / first[1].double().norm())
        if not apart <= 2e-2:
            sys.exit(f"{name} is {apart:.2g} away from {first[0]}")


FIGURES: Mapping[str, Measure] = {
    "kernel-routed-32": RoutedKernel(32, 32),
    "kernel-routed-256": RoutedKernel(256, 64),
    "kernel-routed-2048": RoutedKernel(2048, 8),
    "kernel-nf4-1": PackedKernel(1),
    "kernel-nf4-8": PackedKernel(8),
    "kernel-nf4-32": PackedKernel(32),
    "kernel-nf4-256": PackedKernel(256),
    "step-7b": Step(SHAPE, DTYPE, 2, 1024, full=False),
    "step-7b-8x1024": Step(SHAPE, DTYPE, 8, 1024, full=False),
    "memory-7b": Memory("peak", SHAPE, DTYPE, 2, 1024, full=False),
    "memory-7b-checkpointing": Memory(
        "peak", SHAPE, DTYPE, 2, 1024, checkpointing=True, full=False
    ),
    "nf4-step-7b": PackedStep(2, 1024),
    "decode-7b-1": Decode(DTYPE, 1, shape=SHAPE),
    "decode-7b-32": Decode(DTYPE, 32, shape=SHAPE),
    "prefill-7b": Prefill(DTYPE, 4, 512, shape=SHAPE),
    "nf4-decode-7b-1": PackedDecode(1),
    "nf4-decode-7b-8": PackedDecode(8),
    "routed-decode-7b": Routed(DTYPE, 32, 8, shape=SHAPE),
    "routed-forward-7b": Routed(DTYPE, 8, 8, tokens=256, shape=SHAPE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("gpu-output"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.quick:
        sys.exit("gpu.py: torch sees no GPU (--quick runs on a CPU)")
    bench = Bench(arguments.rounds, torch.device("cuda" if on_gpu else "cpu"), arguments.quick)
    names = arguments.figures or [
        name for name in FIGURES if on_gpu or not name.startswith("kernel")
    ]
    done: list[Figure] = []
    for name in names:
        try:
            found, document = measured(
                [name], bench, threads=torch.get_num_threads(), figures=FIGURES
            )
        except Exception as error:  # a figure that fails must not cost the others
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        done += found
        document["figures"] = [figure.as_dict() for figure in done]
        write(arguments.output, done, document)  # what was measured stays measured
        for row in table_rows(found):
            print(" | ".join(row))
        print("\n".join(notes(found, document)), flush=True)
    for key, verdict in TRIALS.verdicts.items():
        print(key, verdict.value)
    print("barred:", TRIALS.barred)


if __name__ == "__main__":
    main()
