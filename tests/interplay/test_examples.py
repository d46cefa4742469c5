"""The files of `examples/` run as they stand."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidepath.injection.architecture import FUSED
from sidepath.methods import METHODS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _tables_put_back() -> Iterator[None]:
    """Examples enter things in our tables."""
    methods, fused = dict(METHODS), dict(FUSED)
    yield
    for table, kept in ((METHODS, methods), (FUSED, fused)):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """As `python examples/NAME ARGUMENTS`, in this process: the libraries are loaded already."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quickstart.py", monkeypatch, tmp_path)
    said = capsys.readouterr().out
    for line in ("The cow says moo.", "The duck says quack.", "equal answers: True"):
        assert line in said
    assert (tmp_path / "merged" / "parity.json").is_file()


def test_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells in one process, from top to bottom; it is kept without outputs."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    said = capsys.readouterr().out
    assert "The cat says meow." in said
    assert "rows differ: True" in said
    assert (tmp_path / "quickstart-adapter" / "sidepath.json").is_file()


def test_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("trainer.py", monkeypatch, tmp_path)
    said = capsys.readouterr().out
    assert "equal logits: True" in said
    assert (tmp_path / "sounds" / "sidepath.json").is_file()
    for line in ("The cow says moo.", "The dog says woof.", "The duck says quack."):
        assert line in said


def test_a_custom_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("custom_method.py", monkeypatch, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert all(line.endswith(": True") for line in said), said


def test_a_custom_method_takes_40_lines() -> None:
    text = (EXAMPLES / "custom_method.py").read_text()
    method = text.partition("# The method")[2].partition("\ndef main")[0]
    assert len([line for line in method.splitlines()[1:] if line.strip()]) <= 40


def test_a_new_architecture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("new_architecture.py", monkeypatch)
    said = capsys.readouterr().out
    assert '"Wqkv:q,v" names parts that are not there' in said
    assert "of queries, keys, values: [32, 0, 32]" in said


def test_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from transformers import AutoTokenizer

    import sidepath
    from sidepath.cli.serve_run import HOST
    from sidepath.cli.serving import listening
    from sidepath.serve.engine import Engine
    from sidepath.serve.http import application
    from sidepath.serve.scheduler import Limits
    from tests.serve.kit import embedded, save_adapters

    (folder,) = save_adapters(embedded, tmp_path, 1)
    limits = Limits(rows=4, slots=2, context=256, step_tokens=64)
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    with Engine(embedded(), tokenizer, limits) as engine, listening(0) as bound:
        engine.adapters.load("mine", folder)
        config = uvicorn.Config(application(engine, "base"), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        url = f"http://{HOST}:{bound.getsockname()[1]}/v1"
        try:
            client = runpy.run_path(str(EXAMPLES / "client.py"))
            settings = {"max_tokens": 12, "temperature": 0}
            whole = client["complete"](url, "mine", "One two", **settings)
            assert "".join(client["pieces"](url, "mine", "One two", **settings)) == whole != ""
            run("client.py", monkeypatch, url, "mine", "One two")
            with pytest.raises(SystemExit, match='404: no model "yours" is served'):
                run("client.py", monkeypatch, url, "yours", "One two")
        finally:
            server.should_exit = True
            thread.join()
    said = capsys.readouterr().out
    assert said.startswith("served: base, mine\nOne two")
    assert said.count(f"One two{whole}") == 2


def test_every_example_has_its_test() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == [
        "client.py",
        "compare-sst2.toml",
        "custom_method.py",
        "new_architecture.py",
        "quickstart.ipynb",
        "quickstart.py",
        "trainer.py",
    ]
