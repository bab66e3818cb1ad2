"""What the engine has done, as Prometheus reads it.

In: an `Engine`. Out: text. Everything is counted by the engine; nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pi_gguf.engine.jobs import Figures

CONTENT_TYPE = CONTENT_TYPE_LATEST

_GAUGES = {
    "slots": "Requests that are worked on at a time, at most",
    "busy": "Requests that are worked on",
    "waiting": "Requests that wait",
    "cache_tokens": "Tokens that the cache has room for",
    "cache_used": "Tokens in the cache",
}
_COUNTERS = {
    "read_tokens": "Tokens of prompts that were read",
    "known_tokens": "Tokens of prompts that were in the cache already",
    "written_tokens": "Tokens that were written",
    "requests": "Requests that were taken",
    "cancelled": "Requests that ended before their answer did",
    "failed": "Requests that ended in an error",
    "preempted": "Requests that gave up their place in the cache and were read again",
    "read_seconds": "Seconds that batches with prompts took",
    "write_seconds": "Seconds that batches without prompts took",
}


class _OfEngine(Collector):
    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"pi_gguf_{name}", text, value=getattr(figures, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"pi_gguf_{name}", text, value=getattr(figures, name))


class Metrics:
    """A registry of its own: two engines in a process know nothing of each other."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_OfEngine(figures))

    def text(self) -> bytes:
        return generate_latest(self._registry)
