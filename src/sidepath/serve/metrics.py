"""What the server counts, as Prometheus reads it (floor 5; extra `serve`)."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as text_of
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sidepath.serve.adapters import Adapters
from sidepath.serve.encoders import Encoder
from sidepath.serve.engine import Engine
from sidepath.serve.requests import Listener, Piece

MOST_MODELS = 100
"""Names that are counted apart; those that come later are counted together, as "other"."""
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Counted:
    """The counts of one server: its worker's own, and its responses."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, own: Collector) -> None:
        """`own` collects those of the worker when they are asked for."""
        self._registry = CollectorRegistry()
        self._registry.register(own)
        self._responses = Counter(
            "sidepath_responses", "Responses by status.", ["status"], registry=self._registry
        )

    def responded(self, status: int) -> None:
        """A response began."""
        self._responses.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        found: bytes = text_of(self._registry)
        return found


class Metrics(Counted):
    """The counts of a language model's server: also what each caller met."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(_OfEngine(engine))
        registry = self._registry
        self._models: set[str] = set()
        self._requests = Counter(
            "sidepath_requests", "Requests that ended.", ["model", "finish"], registry=registry
        )
        self._first = Histogram(
            "sidepath_first_token_seconds",
            "From submitting a request to its first token.",
            buckets=FIRST,
            registry=registry,
        )
        self._next = Histogram(
            "sidepath_next_token_seconds",
            "From one token of an answer to the next.",
            buckets=NEXT,
            registry=registry,
        )

    def watch(self, model: str) -> Listener:
        """A listener that times one request from now on."""
        if len(self._models) < MOST_MODELS:
            self._models.add(model)
        label = model if model in self._models else "other"
        last, histogram = time.perf_counter(), self._first

        def listen(piece: Piece) -> None:
            nonlocal last, histogram
            now = time.perf_counter()
            if piece.chosen is not None:
                histogram.observe(now - last)
                last, histogram = now, self._next
            if piece.finish is not None:
                self._requests.labels(label, piece.finish).inc()

        return listen


class _OfEngine(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Read when they are asked for: the engine's own numbers."""
        engine = self._engine
        waiting, running, slots = engine.load
        yield GaugeMetricFamily("sidepath_waiting", "Requests that wait.", waiting)
        yield GaugeMetricFamily("sidepath_running", "Requests that run.", running)
        yield GaugeMetricFamily("sidepath_slots", "Adapters that run.", slots)
        yield CounterMetricFamily("sidepath_steps", "Steps of the engine.", engine.steps)
        tokens = CounterMetricFamily("sidepath_tokens", "Tokens.", labels=["kind"])
        tokens.add_metric(["computed"], engine.computed_tokens)
        tokens.add_metric(["answered"], engine.new_tokens)
        tokens.add_metric(["reused"], engine.prefixes.tokens)
        yield tokens
        yield from _of_adapters(engine.adapters)
        prefixes = CounterMetricFamily(
            "sidepath_prefix_lookups", "Requests by whether a row began alike.", labels=["found"]
        )
        prefixes.add_metric(["yes"], engine.prefixes.hits)
        prefixes.add_metric(["no"], engine.prefixes.lookups - engine.prefixes.hits)
        yield prefixes


class OfEncoder(Collector):
    """An encoder's own numbers."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def collect(self) -> Iterator[Metric]:
        """Read when they are asked for."""
        encoder = self._encoder
        yield GaugeMetricFamily("sidepath_waiting", "Texts that wait.", encoder.waiting)
        yield CounterMetricFamily("sidepath_calls", "Calls of the model.", encoder.calls)
        yield CounterMetricFamily("sidepath_texts", "Texts that were answered.", encoder.answered)
        yield from _of_adapters(encoder.adapters)


def _of_adapters(adapters: Adapters) -> Iterator[Metric]:
    tiers, known = adapters.tiers, len(adapters.versions())
    yield GaugeMetricFamily("sidepath_adapters", "Adapters that can be asked for.", known)
    held = GaugeMetricFamily("sidepath_adapter_bytes", "Bytes of adapters.", labels=["tier"])
    held.add_metric(["model"], tiers.bytes)
    held.add_metric(["host"], tiers.host.bytes)
    yield held
    resident = len(tiers.resident())
    yield GaugeMetricFamily("sidepath_adapters_resident", "Adapters on the model.", resident)
    yield CounterMetricFamily("sidepath_adapter_loads", "Adapters put on the model.", tiers.loads)
    yield CounterMetricFamily("sidepath_adapter_reads", "Adapters read from disk.", tiers.reads)
    yield CounterMetricFamily(
        "sidepath_adapter_evictions", "Adapters that made room for others.", tiers.evictions
    )
