"""`sidepath serve` beside llama.cpp's own server, over HTTP, on the same base and adapters.

    python benchmarks/llama_cpp.py --server PATH/TO/llama-server [--rounds 5] [--threads 1]

The random Llama of 29M parameters of `benchmarks/serving.py`, as a transformers folder and as GGUF,
both in float32 with keys and values in float32. Two figures, greedy, new tokens for each second of
the server's own CPU time (its process, whoever else is on the machine): 8 requests of 40 to 300
tokens for 24 more on the base, and 32 requests of 32 + 16 tokens over 32 adapters (LoRA r=8, all
linear layers), which `sidepath convert --to gguf` wrote for llama.cpp. All requests of a figure are
sent at once; prompts are tokens, and no prompt is kept between rounds. Both answers are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine, markdown, show
from benchmarks.serving import VOCABULARY, llama, prompts_of

ADAPTERS, BASE = 32, "base"
ROWS = 32


@dataclass(frozen=True)
class Asked:
    """One request: its prompt, how many new tokens, and over which adapter (-1: the base)."""

    prompt: tuple[int, ...]
    new: int
    adapter: int = -1


@dataclass
class Server:
    """A server in a process of its own, and how it is asked."""

    process: subprocess.Popen[bytes]
    port: int
    route: str
    body: Callable[[Asked], dict[str, Any]]
    tokens: Callable[[dict[str, Any]], list[int]]

    def answer(self, asked: Asked) -> list[int]:
        document = self.post(self.route, self.body(asked))
        return self.tokens(document)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            document: dict[str, Any] = json.load(reply)
        return document

    def cpu_seconds(self) -> float:
        """What its process has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--server", required=True, help="llama.cpp's llama-server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    lengths = [40, 77, 114, 151, 188, 225, 262, 300]
    figures = {
        "8 prompts of 40..300 tokens, 24 new": [Asked(p, 24) for p in prompts_of(lengths)],
        f"{ADAPTERS} requests over as many adapters": [
            Asked(p, 16, number) for number, p in enumerate(prompts_of([32] * ADAPTERS))
        ],
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        adapters = write_all(folder)
        with (
            ours(folder, options.threads) as own,
            theirs(folder, adapters, options) as other,
        ):
            ways = {"sidepath serve": own, "llama-server": other}
            found = {name: compared(asked, ways, options.rounds) for name, asked in figures.items()}
    cells = [
        [name, way, f"{rate:,.1f}", *(f"{value:.2f}" for value in figure["ratio"]), figure["equal"]]
        for name, figure in found.items()
        for way, rate in figure["rates"].items()
    ]
    head = [
        "figure",
        "server",
        "new tokens a CPU second",
        "ours over theirs",
        "min",
        "max",
        "equal",
    ]
    show({"machine": machine(), "figures": found}, machine(), markdown(head, cells))


def compared(asked: Sequence[Asked], ways: dict[str, Server], rounds: int) -> dict[str, Any]:
    """New tokens a CPU second of both, in turn, and how many answers are the same."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    with ThreadPoolExecutor(len(asked)) as pool:
        for number in range(rounds + 1):
            for name, server in ways.items():
                before = server.cpu_seconds()
                answers[name] = list(pool.map(server.answer, asked))
                used = server.cpu_seconds() - before
                if number:  # the first warms up
                    rates[name].append(sum(each.new for each in asked) / used)
    own, other = rates.values()
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    return {
        "rates": {name: statistics.median(each) for name, each in rates.items()},
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "equal": f"{same} of {len(asked)}",
    }


def write_all(folder: Path) -> list[Path]:
    """The base and the adapters in both forms; returns the adapters' GGUF files."""
    import sidepath
    from sidepath.convert.formats import convert
    from sidepath.convert.portable import Base, Options

    base = llama()
    base.save_pretrained(folder / BASE)
    tokenizer().save_pretrained(folder / BASE)
    write_base(base, folder / "base.gguf")
    for number in range(ADAPTERS):
        adapter = sidepath.inject(base, sidepath.LoRA(r=8, targets=("all-linear",)), name="new")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        own = adapter.save(folder / "adapters" / f"a{number}")
        sidepath.remove(base, "new")
        convert(own, folder / f"a{number}.gguf", "gguf", options=Options(Base(base)))
    return [folder / f"a{number}.gguf" for number in range(ADAPTERS)]


def tokenizer() -> Any:
    """A token a word, `w0` to the last."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="w1", pad_token="w0")


def write_base(model: Any, path: Path) -> None:
    """A transformers Llama as llama.cpp reads it, in float32."""
    import gguf

    from sidepath.convert.gguf_names import Heads

    config = model.config
    heads = Heads(config.num_attention_heads, config.num_key_value_heads)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.query)
    writer.add_head_count_kv(heads.key)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads.query)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{number}" for number in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        known = names.get_name(name, try_suffixes=(".weight",))
        count = heads.of(known)
        writer.add_tensor(known, (tensor if count is None else turned(tensor, count)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def turned(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """A matrix's rows with each head's halves as neighbouring pairs."""
    rows, columns = matrix.shape
    return matrix.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@contextmanager
def ours(folder: Path, threads: int) -> Iterator[Server]:
    """`sidepath serve`, asked as OpenAI's clients ask."""
    port = free_port()
    flags = (
        f"--base {folder / BASE} --name {BASE} --adapters {folder / 'adapters'} --port {port}"
        f" --rows {ROWS} --slots {ADAPTERS} --context 512 --step-tokens 512 --prefixes 0"
    )
    command = [sys.executable, "-m", "sidepath", "serve", *flags.split()]
    with running(command, port, threads) as process:

        def body(asked: Asked) -> dict[str, Any]:
            name = BASE if asked.adapter < 0 else f"a{asked.adapter}"
            told = {"model": name, "prompt": list(asked.prompt)}
            return {**told, "max_tokens": asked.new, "temperature": 0}

        def tokens(document: dict[str, Any]) -> list[int]:
            text: str = document["choices"][0]["text"]
            return [int(word) for word in re.findall(r"w(\d+)", text)]

        yield Server(process, port, "/v1/completions", body, tokens)


@contextmanager
def theirs(folder: Path, adapters: Sequence[Path], options: argparse.Namespace) -> Iterator[Server]:
    """llama.cpp's, with as many places as rows; an adapter of a request is one of its list."""
    port, threads = free_port(), str(options.threads)
    command = [
        options.server, "-m", str(folder / "base.gguf"), "--port", str(port), "--no-webui",
        "-t", threads, "-tb", threads, "-np", str(ROWS), "-c", str(ROWS * 512), "-ctk", "f32",
        "-ctv", "f32", "--lora-init-without-apply", "--no-cache-prompt", "--cache-ram", "0",
        "--lora", ",".join(map(str, adapters)),
    ]  # fmt: skip
    with running(command, port, options.threads) as process:

        def body(asked: Asked) -> dict[str, Any]:
            told = {"prompt": list(asked.prompt), "n_predict": asked.new, "temperature": 0}
            told |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
            return told | {
                "lora": [{"id": max(asked.adapter, 0), "scale": float(asked.adapter >= 0)}]
            }

        yield Server(process, port, "/completion", body, lambda document: document["tokens"])


@contextmanager
def running(command: list[str], port: int, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process, from when it listens until it is told to end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
        try:
            wait_for(process, port, told)
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(process: subprocess.Popen[bytes], port: int, told: Any) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        for route in ("/readyz", "/health"):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{route}", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
    told.seek(0)
    sys.exit(f"the server did not start: {told.read().decode()[-3000:]}")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
