"""From measured seconds to the keys that dashboards of `vllm bench` read."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """mean_, median_, std_ and percentiles of `name` ("ttft") in ms; {} without values."""
    if not seconds:
        return {}
    ms = [1000 * value for value in seconds]
    result = {
        f"mean_{name}_ms": statistics.fmean(ms),
        f"median_{name}_ms": statistics.median(ms),
        f"std_{name}_ms": statistics.pstdev(ms),
    }
    return result | {f"p{p}_{name}_ms": percentile(ms, p) for p in PERCENTILES}


def provenance() -> dict[str, Any]:
    """Command, versions, machine and date of a run."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        pass
    return {
        "command": " ".join(["qwen1m", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "qwen1m_ext": __version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }


def report(result: dict[str, Any], output: Path | None) -> None:
    """Print what a person wants to see; write everything as JSON if asked to."""
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:32} {value:12,.2f}")
        elif isinstance(value, int) and not isinstance(value, bool):
            print(f"{name:32} {value:12,}")
        elif isinstance(value, list):
            _table(value)
    if output is not None:
        output.write_text(json.dumps(result | {"run": provenance()}, indent=1) + "\n")


def _table(rows: list[dict[str, Any]]) -> None:
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    print("  ".join(f"{name:>22}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>22,.2f}" for name in names))
