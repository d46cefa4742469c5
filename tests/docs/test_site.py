"""What the site takes from the code, and that nothing of the code is left out."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
import yaml

import sidepath
from sidepath import errors
from sidepath.cli.options import flags_of
from sidepath.cli.surface import VERBS, sections_of
from sidepath.methods import METHODS
from tests.documents import DOCS, ROOT, pages


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """`scripts/documentation.py`, the hook."""
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "scripts/documentation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_error_has_its_entry() -> None:
    entries = re.findall(r"^### (\w+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert sorted(entries) == sorted(classes)


def test_every_entry_says_how_it_is_mended() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    entries = re.split(r"^### ", text.partition("## Symptoms")[0], flags=re.MULTILINE)[1:]
    plain = [entry.split("\n")[0] for entry in entries if "**Mend:**" not in entry]
    assert plain == ["SidepathError"]


def test_every_method_has_its_section() -> None:
    text = (DOCS / "methods.md").read_text()
    assert {*re.findall(r"^## ([\w-]+)$", text, re.MULTILINE)} >= {*METHODS}
    assert re.findall(r"^\{\{ method (\S+) \}\}$", text, re.MULTILINE) == re.findall(
        r"^## ([a-z-]+)$", text, re.MULTILINE
    )


def test_the_command_line_page_has_every_flag(site: ModuleType) -> None:
    text = site.filled((DOCS / "reference/cli.md").read_text())
    for name, verb in VERBS.items():
        assert f"\n## {name}\n" in text
        for flag in flags_of(sections_of(verb, None)):
            assert f"`{flag.name}`" in text
            assert flag.doc, f"{name} {flag.name} has no docstring"


def test_a_method_is_told_from_its_code(site: ModuleType) -> None:
    text = site.filled("{{ method lora }}")
    assert "Rank of each update" in text
    assert "GPT-2 small: 1,179,648." in text
    assert "{a" not in text


def test_public_names_and_the_tree(site: ModuleType) -> None:
    text = site.filled("{{ api }}")
    for name in sidepath.__all__:
        assert name == "__version__" or re.search(rf"\.{name}$", text, re.MULTILINE)
    assert "├── ConfigError" in site.filled("{{ tree }}")


def test_an_unknown_mark_is_an_error(site: ModuleType) -> None:
    assert site.filled("a {{ b }} c") == "a {{ b }} c"
    with pytest.raises(KeyError):
        site.filled("{{ nothing }}")


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named: list[str] = []

    def walk(entry: object) -> None:
        if isinstance(entry, str):
            named.append(entry)
        elif isinstance(entry, dict):
            walk(list(entry.values()))
        elif isinstance(entry, list):
            for one in entry:
                walk(one)

    walk(settings["nav"])
    assert sorted(named) == sorted(pages())


def test_pages_are_short_enough_to_be_read_in_one_sitting() -> None:
    long = {
        name: len(path.read_text().split())
        for name, path in pages().items()
        if name not in ("structure.md", "log.md", "results.md", "benchmarks.md")
    }
    assert {name: words for name, words in long.items() if words > 1500} == {}


def test_the_site_asks_nobody_for_anything() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    plugins = [next(iter(one)) if isinstance(one, dict) else one for one in settings["plugins"]]
    assert plugins == ["search", "mkdocstrings"]
    for picture in DOCS.rglob("*.svg"):
        assert not re.search(r"(href|src|url\()\s*=?\s*[\"']?http", picture.read_text())
