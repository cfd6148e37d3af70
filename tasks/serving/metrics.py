"""What the gateway counts, for Prometheus.

Names that nobody rolled out are counted as one: otherwise clients could make it grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from tasks.contracts.serving import EngineState, EngineStatus, Traffic

UNKNOWN = "unknown"
CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_ADDED_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)


class Metrics:
    """The numbers of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "goldgate_requests", "Requests that were answered.", ["name", "version", "status"], registry=self.registry
        )
        self.seconds = self._histogram("goldgate_request_seconds", "From a request's body to the end of its answer.")
        self.first_byte = self._histogram(
            "goldgate_first_byte_seconds", "From a request's body to its answer's first byte."
        )
        self.wait = self._histogram("goldgate_wait_seconds", "Waiting until others had been answered.")
        self.added = self._histogram(
            "goldgate_added_seconds", "What the gateway itself added, without waiting for others.", _ADDED_SECONDS
        )
        self.rejected = Counter(
            "goldgate_rejected", "Requests that got no answer of an engine.", ["reason"], registry=self.registry
        )
        self.confidence = self._histogram(
            "goldgate_confidence", "Of closed answers, calibrated where that could be learnt.", _CONFIDENCES
        )
        self.flagged = Counter(
            "goldgate_flagged", "Closed answers that a person is to look at.", ["name", "version"],
            registry=self.registry,
        )  # fmt: skip
        self.no_confidence = Counter(
            "goldgate_no_confidence", "Closed answers without a confidence; all are flagged.", ["name", "reason"],
            registry=self.registry,
        )  # fmt: skip
        self.log_dropped = Counter(
            "goldgate_log_dropped", "Requests that are missing in the request log.", ["reason"], registry=self.registry
        )
        self.log_written = Counter(
            "goldgate_log_written", "Requests that were written to the request log.", registry=self.registry
        )

    def observe(
        self, name: str, version: str, status: int, *, seconds: float, first_byte: float | None, added: float | None
    ) -> None:
        """Count a request that has ended; times in seconds, None for what it did not come to."""
        self.requests.labels(name, version, str(status)).inc()
        self.seconds.labels(name).observe(seconds)
        if first_byte is not None:
            self.first_byte.labels(name).observe(first_byte)
        if added is not None:
            self.added.labels(name).observe(added)

    def observe_closed(
        self, name: str, version: str, *, confidence: float | None, flagged: bool, why: str = ""
    ) -> None:
        """Count a closed answer; `why` is why it has no confidence, in a word."""
        if confidence is not None:
            self.confidence.labels(name).observe(confidence)
        else:
            self.no_confidence.labels(name, why).inc()
        if flagged:
            self.flagged.labels(name, version).inc()

    def watch(
        self,
        *,
        engines: Callable[[], Iterable[EngineStatus]],
        traffic: Callable[[], Iterable[Traffic]],
        under_way: Callable[[], Mapping[str, int]],
        waiting: Callable[[], Mapping[str, int]],
    ) -> None:
        """What is looked up when somebody asks: engines, traffic, requests under way by engine and waiting by name."""
        self.registry.register(_Now(engines, traffic, under_way, waiting))

    def text(self) -> bytes:
        """All of it in Prometheus' text format; may take some milliseconds."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, says, ["name"], buckets=buckets, registry=self.registry)


class _Now(Collector):
    """Prometheus' client asks for a class of its own."""

    def __init__(
        self,
        engines: Callable[[], Iterable[EngineStatus]],
        traffic: Callable[[], Iterable[Traffic]],
        under_way: Callable[[], Mapping[str, int]],
        waiting: Callable[[], Mapping[str, int]],
    ) -> None:
        self._engines, self._traffic, self._under_way, self._waiting = engines, traffic, under_way, waiting

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now."""
        state = GaugeMetricFamily(
            "goldgate_engine_state", "1 for the state it is in.", labels=["engine", "version", "state"]
        )
        memory = GaugeMetricFamily("goldgate_engine_memory_bytes", "Of its processes.", labels=["engine"])
        for engine in self._engines():
            for one in EngineState:
                state.add_metric([engine.name, engine.version.label, one.value], float(engine.state is one))
            memory.add_metric([engine.name], float(engine.memory_bytes))
        yield state
        yield memory
        revision = GaugeMetricFamily("goldgate_traffic_revision", "Grows with each change.", labels=["name", "version"])
        for traffic in self._traffic():
            revision.add_metric([traffic.name, traffic.live.label], float(traffic.revision))
        yield revision
        busy = GaugeMetricFamily("goldgate_under_way", "Requests that an engine is answering.", labels=["engine"])
        for engine_name, count in self._under_way().items():
            busy.add_metric([engine_name], float(count))
        yield busy
        queue = GaugeMetricFamily("goldgate_waiting", "Requests that wait until others are answered.", labels=["name"])
        for name, count in self._waiting().items():
            queue.add_metric([name], float(count))
        yield queue
