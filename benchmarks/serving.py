"""The engine beside transformers' own ways, on prompts of many lengths, and over many adapters.

    python benchmarks/serving.py [--figures mixed many zipf decode cold] [--rounds 3] [--skip-peer]

A random Llama of 29M parameters. First figure: 8 prompts of 40 to 300 tokens, 24 new tokens each,
on the base: padded `generate`, transformers' continuous batching (`generate_batch`), the engine.
Second figure: 32 requests of 32 + 16 tokens, each over an adapter of its own (LoRA r=8, all linear
layers), against the same on the base, the engine's and transformers'. Third: 160 requests over
1,000 adapters (r=8, queries and values) of Zipf popularity, of which 16 have room on the model and
the rest come from host memory or, in a second engine, from disk; against as many requests over 16
adapters. Fourth: one decoding step of 12 rows at 400 tokens of context, against transformers' own
with its DynamicCache. Fifth: the time to the first token of an adapter that is on disk, against
one on the model, and against reading its file. With one thread a second is a second of CPU.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, machine, markdown, ratios, show

Prompts = Sequence[tuple[int, ...]]
VOCABULARY = 12_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figures", nargs="+", default=list(FIGURES), choices=list(FIGURES))
    parser.add_argument("--skip-peer", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = [FIGURES[name](options) for name in options.figures]
    cells = [
        [
            figure["name"],
            way,
            f"{figure['tokens_per_second'][way]:,.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f}",
            f"{ratio['max']:.2f}",
        ]
        for figure in figures
        for way, ratio in figure["ratio"].items()
    ]
    head = ["figure", "way", "new tokens/s", "engine's over it", "min", "max"]
    show({"machine": machine(), "figures": figures}, machine(), markdown(head, cells))


def llama() -> Any:
    """The same random base at each call; no token ends an answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def prompts_of(lengths: Sequence[int]) -> Prompts:
    rng = random.Random(0)
    return [tuple(rng.randrange(3, VOCABULARY) for _ in range(length)) for length in lengths]


def engine_way(engine: Any, prompts: Prompts, names: Sequence[str | None], new: int) -> Any:
    """Answers all prompts; returns their tokens."""
    from sidepath.serve.requests import Request

    def way() -> list[tuple[int, ...]]:
        asked = [
            engine.submit(Request(prompt, name, new))
            for prompt, name in zip(prompts, names, strict=True)
        ]
        while engine.step():
            pass
        return [handle.result().tokens for handle in asked]

    return way


def mixed_lengths(options: argparse.Namespace) -> dict[str, Any]:
    """Prompts of 40 to 300 tokens on the base."""
    from sidepath.serve.engine import Engine
    from sidepath.serve.scheduler import Limits

    new, lengths = 24, [40, 77, 114, 151, 188, 225, 262, 300]
    prompts, model, own = prompts_of(lengths), llama(), llama()
    # Without prefixes: the rounds ask the same prompts again.
    engines = [
        Engine(own, limits=Limits(rows=8, context=512, step_tokens=tokens, prefixes=0))
        for tokens in (512, 2048)
    ]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": new, "do_sample": False}

    def padded() -> list[tuple[int, ...]]:
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **settings)
        return [tuple(row) for row in out[:, longest:].tolist()]

    ours, at_once = (engine_way(each, prompts, [None] * len(prompts), new) for each in engines)
    assert ours() == padded(), "greedy tokens are those of generate"
    ways: dict[str, Callable[[], object]] = {
        "padded generate": padded,
        "engine": ours,
        "engine, all prompts in one step": at_once,
    }
    with ExitStack() as stack:
        if not options.skip_peer:
            theirs = ways["continuous batching"] = stack.enter_context(peer(prompts, new))
            assert theirs() == padded()
        name = "8 prompts of 40..300 tokens, 24 new"
        return figure(name, ways, options.rounds, len(prompts) * new)


