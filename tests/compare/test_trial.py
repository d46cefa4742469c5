"""A real trial on a tiny base: the same again, nothing kept, test rows apart."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
from torch import nn

from sidepath.compare import trial as trials
from sidepath.compare.material import material_of
from sidepath.compare.setting import Trial, code_version
from sidepath.compare.trial import facts_of, fresh, run_trial
from sidepath.compare.workers import Workers
from sidepath.config import TrainConfig
from sidepath.data.dataset import Data
from sidepath.errors import ConfigError, DataError, MissingExtra
from sidepath.store.plan import plan
from sidepath.training.loop import train

from .kit import TinyBases, entrants, setting

TIMES = "seconds"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != TIMES}


def test_a_trial_follows_from_its_seed() -> None:
    lora = entrants()[0]
    results = [run_trial(setting(), Trial(lora, 1e-2, seed, "final")) for seed in (0, 0, 1)]
    assert figures(results[0]) == figures(results[1])
    assert results[0]["value"] != results[2]["value"]
    assert results[0]["steps"] == 2
    assert results[0]["seconds"] > 0
    planned = plan(TinyBases().causal(), lora.config)
    assert results[0]["trainable"] == planned.trainable
    assert results[0]["bytes"] == planned.adapter_bytes
    assert results[0]["peak_memory_bytes"] > planned.memory.weights


def test_a_probes_seconds_hold_what_its_features_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made early in the run, they are not in the median step's time, which is left out here."""
    runs: list[Any] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        runs.append(train(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(trials, "train", watched)
    monkeypatch.setattr("statistics.median", lambda _: 0.0)
    thrice = setting(train=TrainConfig(epochs=3, batch_size=4))
    found = [run_trial(thrice, Trial(one, 1e-2, 0, "sweep")) for one in entrants()]
    lora, probe = (run.feature_seconds for run in runs)
    assert lora == found[0]["seconds"] == 0
    assert probe == found[1]["seconds"] > 0


@pytest.mark.slow  # two fresh processes import torch
def test_workers_find_what_one_process_finds() -> None:
    given = [Trial(one, 1e-2, 0, "sweep") for one in entrants()]
    alone = {one.key: figures(found) for one, found in Workers(1).results(setting(), given)}
    apart = {one.key: figures(found) for one, found in Workers(2).results(setting(), given)}
    assert alone.keys() == apart.keys()
    for key, found in alone.items():
        assert apart[key].pop("peak_memory_bytes") is found.pop("peak_memory_bytes") is None
        assert apart[key] == pytest.approx(found, rel=1e-4)


def test_a_long_table_keeps_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Module]] = []

    def remembered(*arguments: Any) -> Any:
        adapter = fresh(*arguments)
        made.append(weakref.ref(adapter.model))
        return adapter

    monkeypatch.setattr(trials, "fresh", remembered)
    for seed in range(3):
        run_trial(setting(), Trial(entrants()[0], 1e-2, seed, "sweep"))
        assert [ref() for ref in made] == [None] * (seed + 1)
    gc.collect()


def test_validation_rows_come_from_training_and_test_rows_from_elsewhere() -> None:
    found = material_of(setting())
    assert (len(found.train), len(found.test)) == (40, 6)
    assert len(found.fit) + len(found.validation) == 40
    rows = {
        name: {e.ids_T.tobytes() for e in vars(found)[name].examples}
        for name in vars(found)
        if name != "metric"
    }
    assert not rows["fit"] & rows["validation"]
    assert rows["fit"] | rows["validation"] == rows["train"]
    assert not rows["test"] & rows["train"]


def test_sweep_trials_are_judged_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Data] = []
    material = material_of(setting())

    def judged(model: nn.Module, rows: Any, **options: Any) -> dict[str, float]:
        seen.append(rows)
        return {"loss": 1.0}

    monkeypatch.setattr(trials, "evaluate", judged)
    for phase in ("sweep", "final"):
        run_trial(setting(), Trial(entrants()[0], 1e-2, 0, phase))
    assert seen == [material.validation, material.test]


def test_what_cannot_be_trained_says_why() -> None:
    found = run_trial(setting(), Trial(entrants({"name": "bitfit"})[0], 1e-2, 0, "sweep"))
    assert "no bias to train" in found["failed"]
    burst = run_trial(setting(), Trial(entrants({"name": "full"})[0], 1e30, 0, "sweep"))
    assert "not finite" in burst["failed"]


@pytest.mark.parametrize("name", ["loss", "exact_match"])
def test_figures_that_are_no_numbers_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A NaN in a sweep is neither less nor more than another rate's value."""
    found = {"loss": 1.0, "exact_match": 0.5} | {name: math.nan}
    monkeypatch.setattr(trials, "evaluate", lambda *_, **__: found)
    trial = Trial(entrants()[0], 1e-2, 0, "sweep")
    assert "nan" in run_trial(setting(metric="exact_match"), trial)["failed"]


def test_what_is_not_installed_is_not_remembered_as_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacking(*_: Any, **__: Any) -> dict[str, float]:
        raise MissingExtra("needs what is not there")

    monkeypatch.setattr(trials, "evaluate", lacking)
    with pytest.raises(MissingExtra):
        run_trial(setting(), Trial(entrants()[0], 1e-2, 0, "sweep"))


def test_labelled_rows_get_a_head_that_is_trained(tmp_path: Any) -> None:
    path = tmp_path / "rows.tsv"
    rows = [f"{word} film {at}\t{at % 2}" for at, word in enumerate(["bad", "good"] * 10)]
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    given = setting(
        data=str(path), eval_data=str(path), metric=None, columns=(("text", "sentence"),)
    )
    assert material_of(given).metric == "accuracy"
    lora, probe = entrants()
    assert facts_of(fresh(given, probe, 0))["trainable"] == 2 * 16
    assert facts_of(fresh(given, lora, 0))["trainable"] > 2 * 16
    found = run_trial(given, Trial(probe, 1e-2, 0, "final"))
    assert 0 <= found["value"] <= 1


def test_wrong_data_are_named() -> None:
    with pytest.raises(ConfigError, match='did you mean "sentiment"'):
        material_of(setting(data="demo:sentimant"))
    with pytest.raises(ConfigError, match="no test rows"):
        material_of(setting(data="rows.jsonl"))
    with pytest.raises(DataError, match='did you mean "loss"'):
        material_of(setting(metric="los"))


def test_ray_is_an_extra() -> None:
    pytest.importorskip("sidepath")
    try:
        import ray  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        given = [Trial(entrants()[0], 1e-2, 0, "sweep")]
        with pytest.raises(MissingExtra, match=r"sidepath\[scale\]"):
            list(Workers(2, "ray").results(setting(), given))
    else:
        pytest.skip("Ray is installed")


def test_the_code_is_named_once() -> None:
    assert code_version() == code_version()
    assert "torch" in code_version()
