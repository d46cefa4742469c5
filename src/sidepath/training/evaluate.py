"""Measuring a model on data: loss, accuracy, and what it generates from the prompts.

Dimensions: B rows, T tokens of the longest prompt of a batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidepath.data.dataset import Data
from sidepath.data.encode import Encoder, pad_id_of
from sidepath.errors import DataError, meant
from sidepath.training import metrics as scores
from sidepath.training.batching import Batch, by_length, collate
from sidepath.training.loss import loss_and_logits
from sidepath.training.processes import ALONE, Processes
from sidepath.training.trained import context_of, device_of, modes_kept, require_fit

GENERATED: dict[str, Callable[[Sequence[str], scores.References], float]] = {
    "exact_match": scores.exact_match,
    "bleu": scores.bleu,
    "rouge_l": scores.rouge_l,
}
"""Metrics that need generated text."""
CLASSES: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": scores.accuracy,
    "matthews": scores.matthews,
}
"""Metrics of predicted classes."""
CAUSAL = ("loss", "perplexity", *GENERATED)
CLASSIFY = ("loss", *CLASSES)
_LARGEST_EXPONENT = 700.0


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    tokenizer: Any = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Measure `model` (with its active adapter) on `data`; the model's mode is put back.

    Causal data: `loss` (nats a supervised token), `perplexity` = exp(loss) and, from greedy
    generation, `exact_match`, `bleu`, `rouge_l`. Rows with the same prompt count once there,
    with all their completions as references. Classification: `loss`, `accuracy`, `matthews`.
    `metrics=None` measures all that the data allow; `tokenizer` defaults to the data's. With
    `processes` (every one of which calls this) the rows are shared out, but for generation.

    Raises:
        DataError: a metric that these data do not have; rows too long for the model.
    """
    require_fit(model, data)
    wanted = _wanted(data, metrics)
    if data.task == "classify":
        loss, predicted, expected = _classified(model, data, batch_size, processes)
        return {
            name: loss if name == "loss" else CLASSES[name](predicted, expected) for name in wanted
        }
    result = {}
    if set(wanted) - set(GENERATED):
        result = measure(model, data, batch_size=batch_size, processes=processes)
    needed = [name for name in wanted if name in GENERATED]
    if needed:
        outputs, references = generated(
            model, data, tokenizer=tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        result |= {name: GENERATED[name](outputs, references) for name in needed}
    return {name: result[name] for name in wanted}


def _wanted(data: Data, metrics: Sequence[str] | None) -> list[str]:
    known = CLASSIFY if data.task == "classify" else CAUSAL
    if all(example.reference is None for example in data.examples):
        known = tuple(name for name in known if name not in GENERATED)
    if metrics is None:
        return list(known)
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise DataError(
            "these data have no such metric",
            where=data.name,
            found=", ".join(unknown),
            expected=", ".join(known),
            hint=meant(unknown[0], known),
        )
    return list(metrics)


def measure(
    model: nn.Module, data: Data, *, batch_size: int, processes: Processes = ALONE
) -> dict[str, float]:
    """Mean loss over all targets with `perplexity`, or with `accuracy` for classification.

    With several processes each takes a share of the batches; all get the same figures.
    """
    if data.task == "classify":
        loss, predicted, expected = _classified(model, data, batch_size, processes)
        return {"loss": loss, "accuracy": scores.accuracy(predicted, expected)}
    total, weight = 0.0, 0
    for loss, _, batch in _forward(model, data, batch_size, processes):
        total += loss
        weight += batch.weight
    total, weights = processes.total([total, weight])
    mean = total / weights
    return {"loss": mean, "perplexity": math.exp(min(mean, _LARGEST_EXPONENT))}


def _classified(
    model: nn.Module, data: Data, batch_size: int, processes: Processes = ALONE
) -> tuple[float, list[int], list[int]]:
    """Mean loss, predicted and expected class ids (in the order of the batches)."""
    total = 0.0
    predicted: list[int] = []
    expected: list[int] = []
    for loss, logits_BC, batch in _forward(model, data, batch_size, processes):
        total += loss
        predicted += logits_BC.argmax(dim=-1).tolist()
        expected += [label for row in batch.rows if (label := data.examples[row].label) is not None]
    predicted, expected = processes.all_of(predicted), processes.all_of(expected)
    return processes.total([total])[0] / len(expected), predicted, expected


def _forward(
    model: nn.Module, data: Data, batch_size: int, processes: Processes
) -> Iterator[tuple[float, Tensor, Batch]]:
    """Loss, logits and batch of this process's share of the rows."""
    device = device_of(model)
    batches = by_length(data.lengths, batch_size)
    mine = batches[processes.rank :: processes.count]
    # Where weights are sharded, all processes must run the model equally often.
    idle = batches[: -(-len(batches) // processes.count) - len(mine)]
    with modes_kept(model), torch.no_grad():
        model.eval()
        for number, rows in enumerate([*mine, *idle]):
            examples = [data.examples[row] for row in rows]
            batch = collate(examples, rows, data.pad_id).to(device)
            loss, logits = loss_and_logits(model, batch)
            if number < len(mine):
                yield float(loss), logits, batch


def generated(
    model: nn.Module,
    data: Data,
    *,
    tokenizer: Any = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
) -> tuple[list[str], list[list[str]]]:
    """Greedy output for each different prompt, and every reference the data hold for it."""
    references: dict[tuple[int, ...], list[str]] = {}
    for prompt, example in zip(data.prompts(), data.examples, strict=True):
        if example.reference is not None:
            references.setdefault(tuple(prompt), []).append(example.reference)
    outputs = generate(
        model,
        tokenizer if tokenizer is not None else data.tokenizer,
        [list(prompt) for prompt in references],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return outputs, list(references.values())


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What `model` (with its active adapter) writes after each prompt, prompt not included.

    Prompts are texts, tokenised as in training, or token ids. Greedy by default; with a
    `temperature` above 0 it samples, and `seed` gives the same texts again. Prompts are
    padded on the left, batched by length. The model's mode and the caller's random state are
    put back.

    Raises:
        DataError: prompts that leave no room for `max_new_tokens` in the model's context.
    """
    ids = _prompt_ids(tokenizer, prompts)
    _require_room(model, ids, max_new_tokens)
    device = device_of(model)
    outputs = [""] * len(ids)
    config = _generation_config(model, tokenizer, max_new_tokens, temperature)
    devices = [device] if device.type == "cuda" else []
    with modes_kept(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.eval()
        for rows in by_length([len(prompt) for prompt in ids], batch_size):
            new_BT = _continue(model, [ids[row] for row in rows], config, device)
            texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                outputs[row] = text
    return outputs


def _prompt_ids(
    tokenizer: Any, prompts: Sequence[str] | Sequence[Sequence[int]]
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) == len(prompts):
        ids = Encoder(tokenizer, int(tokenizer.model_max_length)).prompts(texts)
    else:
        ids = [[int(token) for token in prompt] for prompt in prompts]
    if any(not prompt for prompt in ids):
        raise DataError(
            "a prompt has no tokens, so there is nothing to go on from",
            where=f"prompt {next(at for at, prompt in enumerate(ids, 1) if not prompt)}",
        )
    return ids


def _require_room(model: nn.Module, ids: Sequence[Sequence[int]], new: int) -> None:
    context = context_of(model)
    long = [at for at, prompt in enumerate(ids, 1) if len(prompt) + new > context]
    if long:
        raise DataError(
            "prompts leave no room in the model's context",
            found=f"{len(long)} prompts, the first is number {long[0]}",
            expected=f"prompt + {new} new tokens <= {context:.0f}",
            hint="give shorter prompts or fewer new tokens",
        )


def _generation_config(model: Any, tokenizer: Any, new: int, temperature: float) -> Any:
    from transformers import GenerationConfig

    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=new,
        do_sample=temperature > 0,
        num_beams=1,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=pad_id_of(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        **sampling,
    )


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a text: the tokenizer's, and those the model's own settings name."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def _continue(
    model: Any, prompts: Sequence[Sequence[int]], config: Any, device: torch.device
) -> Tensor:
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[config.pad_token_id] * (longest - len(p)) + list(p) for p in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with _own_generation_config(model, config):
        full_BT: Tensor = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=config,
        )
    return full_BT[:, longest:]


@contextlib.contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    """Nothing of the model's own sampling settings is mixed into a greedy run, and no warning."""
    kept, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = kept