@contextmanager
def peer(prompts: Prompts, new: int) -> Iterator[Callable[[], list[tuple[int, ...]]]]:
    """Continuous batching of transformers, one manager kept alive over all rounds, on a model of
    its own: it changes the attention. Blocks are not shared, as ours are not: the rounds ask the
    same prompts again.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = llama()
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    longest = max(map(len, prompts)) + new
    settings = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=len(prompts) * -(-longest // 32),
        max_batch_tokens=512,
        allow_block_sharing=False,
    )
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=settings
    ) as manager:

        def way() -> list[tuple[int, ...]]:
            asked = manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=new)
            found = {}
            while len(found) < len(asked):
                result = manager.get_result(timeout=60)
                assert result is not None
                assert not result.error, result.error
                if result.is_finished():
                    found[result.request_id] = tuple(result.generated_tokens)
            return [found[request] for request in asked]

        yield way


def many_adapters(options: argparse.Namespace) -> dict[str, Any]:
    """As many requests as adapters, each over its own, against the base."""
    count, new = 32, 16
    engine = engine_with(count, ("all-linear",), slots=count, rows=count)
    prompts = prompts_of([32] * count)
    names = [f"a{number}" for number in range(count)]
    ways: dict[str, Callable[[], object]] = {
        "base": engine_way(engine, prompts, [None] * count, new),
        "engine": engine_way(engine, prompts, names, new),
    }
    with ExitStack() as stack:
        if not options.skip_peer:
            theirs = stack.enter_context(peer(prompts, new))
            ways["base, continuous batching"] = theirs
        name = f"{count} requests over {count} adapters"
        return figure(name, ways, options.rounds, count * new)


def zipf(options: argparse.Namespace) -> dict[str, Any]:
    """Many adapters that are asked for unequally, of which few have room on the model."""
    count, slots, requests, new = 1000, 16, 160, 8
    prompts = prompts_of([24] * requests)
    rng = random.Random(1)
    weights = [1 / (place + 1) for place in range(count)]
    many = rng.choices([f"a{number}" for number in range(count)], weights, k=requests)
    few = rng.choices([f"a{number}" for number in range(slots)], weights[:slots], k=requests)
    with tempfile.TemporaryDirectory() as folder:
        places = copies(Path(folder), count, slots)
        size = (places[0] / "adapter_model.safetensors").stat().st_size
        engines = [engine_over(places, slots, slots * size, host) for host in (2**30, 0)]
        ways = {
            f"{slots} adapters": engine_way(engine_over(places[:slots], slots), prompts, few, new),
            "engine": engine_way(engines[0], prompts, many, new),
            "engine, no host memory": engine_way(engines[1], prompts, many, new),
        }
        asked = len(set(many))
        name = f"{requests} requests over {count} adapters ({asked} asked for), {slots} resident"
        found = figure(name, ways, options.rounds, requests * new)
        found["tiers"] = [
            {"loads": each.loads, "reads": each.reads, "evictions": each.evictions}
            for each in (engine.adapters.tiers for engine in engines)
        ]
    return found


def copies(folder: Path, count: int, different: int) -> list[Path]:
    """So many adapters' folders, of which so many are different."""
    import sidepath

    source = llama()
    for number in range(different):
        config = sidepath.LoRA(r=8, targets=("q_proj", "v_proj"))
        adapter = sidepath.inject(source, config, name="new")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        adapter.save(folder / f"a{number}")
        sidepath.remove(source, "new")
    for number in range(different, count):
        shutil.copytree(folder / f"a{number % different}", folder / f"a{number}")
    return [folder / f"a{number}" for number in range(count)]


