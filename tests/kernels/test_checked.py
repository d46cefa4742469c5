"""Fake kernels, right and wrong, slow and fast, before the door."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sidepath.errors import KernelNotice, RoutingError
from sidepath.kernels.checked import TOLERANCES, TRIALS, Key, Trials, Verdict, compare, eligible
from sidepath.kernels.tiles import tiles_of
from sidepath.kernels.triton_nf4 import packed_of, product
from sidepath.kernels.triton_nf4 import shape_class as nf4_shape_class
from sidepath.kernels.triton_routed import add_routed_, shape_class
from tests.kernels.interpreter import on_triton
from tests.kernels.test_triton_nf4 import quantised, unpacked
from tests.kernels.test_triton_routed import DTYPES, MIXED, Case, case

KEY = Key("fake", (torch.float32,), (3, 4))
ANSWER = torch.arange(12.0).view(3, 4)


class Counted:
    """A way to a result that counts its calls."""

    def __init__(self, result: Callable[[], Tensor]) -> None:
        self.calls, self.result = 0, result

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.result()

    def add_(self, y: Tensor) -> None:
        y += self()


def right() -> Tensor:
    return ANSWER + 1e-4


def plain() -> Tensor:
    return ANSWER.clone()


def wrong() -> Tensor:
    result = ANSWER.clone()
    result[1, 2] *= 1.05
    return result


def failing() -> Tensor:
    raise RuntimeError("out of resource: shared memory")


def no_timer(run: Callable[[], object]) -> float:
    raise AssertionError("nothing is to be timed")


def test_a_kernel_that_agrees_is_used_from_then_on() -> None:
    trials, fast, slow = Trials(no_timer), Counted(right), Counted(plain)
    assert torch.equal(trials.run(KEY, fast, slow), ANSWER), "the trial answers plainly"
    assert (fast.calls, slow.calls) == (1, 1)
    for _ in range(3):
        assert torch.equal(trials.run(KEY, fast, slow), right())
    assert (fast.calls, slow.calls) == (4, 1)
    assert trials.verdicts == {KEY: Verdict.FAST}


def test_another_dtype_or_shape_is_another_trial() -> None:
    trials, slow = Trials(no_timer), Counted(plain)
    for key in (
        KEY,
        Key("fake", (torch.float16,), (3, 4)),
        Key("fake", (torch.float32,), (3, 5)),
        Key("other", (torch.float32,), (3, 4)),
    ):
        trials.run(key, right, slow)
        trials.run(key, right, slow)
    assert slow.calls == 4


@pytest.mark.parametrize(
    ("bad", "why"), [(wrong, "disagreed.*off by 0.3"), (failing, "raised RuntimeError: out of")]
)
def test_a_kernel_that_fails_is_barred_with_one_warning(
    bad: Callable[[], Tensor], why: str
) -> None:
    trials, fast = Trials(no_timer), Counted(bad)
    with pytest.warns(KernelNotice, match=f"fake is not used in this process: it {why}"):
        assert torch.equal(trials.run(KEY, fast, plain), ANSWER)
    other = Key("fake", (torch.bfloat16,), (1, 1))
    for key in (KEY, other, KEY):
        assert torch.equal(trials.run(key, fast, plain), ANSWER), "and no second warning"
    assert fast.calls == 1
    assert list(trials.barred) == ["fake"]
    assert torch.equal(trials.run(Key("good", (torch.float32,), ()), right, plain), ANSWER)
    assert torch.equal(trials.run(Key("good", (torch.float32,), ()), right, plain), right())


def test_a_kernel_that_fails_later_is_barred_then() -> None:
    trials = Trials(no_timer)
    trials.run(KEY, right, plain)
    with pytest.warns(KernelNotice, match="shared memory"):
        assert torch.equal(trials.run(KEY, failing, plain), ANSWER)
    assert torch.equal(trials.run(KEY, right, plain), ANSWER)


def test_faults_of_the_input_and_of_the_plain_path_are_errors() -> None:
    def refusing() -> Tensor:
        raise RoutingError("slot 9")

    trials = Trials(no_timer)
    with pytest.raises(RoutingError, match="slot 9"):
        trials.run(KEY, refusing, plain)
    with pytest.raises(RuntimeError, match="shared memory"):
        trials.run(KEY, right, failing)
    assert not trials.barred


def test_memory_for_one_way_only_is_no_verdict() -> None:
    def too_large() -> Tensor:
        raise torch.OutOfMemoryError("two at once")

    trials = Trials(no_timer)
    assert torch.equal(trials.run(KEY, too_large, plain), ANSWER)
    assert torch.equal(trials.run(KEY, right, plain), ANSWER)
    assert trials.verdicts == {KEY: Verdict.FAST}
    with pytest.raises(torch.OutOfMemoryError):
        trials.run(KEY, too_large, plain)


def test_a_trial_for_which_memory_is_short_costs_no_answer() -> None:
    y = torch.ones(3, 4)

    def in_place(onto: Tensor) -> None:
        if onto is not y:
            raise torch.OutOfMemoryError("no room for zeros beside it")
        onto.add_(ANSWER)

    def timed_out(run: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("once more")

    trials = Trials(timed_out)
    trials.add_(KEY, y, Counted(right).add_, in_place)
    assert torch.equal(y, 1 + ANSWER)
    assert torch.equal(trials.run(KEY, right, plain, timed=True), ANSWER)
    assert not trials.verdicts


@pytest.mark.parametrize(("seconds", "verdict"), [(1.0, "FAST"), (3.0, "SLOWER")])
def test_the_faster_of_two_that_agree(seconds: float, verdict: str) -> None:
    times = {"right": seconds, "plain": 2.0}
    trials = Trials(lambda run: times[run.__name__])  # type: ignore[attr-defined]
    trials.run(KEY, right, plain, timed=True)
    assert trials.verdicts[KEY] is Verdict[verdict]
    expected = right() if verdict == "FAST" else ANSWER
    assert torch.equal(trials.run(KEY, right, plain, timed=True), expected)
    assert not trials.barred, "slow is not wrong"


def test_a_slow_kernel_with_a_real_clock() -> None:
    def slow() -> Tensor:
        time.sleep(0.05)
        return plain()

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    trials = Trials(seconds)
    trials.run(KEY, slow, plain, timed=True)
    assert trials.verdicts == {KEY: Verdict.SLOWER}


# -- in place -----------------------------------------------------------------------------------


def test_what_is_added_is_compared_and_not_what_it_is_added_to() -> None:
    """Beside numbers of a million an update that is wrong by half would look right."""
    trials, y = Trials(no_timer), torch.full((3, 4), 1e6)
    bad = Counted(lambda: ANSWER * 1.5)
    with pytest.warns(KernelNotice, match="disagreed"):
        trials.add_(KEY, y, bad.add_, Counted(plain).add_)
    assert torch.equal(y, 1e6 + ANSWER)
    assert torch.equal(ANSWER, torch.arange(12.0).view(3, 4))


def test_every_use_adds_once() -> None:
    trials, fast, slow = Trials(no_timer), Counted(plain), Counted(plain)
    y = torch.ones(3, 4)
    for number in range(1, 4):
        trials.add_(KEY, y, fast.add_, slow.add_)
        assert torch.equal(y, 1 + number * ANSWER)
    assert trials.verdicts == {KEY: Verdict.FAST}
    assert (fast.calls, slow.calls) == (3, 2)
    with pytest.warns(KernelNotice, match="shared memory"):
        trials.add_(KEY, y, Counted(failing).add_, slow.add_)
    assert torch.equal(y, 1 + 4 * ANSWER)


def test_a_row_of_the_base_that_is_touched_bars_the_kernel() -> None:
    """However little: such rows are promised to the bit."""
    trials, y = Trials(no_timer), torch.zeros(3, 4)
    updates = ANSWER.clone()
    updates[0] = 0
    touched = updates.clone()
    touched[0, 3] = 1e-7
    with pytest.warns(KernelNotice, match="a row that adds nothing was changed"):
        trials.add_(KEY, y, Counted(lambda: touched).add_, Counted(lambda: updates).add_)
    assert torch.equal(y, updates)


def test_an_update_that_is_still_zero_says_nothing_and_costs_little() -> None:
    zero = Counted(lambda: torch.zeros(3, 4))
    trials, fast, y = Trials(no_timer), Counted(lambda: torch.zeros(3, 4)), torch.ones(3, 4)
    for _ in range(100):
        trials.add_(KEY, y, fast.add_, zero.add_)
    assert fast.calls == 7, "uses 1, 2, 4, ... 64"
    assert not trials.verdicts
    zero.result = fast.result = plain
    for _ in range(28):
        trials.add_(KEY, y, fast.add_, zero.add_)
    assert trials.verdicts == {KEY: Verdict.FAST}, "at use 128"


# -- comparing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_agrees_and_a_missing_term_does_not(dtype: torch.dtype) -> None:
    x, W = torch.randn(16, 64, dtype=torch.float64), torch.randn(64, 32, dtype=torch.float64)
    whole = (x @ W).to(dtype)
    rounded = ((x[:, :16] @ W[:16]).to(dtype) + (x[:, 16:] @ W[16:]).to(dtype)).to(dtype)
    assert compare(rounded, whole)[0] is True
    assert compare((x[:, :63] @ W[:63]).to(dtype), whole)[0] is False
    one_row = whole.clone()
    one_row[7] *= 0.9
    assert compare(one_row, whole)[0] is False


def test_a_faint_row_is_seen_beside_a_strong_one() -> None:
    expected = torch.ones(2, 8)
    expected[0] *= 100
    found = expected.clone()
    found[1] *= 1.1
    assert compare(found, expected)[0] is False


def test_what_says_nothing_and_what_says_no() -> None:
    zeros, one = torch.zeros(2, 3), torch.ones(2, 3)
    nan = one.clone()
    nan[1, 1] = torch.nan
    assert compare(zeros, zeros)[0] is None
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3))[0] is None
    assert compare(nan, nan)[0] is None
    assert compare(one, nan)[0] is None
    assert compare(nan, one)[0] is False
    assert compare(one, zeros)[0] is False
    assert compare(one.half(), one)[0] is False
    assert compare(torch.ones(3, 2), one)[0] is False


# -- the real kernels -----------------------------------------------------------------------------


def _arguments(case: Case) -> tuple[Any, ...]:
    return case.x, case.A, case.B, case.starts, case.scalings, case.slots


@pytest.mark.parametrize("dtypes", DTYPES)
@on_triton
def test_the_routed_kernel_passes(dtypes: str) -> None:
    made = case(dtypes, slots=MIXED, ranks=[8, 5, 1, 3], width=64, out=64)
    tiles = tiles_of(made.slots, made.starts, made.scalings, made.x.device)
    trials, y = Trials(no_timer), made.y.clone()
    key = Key("routed", (made.x.dtype, made.A.dtype), shape_class(y, made.x, tiles))

    def fast(y: Tensor) -> None:
        add_routed_(y, *_arguments(made), tiles=tiles)

    def loop(y: Tensor) -> None:
        y += dataclasses.replace(made, y=torch.zeros_like(y)).expected().to(y.dtype)

    trials.add_(key, y, fast, loop)
    assert trials.verdicts == {key: Verdict.FAST}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelNotice)
        other = dataclasses.replace(made, scalings=(1.0,) * 4)
        trials = Trials(no_timer)
        trials.add_(key, y, fast, lambda y: add_routed_(y, *_arguments(other)))
    assert not trials.verdicts, "with other scalings the two disagree"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_triton
def test_the_4_bit_kernel_passes(dtype: torch.dtype) -> None:
    codes, state = quantised(48, 192)
    packed, x = packed_of(codes, state), torch.randn(3, 192, device=codes.device).to(dtype)
    W_OI = unpacked(codes, state).to(dtype)
    key = Key("nf4", (dtype,), nf4_shape_class(x, packed))
    trials = Trials(no_timer)
    trials.run(key, lambda: product(x, packed), lambda: x @ W_OI.T)
    assert trials.verdicts == {key: Verdict.FAST}


def test_plain_tensors_are_not_eligible() -> None:
    assert not eligible(torch.zeros(1))
    tried = {key.kernel for key in TRIALS.verdicts} - {"blocked"}  # which is for processors
    assert not tried or torch.cuda.is_available()


def test_the_warning_can_be_an_error() -> None:
    """Where a user asks for that, no kernel fails unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelNotice)
        with pytest.raises(KernelNotice):
            Trials(no_timer).run(KEY, wrong, plain)
