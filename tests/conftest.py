"""What pytest needs to know for every test: the devices."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # lib and reference, from any working directory

# Idle threads of torch's pool sleep instead of spinning, here and in the processes that tests
# start: on cores that others use too, the suite takes half the time (and no test is about time).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The servers of the tests are on this machine, whatever proxy it has.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
    filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"))
)

DEVICES = ("cpu", "emu", "cuda")

if find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # The same examples every time, however slow the machine is. Others: --hypothesis-profile=random
    fixed = settings(
        derandomize=True, database=None, deadline=None, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    settings.register_profile("fixed", fixed)
    settings.register_profile("random", fixed, derandomize=False)
    settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device: where the op tests run."""
    parser.addoption(
        "--device",
        default="cpu,emu",
        help="comma-separated devices of the op tests: cpu, emu (emulated kernels), cuda",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse an unknown device before anything runs."""
    config.addinivalue_line("markers", "isa: run again for every CPU instruction set (test_isa.py)")
    for device in selected_devices(config):
        if device not in DEVICES:
            raise pytest.UsageError(f"--device: expected some of {DEVICES}, got {device!r}")


def selected_devices(config: pytest.Config) -> list[str]:
    """The devices named by --device."""
    return str(config.getoption("--device")).split(",")


def why_unavailable(device: str) -> str | None:
    """None if the op tests can run on a device, else the reason they cannot."""
    if device == "emu":
        from lib.emulator import library_path

        return None if library_path() else "libqwen1m_emu_ops.so is not built (make test builds it)"
    if device == "cuda":
        import torch

        from qwen1m_ext import ops

        if not ops.cuda_kernels():
            return "qwen1m_ext was built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device"
    return None


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> str:
    """Skip, with the reason, where tests of a GPU cannot run."""
    if "cuda" not in selected_devices(request.config):
        pytest.skip("cuda: not asked for (--device=cuda)")
    if reason := why_unavailable("cuda"):
        pytest.skip(f"cuda: {reason}")
    return "cuda"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the GPU variants of a test where the kernels do not take its inputs."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    device = str(parameters.get("device"))
    if not device.startswith(("emu", "cuda")) or why_unavailable(device.split("_")[0]):
        return
    from lib.gpu_limits import why_not_on_gpu

    op = parameters.get("op") or item.path.stem.removeprefix("test_")
    reason = why_not_on_gpu(op, getattr(item, "originalname", item.name), parameters)
    if reason:
        pytest.skip(f"{device}: {reason}")


def emulated_devices(metafunc: pytest.Metafunc) -> list[str]:
    """A device for each emulated kernel of the op that a test module is about; [] without any."""
    from lib.emulator import OPS

    op = Path(metafunc.module.__file__).stem.removeprefix("test_")
    return ["emu_sm80"] if op == "gpu_refusals" else OPS.get(op, [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a `device` argument once per selected device; skip it where it cannot run."""
    if "device" not in metafunc.fixturenames:
        return
    parameters = []
    for device in selected_devices(metafunc.config):
        reason = why_unavailable(device)
        marks = [pytest.mark.skip(reason=f"{device}: {reason}")] if reason else []
        names = emulated_devices(metafunc) if device == "emu" else [device]
        parameters += [pytest.param(name, marks=marks, id=name) for name in names]
    metafunc.parametrize("device", parameters)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how near the errors came to their budgets, and which devices were not asked for."""
    from lib.compare import used

    if used:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(used.items()))
        terminalreporter.write_line(f"error budgets used: {shares}")
    left = [device for device in DEVICES if device not in selected_devices(config)]
    if left:
        terminalreporter.write_line(f"op tests not run on: {', '.join(left)} (see --device)")