def engine_over(places: list[Path], slots: int, resident: int = 2**40, host: int = 0) -> Any:
    """An engine that knows adapters by their folders, and keeps so many bytes of them."""
    from sidepath.serve.engine import Engine
    from sidepath.serve.scheduler import Limits
    from sidepath.serve.tiers import Memory

    limits = Limits(rows=slots, slots=slots, context=64, step_tokens=32 * slots, prefixes=0)
    engine = Engine(llama(), limits=limits, memory=Memory(resident, host))
    for place in places:
        engine.adapters.register(place.name, place)
    return engine


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """One decoding step of rows that have a context already."""
    from transformers import DynamicCache

    from sidepath.core.laid_out import lay_out
    from sidepath.serve.runner import Piece, Runner

    rows, context = 12, 400
    model, own = llama(), llama()
    prompts = [list(prompt) for prompt in prompts_of([context] * rows)]
    lay_out(own)  # as the engine does
    runner = Runner(own, rows, 512)
    for row, prompt in enumerate(prompts):
        runner.cache.claim(row)
        runner.logits([Piece(row, None, 0, tuple(prompt))])
    pieces = [Piece(row, None, context - row % 2, (5,)) for row in range(rows)]

    def transformers(padded: bool) -> Callable[[], object]:
        cache = DynamicCache(config=model.config)
        step: dict[str, Any] = {"input_ids": torch.full((rows, 1), 5), "past_key_values": cache}
        if padded:  # every other row is one token shorter, as the engine's are
            mask = torch.ones(rows, context + 1, dtype=torch.long)
            mask[1::2, 0] = 0
            step |= {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        with torch.no_grad():
            model(input_ids=torch.tensor(prompts), past_key_values=cache)

        @torch.no_grad()
        def way() -> None:
            model(**step, use_cache=True, logits_to_keep=1)
            cache.crop(-1)

        return way

    ways: dict[str, Callable[[], object]] = {
        "transformers, equal rows": transformers(padded=False),
        "transformers, padded rows": transformers(padded=True),
        "engine": lambda: runner.logits(pieces),
    }
    return figure(f"a step of {rows} rows at {context} tokens", ways, options.rounds * 10, rows)


def cold(options: argparse.Namespace) -> dict[str, Any]:
    """The first token of an adapter on disk, of one on the model, and the file read."""
    with tempfile.TemporaryDirectory() as folder:
        places = copies(Path(folder), 24, 24)
        size = (places[0] / "adapter_model.safetensors").stat().st_size
        engine = engine_over(places, 4, 4 * size)
        turn = iter(range(10**9))

        def first(name: str) -> None:
            from sidepath.serve.requests import Request

            engine.submit(Request(tuple(range(3, 27)), name, 1)).result()

        def another() -> None:
            first(f"a{1 + next(turn) % 23}")

        with engine:
            first("a0")
            engine.adapters.pin("a0")
            ways = {
                "resident": lambda: first("a0"),
                "reading the file": lambda: (places[5] / "adapter_model.safetensors").read_bytes(),
                "engine": another,
            }
            found = figure("first token of an adapter on disk", ways, options.rounds * 10, 1)
            found["reads"] = engine.adapters.tiers.reads
    return found


def engine_with(count: int, targets: tuple[str, ...], *, slots: int, rows: int) -> Any:
    """An engine with so many adapters, loaded from their folders."""
    import sidepath
    from sidepath.serve.engine import Engine
    from sidepath.serve.scheduler import Limits

    source = llama()
    limits = Limits(rows=rows, slots=slots, context=64, step_tokens=32 * rows, prefixes=0)
    engine = Engine(llama(), limits=limits)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            adapter = sidepath.inject(source, sidepath.LoRA(r=8, targets=targets), name="new")
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            place = adapter.save(Path(folder) / f"a{number}")
            engine.adapters.load(f"a{number}", place)
            sidepath.remove(source, "new")
            shutil.rmtree(place)
    return engine


def figure(
    name: str, ways: dict[str, Callable[[], object]], rounds: int, tokens: int
) -> dict[str, Any]:
    """Seconds of each way in turn; a ratio above 1 says that the engine is faster."""
    seconds = interleaved(ways, rounds=rounds, warmup=1)
    return {
        "name": name,
        "tokens_per_second": {way: tokens / statistics.median(s) for way, s in seconds.items()},
        "ratio": {way: ratios(s, seconds["engine"]) for way, s in seconds.items()},
    }


FIGURES = {
    "mixed": mixed_lengths,
    "many": many_adapters,
    "zipf": zipf,
    "decode": decode,
    "cold": cold,
}

if __name__ == "__main__":
    main()
