"""The page at `/` in a real browser, and the routes that it reads."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import sidepath
from sidepath.serve.engine import Engine
from sidepath.serve.http import application
from sidepath.serve.playground import PAGE
from sidepath.serve.scheduler import Limits
from tests.browser import CONTRAST, launched, look, overflow, watched
from tests.pages import fetched
from tests.serve.kit import Alone, embedded, save_adapters, served

PROMPT = "The capital of France"
LIMITS = Limits(rows=4, slots=2, context=512, step_tokens=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_adapters(embedded, tmp_path_factory.mktemp("playground"), 2)


@pytest.fixture(scope="module")
def engine(folders: list[Path]) -> Iterator[Engine]:
    tokenizer = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    with Engine(embedded(), tokenizer, LIMITS) as engine:
        for number, folder in enumerate(folders):
            engine.adapters.load(f"adapter-{number}", folder)
        yield engine


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


def answers(folders: list[Path]) -> dict[str, str]:
    """The greedy answer of 8 tokens of each model, by `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    alone, prompt = Alone(embedded, folders), tuple(tokenizer(PROMPT)["input_ids"])
    names = {"base": None, "adapter-0": 0, "adapter-1": 1}
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    wholes = {
        name: tokenizer.decode([*prompt, *alone.tokens(number, prompt, 8)], True)
        for name, number in names.items()
    }
    return {name: whole[len(before) :] for name, whole in wholes.items()}


def test_three_answers_side_by_side(browser: Any, address: str, folders: list[Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said, asked = watched(page)
    page.goto(address)
    page.locator("#adapters tr").nth(1).wait_for()
    shown = [page.locator(f"#model-{number}") for number in (1, 2, 3)]
    assert [each.input_value() for each in shown] == ["base", "adapter-0", "adapter-1"]
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Longest answer").fill("8")
    page.keyboard.press("Control+Enter")
    page.locator(".told", has_text=re.compile(r"answered by .* \(\w+\)")).nth(2).wait_for()
    texts = [pre.text_content() for pre in page.locator(".answer pre").all()]
    assert texts == list(answers(folders).values())
    told = [line.text_content() for line in page.locator(".told").all()]
    assert [line.split(":")[0] for line in told] == [
        f"answered by {name}" for name in ("base", "adapter-0", "adapter-1")
    ]
    assert all("tokens/s" in line for line in told)
    row = page.locator("#adapters tr").first.text_content()
    assert "adapter-0" in row
    assert "lora" in row
    look(page, "playground-wide-light")
    assert said == [], "nothing on the console"
    assert all(url.startswith((address, "data:,")) for url in asked), "nothing from elsewhere"
    page.close()


def test_stop_ends_an_answer_and_frees_its_row(browser: Any, address: str, engine: Engine) -> None:
    page = browser.new_page()
    page.goto(address)
    page.locator("#adapters tr").nth(1).wait_for()
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Longest answer").fill("480")  # so long that it is stopped in the middle
    before = engine.ended["cancelled"]
    page.get_by_role("button", name="Ask").click()
    page.locator(".told", has_text="answered by").first.wait_for()
    page.keyboard.press("Escape")
    page.locator(".told", has_text="stopped after").first.wait_for()
    page.locator("#go:enabled").wait_for()
    until = time.monotonic() + 20
    while engine.ended["cancelled"] == before:  # the server sees it a bit later than the page
        assert time.monotonic() < until
        time.sleep(0.001)
    page.close()


def test_an_error_is_told_where_the_answer_would_be(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    page.locator("#adapters tr").nth(1).wait_for()
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Longest answer").fill("4000")
    page.get_by_role("button", name="Ask").click()
    page.locator(".told.bad").nth(2).wait_for()
    assert "at most 512 have room" in page.locator(".told").first.text_content()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_at_every_width_by_day_and_by_night(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said, _ = watched(page)
    page.goto(address)
    page.locator("#figures div").nth(4).wait_for()
    look(page, f"playground-{width}-{scheme}")
    assert overflow(page) == 0
    assert page.evaluate(CONTRAST) == []
    for _ in range(12):  # everything that can be used can be reached without a mouse
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") != "BODY"
    assert said == []
    context.close()


def test_the_page_fetches_nothing_and_runs_its_own_script_only(engine: Engine) -> None:
    assert fetched(PAGE.read_text()) == ["data:,", "link", "script"]
    with TestClient(application(engine, "base"), base_url="http://127.0.0.1") as client:
        one, other = client.get("/"), client.get("/")
    policy = one.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert one.text.count(f'nonce="{nonce}"') == 2
    assert "{nonce}" not in one.text
    assert nonce not in other.text


def test_the_library_says_what_the_folders_say(engine: Engine, folders: list[Path]) -> None:
    with TestClient(application(engine, "base"), base_url="http://127.0.0.1") as client:
        found = client.get("/v1/library").json()
        load = client.get("/v1/load").json()
    assert found["base"] == "base"
    assert found["chat"] is True
    assert [entry["id"] for entry in found["data"]] == ["adapter-0", "adapter-1"]
    assert [entry["rank"] for entry in found["data"]] == [2, 3]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert [entry["size"] for entry in found["data"]] == sizes
    assert (load["rows"], load["slots"]) == (4, 2)
    assert (load["waiting"], load["running"], load["slots_taken"]) == (0, 0, 0)
