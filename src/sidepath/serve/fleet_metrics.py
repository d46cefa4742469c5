"""What several replicas count, and their entrance, for Prometheus (floor 5; extra `serve`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter
from prometheus_client import generate_latest as text_of
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sidepath.serve.replica import Standing


class FleetMetrics:
    """The counts of one entrance; those of the replicas are added when they are asked for."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._responses = Counter(
            "sidepath_responses", "Responses by status.", ["status"], registry=registry
        )
        self.retried = Counter(
            "sidepath_retries",
            "Requests sent to another replica since theirs had ended.",
            registry=registry,
        )
        self.cut = Counter(
            "sidepath_streams_cut",
            "Streams that ended with an error since their replica had.",
            registry=registry,
        )

    def responded(self, status: int) -> None:
        """A response began."""
        self._responses.labels(str(status)).inc()

    def text(self, standings: Iterable[Standing]) -> bytes:
        """All of it, in Prometheus' text format; what a replica counts is labelled with it."""
        of_replicas = CollectorRegistry()
        of_replicas.register(_OfReplicas(list(standings)))
        found: bytes = text_of(self._registry) + text_of(of_replicas)
        return found


class _OfReplicas(Collector):
    def __init__(self, standings: list[Standing]) -> None:
        self._standings = standings

    def collect(self) -> Iterator[Metric]:
        """The replicas' families, each once."""
        alive = sum(standing.alive for standing in self._standings)
        yield GaugeMetricFamily("sidepath_replicas", "Replicas that answer.", alive)
        families: dict[str, Metric] = {}
        for standing in self._standings:
            for family in text_string_to_metric_families(standing.metrics.decode()):
                if not family.samples:
                    continue
                whole = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": standing.replica}
                    whole.add_sample(sample.name, labels, sample.value)
        yield from families.values()
