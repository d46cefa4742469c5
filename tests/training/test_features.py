"""Feature-based transfer: the same training, with each row once through the frozen body.

Dimensions: B rows, T tokens, D features, N targets, V vocabulary or classes.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidepath.config import TrainConfig
from sidepath.data.dataset import Data, load_data
from sidepath.methods.plain import LinearProbe
from sidepath.store.plan import plan
from sidepath.training.feed import Feed, order_of
from sidepath.training.loop import train
from sidepath.training.measured import peak_bytes
from sidepath.training.report import StepReport
from tests.compare.kit import TinyBases
from tests.methods.architectures import ARCHITECTURES
from tests.training.frozen import (
    CONFIG,
    MODELS,
    ROWS_OF_PROOF,
    adapted,
    as_it_is,
    counting,
    labelled,
    learnt,
    pairs,
    run,
)
from tests.training.joined import in_processes
from tests.training.kit import bert, llama


@pytest.mark.parametrize("kind", MODELS)
def test_each_row_goes_through_the_body_once(kind: str, tokenizer: Any) -> None:
    make, rows = MODELS[kind]
    data = load_data(rows(), tokenizer)
    model = adapted(make())
    seen = counting(model)
    reports = run(model, data)
    assert sum(seen) == len(data) + ROWS_OF_PROOF
    vectors = sum(data.lengths) if kind == "llama" else len(data)  # BERT's head reads one a row
    (notice,) = reports[0].notices
    size = vectors * 16 * 4
    assert f"{size} B" in notice or f"{size / 1024:.1f} KiB" in notice
    assert not any(report.notices for report in reports[1:])


def of_heads(model: Any, features: dict[int, Tensor], data: Data) -> tuple[nn.Module, Any]:
    """A copy of the model's head, and its loss for some rows, of features alone."""
    own = model.lm_head if data.task == "causal" else model.classifier
    head = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None).double()
    head.load_state_dict(own.state_dict())

    def loss(row: int) -> Tensor:
        example = data.examples[row]
        if example.label is not None:
            return functional.cross_entropy(head(features[row]), torch.tensor(example.label))
        logits_TV = head(features[row])[:-1]
        wanted_T = torch.from_numpy(example.supervised_T)[1:]
        targets_N = torch.from_numpy(example.ids_T)[1:][wanted_T]
        return functional.cross_entropy(logits_TV[wanted_T], targets_N, reduction="sum")

    return head, loss


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_a_head_trained_in_plain_torch_on_features_of_single_rows(
    kind: str, tokenizer: Any
) -> None:
    make, rows = MODELS[kind]
    data, model = load_data(rows(), tokenizer), make().double()
    if kind == "bert":
        model.dropout.p = 0.0  # the head's own; that of the body (0.1) must not act
    features = {}
    with torch.no_grad():
        for row, example in enumerate(data.examples):
            output = model.base_model(torch.from_numpy(example.ids_T)[None])
            features[row] = output.pooler_output[0] if kind == "bert" else output[0][0]
    head, loss = of_heads(model, features, data)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0)
    feed = Feed(data, order_of(data, CONFIG), CONFIG.batch_size, CONFIG.seed)
    losses = []
    for step in range(order_of(data, CONFIG).steps_of(3)):
        batches = feed[step]
        weight = sum(batch.weight for batch in batches)
        total = torch.stack([loss(row) for batch in batches for row in batch.rows]).sum() / weight
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach()))
    reports = run(adapted(model), data)
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-9)
    expected = torch.cat([p.detach().flatten() for p in head.parameters()])
    torch.testing.assert_close(learnt(model), expected, rtol=0, atol=1e-8)


OTHERS = ("gpt2", "opt", "mixture", "roberta", "deberta-v2", "a decoder's scores")


@pytest.mark.parametrize("kind", [*MODELS, *OTHERS])
def test_kept_or_not_the_training_is_the_same(kind: str, tokenizer: Any) -> None:
    """With the dropout of heads, which draws the same numbers either way."""
    causal = kind in ("llama", "gpt2", "opt", "mixture")
    given = MODELS[kind][0] if kind in MODELS else None
    rows = pairs() if causal else labelled()
    exact = kind != "mixture"  # whose products of experts know no float64

    def make() -> Any:
        if given is not None:
            return given().double()
        if kind == "a decoder's scores":
            torch.manual_seed(0)
            return TinyBases().classifier(("0", "1"), data.pad_id)[0].double()
        model: Any = ARCHITECTURES[kind]()
        model.resize_token_embeddings(258, mean_resizing=False)
        return model.double() if exact else model

    found, passes = [], []
    for transform in (None, as_it_is):
        data = load_data(rows, tokenizer, transform=transform)
        model = adapted(make())
        before = [module.training for module in model.modules()]
        seen = counting(model)
        found.append(([report.loss for report in run(model, data)], learnt(model)))
        passes.append(sum(seen))
        assert [module.training for module in model.modules()] == before
    assert passes == [len(rows) + ROWS_OF_PROOF, 3 * len(rows)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9 if exact else 1e-5)
    atol = 1e-8 if exact else 1e-4
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=atol)


