"""Stuck is told apart from slow, in ticks and not by a clock."""

from __future__ import annotations

import pytest

from lib.recording_device import RecordingDevice
from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import ConfigError
from qwen1m_ext.heartbeat import START_SECONDS, Observer, Pulse, Silence, tick_seconds


@pytest.fixture
def pulses():
    return {"runner": Pulse(), "scheduler": Pulse()}


def looks(observer: Observer, ticks: int) -> list[str | None]:
    return [observer.look(1.0) for _ in range(ticks)]


def test_who_is_idle_is_not_stuck(pulses):
    assert not any(looks(Observer(pulses, lambda: False, 5.0), 100))


def test_work_without_progress_is_stuck_after_the_timeout(pulses):
    observer = Observer(pulses, lambda: True, 5.0)
    pulses["runner"].begin()
    assert not any(looks(observer, 5))  # the first look sees it begin
    assert observer.look(1.0) == "its runner made no progress for 5 s"
    pulses["runner"].beat()
    assert not any(looks(observer, 5))
    pulses["runner"].end()
    pulses["scheduler"].begin()
    assert not any(looks(observer, 5))
    assert "scheduler" in str(observer.look(1.0))


def test_a_long_step_has_ten_times_its_predicted_time_for_each_layer(pulses):
    observer = Observer(pulses, lambda: True, 5.0)
    pulses["runner"].begin(30.0)
    for _ in range(4):  # layers
        assert not any(looks(observer, 300))
        pulses["runner"].beat()
    assert not any(looks(observer, 300))
    assert observer.look(1.0) == "its runner made no progress for 300 s"


def test_requests_that_nobody_works_for(pulses):
    waiting = True
    observer = Observer(pulses, lambda: waiting, 5.0)
    for _ in range(20):  # work between two looks is work
        pulses["scheduler"].begin()
        pulses["scheduler"].end()
        assert not observer.look(1.0)
    assert not any(looks(observer, 4))
    assert observer.look(1.0) == "requests wait, but it made no progress for 5 s"
    waiting = False
    assert not observer.look(1.0)


def test_silence():
    silence = Silence(5.0)
    assert not any(silence.look(1.0) for _ in range(int(START_SECONDS) - 1))
    assert silence.look(1.0) == "its process gave no sign of life for 600 s"
    silence.begin()
    silence.heard()
    assert not any(silence.look(1.0) for _ in range(4))
    assert silence.look(1.0) == "its process gave no sign of life for 5 s"


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none(timeout):
    with pytest.raises(ConfigError, match="engine_timeout_seconds"):
        tick_seconds(timeout)


def test_every_layer_of_a_real_step_is_progress():
    """Each layer takes almost the timeout, the step far more; then one takes too long."""
    engine = Engine(demo_model_path(), dtype="float32", max_model_len=2048)
    observer = Observer({"model runner": engine._core.runner.pulse}, lambda: True, 1000.0)
    seen: list[str | None] = []
    ticks = [999] * 3 + [1001]

    def on_progress(_) -> None:  # called after every layer, on the runner's thread
        if ticks:
            seen.append(next(filter(None, looks(observer, ticks.pop(0))), None))

    params = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.submit("x" * 1000, params, on_progress=on_progress).result()
    assert seen == [None] * 3 + ["its model runner made no progress for 1000 s"]
    engine.shutdown()
    assert not any(looks(engine.observer(1000.0), 2000))


def test_who_waits_for_a_device_has_the_time_of_its_step(checkpoint, monkeypatch):
    engine = Engine(checkpoint, device=RecordingDevice(), max_model_len=512)
    core, seen = engine._core, []
    pulses = {name: core._pulses[name] for name in ("model runner", "output processor")}
    observer = Observer(pulses, lambda: True, 1000.0)
    monkeypatch.setattr(core.scheduler.cost, "seconds", lambda work: 500.0 * len(list(work)))
    run = core.runner.run

    def run_and_look(step):
        result = run(step)
        finish = result.finish

        def look_and_finish():
            seen.extend(filter(None, looks(observer, 4999)))
            finish()

        result.finish = look_and_finish
        return result

    monkeypatch.setattr(core.runner, "run", run_and_look)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.submit([1, 2, 3], params).result()
    assert not seen
    engine.shutdown()
