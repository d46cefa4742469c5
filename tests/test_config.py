"""Settings: what is checked, and how it is said."""

from __future__ import annotations

import pytest

from sidepath.config import TrainConfig, build
from sidepath.errors import ConfigError


@pytest.mark.parametrize(
    "value",
    [pytest.param(10**400, id="huge"), float("inf"), float("nan"), True, "1"],
)
def test_what_is_no_number_that_a_float_holds_is_refused(value: object) -> None:
    """A file may name a whole number of any length."""
    fault = r"learning_rate = .*expected finite number"
    with pytest.raises(ConfigError, match=fault):
        TrainConfig(learning_rate=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=fault):
        build(TrainConfig, {"learning_rate": value})


def test_a_whole_number_becomes_a_float() -> None:
    assert isinstance(build(TrainConfig, {"learning_rate": 1}).learning_rate, float)
    assert isinstance(build(TrainConfig, {"epochs": 2}).epochs, float)