def swayed_by_its_batch() -> Any:
    """What rounding does to a row in company, made large: features change with the padding."""
    model = bert()
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, output: output * args[0].shape[1])
    return adapted(model)


def test_a_resumed_run_has_the_unbroken_runs_bits(tokenizer: Any, tmp_path: Path) -> None:
    """Also where a row's features depend on the rows it goes through the body with."""
    data = load_data(labelled(), tokenizer)
    config = TrainConfig(epochs=4, batch_size=3, checkpoint_every=1, eval_share=0.2, eval_every=2)

    def go(model: Any, folder: Path, stop: int = 99, resume: bool = False) -> list[StepReport]:
        steps, reports = train(model, data, config, checkpoints=folder, resume=resume), []
        for report in steps:
            reports.append(report)
            if report.number == stop:
                steps.close()
                break
        return reports

    whole = swayed_by_its_batch()
    expected = go(whole, tmp_path / "whole")
    for stop in (1, 5, 13):
        go(swayed_by_its_batch(), tmp_path / str(stop), stop)
        model = swayed_by_its_batch()
        after = go(model, tmp_path / str(stop), resume=True)
        assert [r.loss for r in after] == [r.loss for r in expected[stop:]]
        assert [r.held_out for r in after] == [r.held_out for r in expected[stop:]]
        assert torch.equal(learnt(model), learnt(whole))


def test_streamed_rows_under_autocast(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{"ab" * (at % 7)}{at}"}}\n' for at in range(22)))
    config = TrainConfig(epochs=2, batch_size=4, autocast="bfloat16", learning_rate=1e-3)
    kept = run(adapted(llama()), load_data(path, tokenizer, stream=True), config)
    again = run(adapted(llama()), load_data(path, tokenizer, transform=as_it_is), config)
    assert "once" in kept[0].notices[0]
    assert [r.loss for r in kept] == pytest.approx([r.loss for r in again], rel=1e-2)


def test_every_process_keeps_the_features_of_its_rows(tokenizer: Any, tmp_path: Path) -> None:
    data = load_data(pairs(), tokenizer)

    def work(_: Any) -> Any:
        model = adapted(llama().double())
        seen = counting(model)
        return [[report.loss for report in run(model, data)], sum(seen)]

    losses, passes = work(None)
    for found, own in in_processes(2, tmp_path / "meet", work):
        assert found == pytest.approx(losses, rel=1e-9)
        assert own <= passes


def mapped(folder: Path) -> int:
    """Files of a folder, named or not, that this process has in memory."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's mappings")
@pytest.mark.parametrize("ending", ["end", "break", "error"])
def test_the_files_go_with_the_run(
    ending: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps = train(adapted(llama()), load_data(pairs(), tokenizer), CONFIG)
    next(steps)
    assert mapped(tmp_path) == 1
    assert not list(tmp_path.iterdir()), "a killed run leaves nothing behind"
    assert steps.feature_seconds > 0
    if ending == "end":
        list(steps)
    elif ending == "break":
        steps.close()
    else:
        head: Any = steps.model.lm_head  # type: ignore[attr-defined]
        head.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("stop")))
        with pytest.raises(OSError, match="stop"):
            next(steps)
    assert mapped(tmp_path) == 0
    assert "forward" not in steps.model.base_model.__dict__  # type: ignore[operator]


def test_without_room_the_body_runs_in_each_step(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sidepath.training.columns._reserve", full)
    data, model = load_data(pairs(), tokenizer), adapted(llama())
    seen = counting(model)
    reports = run(model, data)
    assert "No space left on device" in reports[0].notices[0]
    assert sum(seen) == 3 * len(data) + ROWS_OF_PROOF


@pytest.mark.parametrize("kind", MODELS)
def test_the_plan_is_of_a_body_without_dropout_and_features_take_no_memory(
    kind: str, tokenizer: Any
) -> None:
    make, _ = MODELS[kind]
    rows: list[dict[str, Any]] = [{"text": "ab" * 60} for _ in range(15)] + [{"text": "a" * 40}]
    if kind == "bert":
        rows = [row | {"label": at % 2} for at, row in enumerate(rows)]
    data, model = load_data(rows, tokenizer), make()
    tokens = max(data.lengths)
    predicted = plan(model, LinearProbe(), batch_size=4, tokens=tokens).memory.total
    adapted(model)
    with peak_bytes(model) as peak:
        run(model, data, TrainConfig(epochs=2, batch_size=4))
    assert peak.bytes == pytest.approx(predicted, rel=0.15)
