"""The comparison: each entrant's learning rates on validation rows, then its seeds on test rows.

Every entrant tries equally many learning rates on one seed, judged on rows split off the training
data; its best one then runs all seeds, judged on the test rows, which no choice has seen.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from sidepath.compare.entrants import Entrant
from sidepath.compare.material import Material, material_of
from sidepath.compare.runs import RunTable
from sidepath.compare.setting import Setting, Trial, digest_of
from sidepath.compare.trial import facts_of, fresh
from sidepath.compare.workers import Workers
from sidepath.errors import SidepathError, TrainError, in_one_line

Advance = Callable[..., None]
Progress = Callable[[str], AbstractContextManager[Advance]]
Result = Mapping[str, Any]


@dataclass
class Standing:
    """One entrant, and what is known of it."""

    entrant: Entrant
    facts: dict[str, int] = field(default_factory=dict)
    """Trained parameters and bytes, as counted on the base."""
    sweep: dict[float, Result] = field(default_factory=dict)
    """By learning rate; empty when there was only one to try."""
    learning_rate: float | None = None
    finals: dict[int, Result] = field(default_factory=dict)
    """By seed."""
    reason: str | None = None
    """Why it does not take part, or no longer."""

    @property
    def values(self) -> dict[int, float]:
        """The metric on the test rows, by seed, of the trials that did not fail."""
        return {seed: one["value"] for seed, one in self.finals.items() if "failed" not in one}


@dataclass(frozen=True)
class Contest:
    """Everything that one comparison needs to be carried out."""

    setting: Setting
    entrants: Sequence[Entrant]
    table: RunTable
    workers: Workers
    progress: Progress
    say: Callable[[str], None]

    def run(self) -> list[Standing]:
        """Carry out every trial that is not in the run table.

        An entrant that cannot adapt this base, or fails in every trial, is reported as such.
        Raises: `TrainError` when that is so of all of them; whatever the data's checks raise.
        """
        standings = self.tried()
        self._require_some(standings)
        return standings

    def tried(self) -> list[Standing]:
        """As `run`; that no entrant can be trained is no error."""
        material = material_of(self.setting)
        standings = [self._admitted(entrant) for entrant in self.entrants]
        self._sweep([one for one in standings if one.reason is None], material)
        self._finals([one for one in standings if one.reason is None], material)
        return standings

    def admitted(self) -> list[Standing]:
        """The entrants, with the reason where this base cannot be adapted so; nothing is trained.

        Raises: `TrainError` when none can.
        """
        standings = [self._admitted(entrant) for entrant in self.entrants]
        self._require_some(standings)
        return standings

    def _admitted(self, entrant: Entrant) -> Standing:
        """Whether the base can be adapted so is found before any trial."""
        standing = Standing(entrant)
        try:
            standing.facts = facts_of(fresh(self.setting, entrant, self.setting.seeds[0]))
        except SidepathError as error:
            standing.reason = str(error)
            self.say(f"{entrant.label} cannot adapt this base: {error.what}")
        gc.collect()  # the base that was tried on is one big cycle
        return standing

    def _sweep(self, standings: Sequence[Standing], material: Material) -> None:
        seed = self.setting.seeds[0]
        trials = [
            Trial(standing.entrant, rate, seed, "sweep")
            for standing in standings
            for rate in standing.entrant.learning_rates
            if len(standing.entrant.learning_rates) > 1
        ]
        found = self._results("learning rates", trials, material)
        for standing in standings:
            rates = standing.entrant.learning_rates
            if len(rates) == 1:
                standing.learning_rate = rates[0]
                continue
            label = standing.entrant.label
            standing.sweep = {rate: found[label, rate, seed] for rate in rates}
            standing.learning_rate = best_rate(standing.sweep, material.higher_is_better)
            if standing.learning_rate is None:
                standing.reason = next(iter(standing.sweep.values()))["failed"]
                self.say(f"{label} failed at every learning rate: {standing.reason}")

    def _finals(self, standings: Sequence[Standing], material: Material) -> None:
        trials = [
            Trial(standing.entrant, standing.learning_rate, seed, "final")
            for seed in self.setting.seeds
            for standing in standings
            if standing.learning_rate is not None
        ]
        found = self._results("seeds", trials, material)
        for standing in standings:
            label, rate = standing.entrant.label, standing.learning_rate
            assert rate is not None
            standing.finals = {seed: found[label, rate, seed] for seed in self.setting.seeds}
            if not standing.values:
                standing.reason = next(iter(standing.finals.values()))["failed"]

    def _results(
        self, what: str, trials: Sequence[Trial], material: Material
    ) -> dict[tuple[str, float, int], Result]:
        """The trials' results, from the run table or carried out, each recorded at once."""
        if not trials:
            return {}
        data, base = material.identity(), self.setting.bases.identity()
        known: dict[str, Result] = {}
        waiting: dict[str, tuple[Trial, dict[str, Any]]] = {}
        keys: dict[tuple[str, float, int], str] = {}
        for trial in trials:
            described = trial.describe(self.setting, data, base)
            digest = digest_of(described)
            keys[trial.key] = digest
            recorded = self.table.get(digest)
            if recorded is not None:
                known[digest] = recorded
            else:  # entrants that differ in their labels alone are one: trained once
                waiting.setdefault(digest, (trial, described))
        if known:
            self.say(f"{what}: {len(known)} trials of {len(trials)} are in {self.table.path}")
        with self.progress(what) as advance:
            todo = [trial for trial, _ in waiting.values()]
            for done, (trial, result) in enumerate(self.workers.results(self.setting, todo), 1):
                digest = keys[trial.key]
                self.table.put(digest, waiting[digest][1], result)
                known[digest] = result
                advance(done, len(todo), _facts(trial, result))
        return {key: known[digest] for key, digest in keys.items()}

    def _require_some(self, standings: Sequence[Standing]) -> None:
        if any(standing.reason is None for standing in standings):
            return
        raise TrainError(
            "no entrant can be trained on this base and these data",
            faults=[f"{one.entrant.label}: {in_one_line(one.reason)}" for one in standings],
        )


def best_rate(sweep: Mapping[float, Result], higher_is_better: bool) -> float | None:
    """The rate with the best metric on validation; the lower loss, then the lower rate, decides
    between equals. None when every trial failed.
    """
    sign = -1.0 if higher_is_better else 1.0
    ranked = sorted(
        (sign * one["value"], one["loss"], rate)
        for rate, one in sweep.items()
        if "failed" not in one
    )
    return ranked[0][2] if ranked else None


def _facts(trial: Trial, result: Result) -> str:
    value = "failed" if "failed" in result else f"{result['value']:.4g}"
    return f"{trial.entrant.label}, rate {trial.learning_rate:g}, seed {trial.seed}: {value}"
