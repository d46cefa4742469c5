"""Two replicas on Ray Serve: where requests go, what a killed one loses, and that all ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from tests.scale.conftest import ADAPTERS, PROMPT, Scaled, alive, descendants, listening
from tests.serve.sockets import ask

MODELS = [f"adapter-{number}" for number in range(ADAPTERS)]


def test_an_adapters_requests_go_where_it_is_resident(scaled: Scaled, greedy: Any) -> None:
    for model in MODELS:  # one each, and time for all to hear of it
        assert scaled.complete(model).document["choices"][0]["text"] == greedy(model)
        time.sleep(1)
    first = scaled.answered()
    took = []
    for _ in range(30):
        begun = time.perf_counter()
        scaled.complete("base", 1)
        took.append(time.perf_counter() - begun)
    print(f"{1000 * sorted(took)[15]:.1f} ms a request of one token, one after the other")
    with ThreadPoolExecutor(8) as callers:
        said = list(callers.map(scaled.complete, [*MODELS, "base"] * 10))
    wrong = [
        each.document["model"]
        for each in said
        if each.document["choices"][0]["text"] != greedy(each.document["model"])
    ]
    assert wrong == []
    found = scaled.answered()
    for model in MODELS:
        (home,) = first[model]
        assert found[model] == Counter({home: 11}), model
    assert len({home for model in MODELS for home in found[model]}) == 2, "both have some"


def test_what_is_loaded_is_known_to_both_and_what_is_unloaded_to_none(
    scaled: Scaled, greedy: Any
) -> None:
    def change(route: str, key: str | None = scaled.admin, **body: object) -> Any:
        return ask(scaled.port, f"/v1/{route}_lora_adapter", body, key=key)

    def known() -> list[float]:
        return [value for name, _, value in scaled.metrics() if name == "sidepath_adapters"]

    assert known() == [ADAPTERS, ADAPTERS]
    assert change("load", None, lora_name="new", lora_path="adapter-2").status == 401
    said = change("load", lora_name="new", lora_path="adapter-2")
    assert said.status == 200, said.text
    assert known() == [ADAPTERS + 1, ADAPTERS + 1]
    with ThreadPoolExecutor(4) as callers:
        for each in callers.map(scaled.complete, ["new"] * 8):
            assert each.document["choices"][0]["text"] == greedy("adapter-2")
    generation = said.document["generation"]
    stale = change("unload", lora_name="new", generation=generation - 1)
    assert (stale.status, stale.error["code"]) == (409, "generation_changed")
    said = change("unload", lora_name="new", generation=generation)
    assert (said.status, said.document["gone"]) == (200, True)
    assert known() == [ADAPTERS, ADAPTERS]
    assert scaled.complete("new").status == 404


def test_a_killed_replica_loses_no_request_that_has_no_word_out(
    scaled: Scaled, greedy: Any
) -> None:
    before = scaled.total("sidepath_retries_total")
    asked = [*MODELS, "base"] * 8
    with ThreadPoolExecutor(len(asked)) as callers:
        waiting = [callers.submit(scaled.complete, model, 48) for model in asked]
        time.sleep(0.3)
        os.kill(scaled.replicas()[0], signal.SIGKILL)
        said = [each.result() for each in waiting]
    assert Counter(each.status for each in said) == {200: len(asked)}
    right = [
        each.document["choices"][0]["text"] == greedy(model, 48)
        for model, each in zip(asked, said, strict=True)
    ]
    assert right == [True] * len(asked)
    retried = scaled.total("sidepath_retries_total") - before
    assert retried >= 1, "it had some"
    print(f"{len(asked)} requests, {retried:.0f} sent again, {sum(right)} right")
    scaled.wait_for(2)


def test_a_stream_that_is_cut_says_so_and_the_next_request_waits_for_a_replica(
    scaled: Scaled, greedy: Any
) -> None:
    body = {"model": "adapter-0", "prompt": PROMPT, "max_tokens": 400, "stream": True}
    connection = HTTPConnection("127.0.0.1", scaled.port, timeout=240)
    head = {"Authorization": f"Bearer {scaled.admin}"}
    connection.request("POST", "/v1/completions", json.dumps({**body, "temperature": 0}), head)
    reply = connection.getresponse()
    first = reply.readline()
    assert "choices" in json.loads(first[6:])
    for pid in scaled.replicas():
        os.kill(pid, signal.SIGKILL)
    events = [line[6:] for line in reply if line.strip()]
    connection.close()
    assert events[-1] == b"[DONE]\n"
    error = json.loads(events[-2])["error"]
    assert (error["type"], error["code"]) == ("server_error", "replica_lost")
    assert len(events) < 400
    assert scaled.total("sidepath_streams_cut_total") == 1
    said = scaled.complete("adapter-1")
    assert said.document["choices"][0]["text"] == greedy("adapter-1")
    scaled.wait_for(2)


def test_ray_takes_no_orders_without_the_token(scaled: Scaled) -> None:
    """Its ports are open on all interfaces: this is what keeps others out."""
    every = " ".join(descendants(scaled.process.pid).values())
    found = re.search(r"--gcs-address=(\S+)", every)
    assert found is not None
    script = (
        "import sys; from ray._raylet import GcsClient\n"
        "client = GcsClient(address=sys.argv[1])\n"
        "print(client.get_all_node_info(timeout=10))"
    )
    for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}):
        ran = subprocess.run(
            [sys.executable, "-c", script, found[1]],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ran.returncode != 0, ran.stdout
        assert "InvalidAuthToken" in ran.stderr or "Unauthenticated" in ran.stderr


def test_nothing_goes_round_the_gate(scaled: Scaled) -> None:
    """No other port of these processes answers for a model, tells a name, or takes a job."""
    ports = listening([scaled.process.pid, *descendants(scaled.process.pid)])
    assert scaled.port in ports
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 1}
    asked: list[tuple[str, Any]] = [
        ("/v1/models", None),
        ("/v1/completions", body),
        ("/api/job_agent/jobs/", {"entrypoint": "true"}),
        ("/metrics", None),
    ]
    answers = []
    for port in ports - {scaled.port}:
        for path, sent in asked:
            connection = HTTPConnection("127.0.0.1", port, timeout=3)
            with suppress(OSError, HTTPException):  # it speaks another language, or to nobody
                verb = "GET" if sent is None else "POST"
                connection.request(verb, path, None if sent is None else json.dumps(sent))
                reply = connection.getresponse()
                answers.append((port, path, reply.status, reply.read().decode()))
            connection.close()
    assert len(ports) > 5, "Ray has many"
    assert answers, "some speak HTTP: Ray's figures"
    for port, path, status, text in answers:
        assert path in ("/v1/models", "/metrics") or status >= 400, (port, path, status)
        assert not any(word in text for word in ("choices", *MODELS)), (port, path, text)


def test_sigterm_answers_what_has_begun_and_leaves_nothing(scaled: Scaled, greedy: Any) -> None:
    started = descendants(scaled.process.pid)
    session = re.search(r"(/\S*/sp-\w+)", " ".join(started.values()))
    assert session is not None
    with ThreadPoolExecutor(4) as callers:
        waiting = [callers.submit(scaled.complete, model, 64) for model in MODELS]
        time.sleep(0.3)
        scaled.process.send_signal(signal.SIGTERM)
        for model, each in zip(MODELS, waiting, strict=True):
            assert each.result().document["choices"][0]["text"] == greedy(model, 64)
    assert scaled.process.wait(timeout=120) == 0
    end = time.monotonic() + 30
    while left := [said for pid, said in started.items() if alive(pid)]:
        assert time.monotonic() < end, left
    assert not Path(session[1]).exists()
