"""What /metrics tells Prometheus; vLLM's names under the prefix `qwen1m:`, so dashboards fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..events import EngineStats, Finished

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 2400)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests being computed", lambda s: s.requests_running),
    "num_requests_waiting": ("Requests waiting for their turn", lambda s: s.requests_waiting),
    "kv_cache_usage_perc": (
        "Share of the cache's pages in use (1: all)",
        lambda s: s.pages_used / s.pages_total if s.pages_total else 0.0,
    ),
    "kv_cache_pages_used": ("Pages held by requests, sessions and pins", lambda s: s.pages_used),
    "kv_cache_pages_cached": ("Pages free but good for a prefix", lambda s: s.pages_cached),
    "kv_cache_pages_pinned": ("Pages held by pins", lambda s: s.pages_pinned),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("Prompt tokens", lambda s: s.prompt_tokens_total),
    "generation_tokens": ("Output tokens", lambda s: s.output_tokens_total),
    "prefix_cache_queries": ("Prompt tokens looked up", lambda s: s.prompt_tokens_total),
    "prefix_cache_hits": ("Prompt tokens not computed again", lambda s: s.cached_tokens_total),
    "num_preemptions": ("Requests put back for want of pages", lambda s: s.preemptions_total),
    "kv_cache_evictions": ("Cached pages given to others", lambda s: s.evictions_total),
    "discarded_tokens": ("Tokens computed beyond a stop", lambda s: s.discarded_tokens_total),
    "engine_steps": ("Steps of the model runner", lambda s: s.steps_total),
}


class Metrics:
    """The server's registry: histograms are fed by requests, the rest is read when scraped."""

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        running: Callable[[], list[dict[str, Any]]],
        restarts: Callable[[], int],
    ) -> None:
        """Prepare.

        Args:
            stats: of the engine; None while it loads.
            running: status of every request.
            restarts: how often the engine's process has been replaced.
        """
        self.registry = CollectorRegistry()
        self._stats, self._running, self._restarts = stats, running, restarts

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram("qwen1m:" + name, text, buckets=buckets, registry=self.registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From submission to the first token", _SECONDS
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two tokens of a request", _TOKEN_SECONDS
        )
        self._end_to_end = histogram(
            "e2e_request_latency_seconds", "From submission to the end", _SECONDS
        )
        self._prefill = histogram("request_prefill_time_seconds", "Prefill of a request", _SECONDS)
        self._finished = Counter(
            "qwen1m:request_success",
            "Requests that ended, by reason",
            ["finished_reason"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def finished(self, event: Finished, seconds: float) -> None:
        """A prompt has ended."""
        reason = "error" if event.error else "abort" if event.cancelled else "complete"
        self._finished.labels(finished_reason=reason).inc()
        if reason == "complete":
            self._end_to_end.observe(seconds)
            self._prefill.observe(event.metrics.prefill_seconds)

    def collect(self) -> Iterable[Metric]:
        """For Prometheus: the engine's numbers and the progress of the slowest prefill."""
        stats = self._stats()
        if stats is not None:
            for name, (text, read) in _GAUGES.items():
                yield GaugeMetricFamily("qwen1m:" + name, text, read(stats))
            for name, (text, read) in _COUNTERS.items():
                yield CounterMetricFamily("qwen1m:" + name, text, read(stats))
        yield CounterMetricFamily(
            "qwen1m:engine_restarts",
            "Engine processes that died and were replaced",
            self._restarts(),
        )
        prefills = [
            s for s in self._running() if s["state"] in ("queued", "prefill") and s["total"]
        ]
        slowest = max(prefills, key=lambda s: s["eta_ms"] or 0, default=None)
        ratio = slowest["done"] / slowest["total"] if slowest else 1.0
        eta = (slowest["eta_ms"] or 0) / 1000 if slowest else 0.0
        yield GaugeMetricFamily(
            "qwen1m:prefill_progress_ratio", "Of the prefill that ends last (1: none)", ratio
        )
        yield GaugeMetricFamily(
            "qwen1m:prefill_eta_seconds", "Until the last running prefill ends", eta
        )
