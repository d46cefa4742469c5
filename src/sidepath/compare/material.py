"""The rows of a comparison: for training, for judging learning rates, and for the test."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from sidepath.compare.setting import Setting
from sidepath.data.dataset import Data, load_data
from sidepath.errors import ConfigError, DataError, meant
from sidepath.training.evaluate import CAUSAL, CLASSIFY
from sidepath.training.metrics import LOWER_IS_BETTER

DEMO = "demo:"
"""Before the name of one of the demo's tasks, whose rows are made, not read."""
DEMO_METRICS = {"accuracy": "exact_match"}
"""A demo task's metric, by the name of what measures it in generated text."""
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Material:
    """What trials train on and are judged on."""

    train: Data
    """All training rows."""
    fit: Data
    """The training rows without those of validation."""
    validation: Data
    test: Data
    metric: str

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the metric is a better one."""
        return self.metric not in LOWER_IS_BETTER

    def identity(self) -> dict[str, Any]:
        """Digests of the rows, and the metric."""
        parts = {"train": self.train, "fit": self.fit, "validation": self.validation}
        digests = {name: data.digest for name, data in parts.items()}
        return {**digests, "test": self.test.digest, "metric": self.metric}


@functools.lru_cache(maxsize=1)
def material_of(setting: Setting) -> Material:
    """The rows of a setting; those of the last setting are kept in this process.

    Raises:
        ConfigError: no test rows are named; no such demo task; the data have no such metric.
        DataError: what is wrong with the rows.
    """
    train, test, own = _demo(setting) if setting.data.startswith(DEMO) else _files(setting)
    fit, validation = train.split(setting.validation, seed=SPLIT_SEED)
    train.require_trainable()
    return Material(train, fit, validation, test, _metric(setting.metric or own, train, test))


def _options(setting: Setting) -> dict[str, Any]:
    limit = min(setting.max_tokens, setting.bases.context() or setting.max_tokens)
    return {"tokenizer": setting.bases.tokenizer(), "max_tokens": limit}


def _demo(setting: Setting) -> tuple[Data, Data, str]:
    from sidepath.demo.tasks import make_tasks

    tasks = {task.name: task for task in make_tasks()}
    name = setting.data.removeprefix(DEMO)
    if name not in tasks:
        raise ConfigError(
            f'the demo has no task "{name}"',
            expected=", ".join(DEMO + known for known in tasks),
            hint=meant(name, tasks),
        )
    task, options = tasks[name], _options(setting)
    train = load_data(task.train, limit=setting.limit, **options)
    if setting.eval_data is None:
        test = load_data(task.test, limit=setting.eval_limit, **options)
    else:
        test = _test_of_file(setting, train, options)
    return train, test, DEMO_METRICS.get(task.metric, task.metric)


def _files(setting: Setting) -> tuple[Data, Data, str]:
    if setting.eval_data is None:
        raise ConfigError(
            "the data have no test rows of their own",
            where=setting.data,
            expected="eval_data: rows that no trial trains on and no learning rate is chosen by",
        )
    options = _options(setting)
    columns = dict(setting.columns) or None
    train = load_data(setting.data, limit=setting.limit, columns=columns, **options)
    own = "accuracy" if train.task == "classify" else "loss"
    return train, _test_of_file(setting, train, options), own


def _test_of_file(setting: Setting, train: Data, options: dict[str, Any]) -> Data:
    assert setting.eval_data is not None
    return load_data(
        setting.eval_data,
        limit=setting.eval_limit,
        columns=dict(setting.columns) or None,
        task=train.task,
        labels=train.labels or None,
        **options,
    )


def _metric(name: str, train: Data, test: Data) -> str:
    known = CLASSIFY if train.task == "classify" else CAUSAL
    if name in known:
        return name
    raise DataError(
        "these data have no such metric",
        where=test.name,
        found=name,
        expected=", ".join(known),
        hint=meant(name, known),
    )
