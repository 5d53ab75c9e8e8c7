"""Same output on a device with a queue: tokens feed the next step before the host sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.lazy_device import LazyDevice
from lib.recording_device import RecordingDevice
from lib.same_output import WAYS, Answer, Case, Setup, alone, compare, make_cases
from qwen1m_ext import demo_model_path
from qwen1m_ext.engine import Engine
from qwen1m_ext.sparse_config import SparseSettings

pytestmark = pytest.mark.soak

WINDOW = 1024


class OnDevice(Setup):
    """Engines of a setup, each with a device of its own."""

    def engine(self, cases: list[Case], **more: Any) -> Engine:
        return super().engine(cases, device=RecordingDevice(), **more)


class Offloaded(Setup):
    """The same, with layers in host memory and copies as late as their order allows."""

    def engine(self, cases: list[Case], **more: Any) -> Engine:
        return super().engine(cases, device=LazyDevice("computation"), kv_offload="host", **more)


@pytest.fixture(scope="module", params=["dense", "sparse"])
def single(request: pytest.FixtureRequest) -> tuple[Setup, list[Case], list[Answer]]:
    """What requests give alone, on the CPU."""
    options: dict[str, object] = {"dtype": "float32", "attention": request.param}
    if request.param == "sparse":
        options["sparse_settings"] = SparseSettings(positions="real", window_tokens=WINDOW)
    setup = Setup(Path(demo_model_path()), options, WINDOW if request.param == "sparse" else 256)
    cases = make_cases([1400, 5000], max_tokens=32)
    return setup, cases, alone(setup, cases)


@pytest.mark.parametrize("kind", [OnDevice, Offloaded])
@pytest.mark.parametrize("way", WAYS)
def test_same_output(
    single: tuple[Setup, list[Case], list[Answer]], way: str, kind: type[Setup]
) -> None:
    """float32: every token is the CPU's. In a session the host has to see log probabilities."""
    setup, cases, want = single
    on_device = kind(setup.model_dir, setup.options, setup.small_chunk)
    if "session" not in way:
        cases = [replace(case, noted=False) for case in cases]
    report = compare(*WAYS[way](on_device, cases, want))
    assert report.requests and not report.beyond and report.differing == 0
