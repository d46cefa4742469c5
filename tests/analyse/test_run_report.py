"""The report's part on the run: what its sentences say is in the history, whatever is in that."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sidepath.analyse import run_report
from sidepath.analyse.run_pictures import lines_of, median, window_of
from tests.pages import Collector, fetched


def history(count: int = 4, **changes: Any) -> dict[str, Any]:
    layers = [
        {"name": "h.0.q", "effective_rank": [1.0, 3.0], "b_norm": [0.0, 2.0],
         "gradient_norm": [4.0, 1.0]},
        {"name": "h.1.q", "effective_rank": [2.0, None], "b_norm": [0.0, 4.0],
         "gradient_norm": [4.0, 1.0]},
        {"name": "h.0.norm", "effective_rank": None, "b_norm": None, "gradient_norm": [0.5, 0.25]},
    ]  # fmt: skip
    loss = [4.0 - 2.0 * at / max(1, count - 1) for at in range(count)]
    return {"every": 2, "loss": loss, "held_out": [], "steps": [2, 4], "layers": layers, **changes}


def test_the_sentences_are_of_the_numbers() -> None:
    found = history(held_out=[[2, 3.5], [3, 2.75], [4, 3.0]])
    said = run_report.said_of_losses(found)
    assert said == "From 4 to 2 nats in 4 steps. On held-out rows it was lowest after step 3: 2.75."
    said = run_report.said_of_layers(found, "gradient_norm", "gradient norm")
    assert said == (
        "The median layer's gradient norm went from 4 after step 2 to 1 after step 4; "
        "at the end q has most (1), norm least (0.25)."
    )
    said = run_report.said_of_layers(found, "b_norm", "norm of B")
    assert said == "The median layer's norm of B went from 0 after step 2 to 4 after step 4."


def test_titles_say_which_way_it_went() -> None:
    text = Collector("".join(run_report.trained(history()))).text
    for said in ("The loss fell", "The effective rank rose", "The norm of B rose",
                 "The gradient norm fell"):  # fmt: skip
        assert said in text
    still = run_report.trained(history(loss=[2.0, 2.0, 2.0, 2.01]))
    assert "The loss hardly moved" in Collector("".join(still)).text


def test_places_without_thin_factors_and_numbers_that_are_not_known_are_left_out() -> None:
    assert list(lines_of(history(), "effective_rank")) == ["q"]
    assert list(lines_of(history(), "gradient_norm")) == ["q", "norm"]
    assert median([float("nan"), 3.0, 1.0, 2.0]) == 2.0


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": [], "steps": [], "layers": []},
        {"steps": [], "layers": [{"name": "a", "effective_rank": [], "b_norm": [],
                                  "gradient_norm": []}]},
        {"loss": [3.0]},
        {"layers": [{"name": "a", "effective_rank": [None, None], "b_norm": None,
                     "gradient_norm": [0.0, 0.0]}]},
    ],
)  # fmt: skip
def test_a_history_with_little_in_it_is_drawn_all_the_same(changes: dict[str, Any]) -> None:
    text = "".join(run_report.trained(history(**changes)))
    assert fetched(text) == []
    assert not re.search(r"\bnan\b", Collector(re.sub("<svg.*?</svg>", "", text, flags=re.S)).text)


def test_a_long_run_is_drawn_through_few_points() -> None:
    short, long = (
        len("".join(run_report.trained(history(steps, layers=[])))) for steps in (1000, 20_000)
    )
    assert window_of(history(20_000)) == 400
    assert long < 3 * short


def test_plan_and_parity() -> None:
    rows = [{"what": "file", "predicted": 2048, "measured": 1024, "how": "its size"}]
    text = Collector("".join(run_report.planned(rows))).text
    assert "2.0 KiB" in text
    assert "-50.0%" in text
    measures = {"max_abs": 1e-5, "mean_abs": 1e-6, "top1": 0.5, "kl": 2e-7}
    text = Collector("".join(run_report.parity({"folder": "m<erged", **measures}))).text
    assert "m<erged" in text
    assert "50.0% of positions" in text
    skipped = "".join(run_report.parity({"folder": "m", "skipped": True}))
    assert "was not measured" in skipped
