"""The document of the API: it says what the server checks, and the server does what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from starlette.testclient import TestClient
from transformers import AutoTokenizer

import sidepath
from sidepath.serve.confined import Loading
from sidepath.serve.engine import Engine
from sidepath.serve.gate import Gate
from sidepath.serve.http import Terms, application
from sidepath.serve.keys import Key, Keys, digest_of
from sidepath.serve.openapi import document
from sidepath.serve.scheduler import Limits
from tests.serve.kit import embedded

PATHS: Any = document()["paths"]
POSTS = sorted(path for path, does in PATHS.items() if "post" in does)
KINDS = ("a string", "a number", "a whole number", "true or false", "an object", "a list")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    tokenizer: Any = AutoTokenizer.from_pretrained(sidepath.embedded_base())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    limits = Limits(rows=4, slots=2, context=64, step_tokens=64)
    keys = Keys([Key(name="operator", sha256=digest_of("secret"), admin=True)])
    terms = Terms(Gate(keys), loading=Loading(tmp_path_factory.mktemp("root")))
    key = {"authorization": "Bearer secret"}
    with Engine(embedded(), tokenizer, limits) as engine:
        made = application(engine, "base", terms)
        with TestClient(made, base_url="http://127.0.0.1", headers=key) as client:
            yield client


def test_it_names_every_route_and_no_other(client: TestClient) -> None:
    assert client.get("/openapi.json").json() == json.loads(json.dumps(document()))
    application: Any = client.app
    routes = {
        (route.path, method.lower())
        for route in application.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert {(path, method) for path, does in PATHS.items() for method in does} == routes


def body_of(path: str) -> Any:
    return PATHS[path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_every_field_says_what_it_is(client: TestClient) -> None:
    """A value of a wrong kind, for each field that has a kind, is refused by name."""
    wrong: dict[str, Any] = {"string": 5, "number": "x", "integer": 1.5, "boolean": "x"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        schema = body_of(path)
        for name, field in schema["properties"].items():
            kinds = [field, *field.get("anyOf", [])]
            kind = next((kind["type"] for kind in kinds if kind.get("type") in wrong), None)
            if kind is not None and name not in ("prompt", "stop"):
                reply = client.post(path, json={"model": "base", name: wrong[kind]})
                assert reply.status_code == 400
                assert f"{name} must be" in reply.json()["error"]["message"], name


# --- fuzz: bodies drawn from the document, and bodies that break it

TEXT = st.text(max_size=12)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def drawn(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of ours describes."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of(*(drawn(each) for each in schema["anyOf"]))
    kind = schema["type"]
    if isinstance(kind, list):
        return st.one_of(*(drawn({"type": each}) for each in kind))
    if kind == "array":
        items = drawn(schema.get("items", {"type": "string"}))
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=3)
    if kind == "object":
        needed = schema.get("required", ())
        fields = {name: drawn(each) for name, each in schema.get("properties", {}).items()}
        return st.fixed_dictionaries(
            {name: fields[name] for name in needed},
            optional={name: each for name, each in fields.items() if name not in needed},
        )
    low = schema.get("minimum", -3)
    return {
        "string": st.sampled_from(["base", "One", "\U0001f600"]) | TEXT,
        "integer": st.integers(low, 40) | st.integers(min_value=low),
        "number": st.floats(-1, 3) | st.floats(allow_nan=True),
        "boolean": st.booleans(),
        "null": st.none(),
    }[kind]


def fits(value: Any, schema: Any) -> bool:
    """Whether a value is what a schema of ours describes: the part of JSON Schema that it uses."""
    if "$ref" in schema:
        found: Any = document()
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return fits(value, found)
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    kinds: dict[str, Any] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(isinstance(value, kinds[name]) for name in names):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        return all(name in value for name in schema.get("required", ())) and all(
            fits(item, fields[name]) for name, item in value.items() if name in fields
        )
    return not isinstance(value, int) or value >= schema.get("minimum", value)


def check_reply(path: str, method: str, reply: Any) -> None:
    """A response is one that the document has, in its form."""
    responses = PATHS[path][method]["responses"]
    said = responses[str(reply.status_code)]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    assert kind in said, (reply.status_code, kind)
    value = reply.json() if kind == "application/json" else reply.text
    assert fits(value, said[kind]["schema"]), value


def test_what_fits_can_fail() -> None:
    schema = PATHS["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    model = {"id": "a", "object": "model", "created": 0, "owned_by": "b", "parent": None}
    assert fits({"object": "list", "data": [model]}, schema)
    for wrong in ({"parent": 3}, {"object": "x"}, {"created": "0"}):
        assert not fits({"object": "list", "data": [{**model, **wrong}]}, schema)
    assert not fits({"object": "list", "data": [{"id": "a"}]}, schema)
    assert not fits({"object": "list"}, schema)


QUICK = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("path", POSTS)
@QUICK
@given(data=st.data())
def test_bodies_of_the_documents_form(client: TestClient, path: str, data: Any) -> None:
    body = data.draw(drawn(body_of(path)))
    if "prompt" in body or "messages" in body:
        body = {**body, "model": "base", "max_tokens": 2, "max_completion_tokens": None}
    reply = client.post(path, content=json.dumps(body).encode())
    assert reply.status_code < 500, reply.text
    assert "is not known" not in reply.text
    assert not [must for must in KINDS if f"must be {must}" in reply.text]
    check_reply(path, "post", reply)


@pytest.mark.parametrize("path", POSTS)
@QUICK
@given(data=st.data())
def test_bodies_that_break_it(client: TestClient, path: str, data: Any) -> None:
    schema = body_of(path)
    body = data.draw(drawn(schema))
    name = data.draw(st.sampled_from(sorted(schema["properties"])) | TEXT)
    broken = data.draw(JSON)
    sent = data.draw(st.sampled_from([{**body, name: broken}, broken, {name: broken}]))
    raw = json.dumps(sent).encode()
    raw = raw if data.draw(st.booleans()) else raw[: data.draw(st.integers(0, len(raw)))]
    reply = client.post(path, content=raw)
    assert reply.status_code < 500, reply.text
    check_reply(path, "post", reply)


@pytest.mark.parametrize("path", sorted(set(PATHS) - set(POSTS)))
def test_what_is_read(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert reply.status_code == 200
    check_reply(path, "get", reply)
