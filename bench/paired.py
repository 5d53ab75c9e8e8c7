"""Fair pairs: two ways of doing one thing, timed in turn in one process, and the result as JSON.

A B A B ... with the same threads; the ratio is taken pair by pair and its median reported, so that
a machine whose speed drifts does not favour either side. Results go to bench/results, or to the
folder that the environment variable BENCH_RESULTS names.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qwen1m_ext import _host
from qwen1m_ext.request import RequestMetrics

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).resolve().parent / "results")


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], peer: Callable[[], object], pairs: int) -> dict[str, Any]:
    """Warm both up once, then time `pairs` pairs; `ratio` > 1 means ours is faster."""
    ours(), peer()
    timed = [(seconds(ours), seconds(peer)) for _ in range(pairs)]
    return summary(timed)


def summary(timed: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Medians of (our seconds, the peer's seconds) pairs."""
    ratios = [b / a for a, b in timed]
    return {
        "ours_s": statistics.median(a for a, _ in timed),
        "peer_s": statistics.median(b for _, b in timed),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": len(timed),
    }


def computed(metrics: RequestMetrics) -> None:
    """Refuse the time of a prefill of which a cache has served a part.

    Raises:
        SystemExit: with both numbers.
    """
    if metrics.cached_tokens:
        raise SystemExit(
            f"{metrics.cached_tokens} of the prompt's {metrics.prompt_tokens} tokens came from a "
            "cache: its time is not that of a prefill"
        )


def environment(*packages: str) -> dict[str, Any]:
    """What a figure needs beside it: machine, threads, versions, command, date."""
    versions = {}
    for package in ("torch", "qwen1m_ext", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line),
        platform.processor(),
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "build": _host.build_info(),
        "versions": versions,
        "load_average_at_start": os.getloadavg()[0],
    }


def write(name: str, environment: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Save <name>.json among the results; returns the path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return path


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
