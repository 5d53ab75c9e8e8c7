"""The compiled operators with CUDA inside still load where there is no CUDA."""

from __future__ import annotations

import shutil

import pytest

from lib import cuda_objects
from qwen1m_ext import ops
from qwen1m_ext._host import build_info


@pytest.fixture(scope="module")
def symbols() -> list[str]:
    """Dynamic symbols of _C, as lines of nm."""
    if not build_info()["cuda"]:
        pytest.skip("qwen1m_ext was built without CUDA")
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    return cuda_objects.run("nm", "--dynamic", ops.library_path()).splitlines()


def test_nothing_of_cuda_is_needed_to_load(symbols: list[str]) -> None:
    """The runtime is inside, the driver looked up, torch's stream function a weak reference."""
    undefined = {line.split()[-1] for line in symbols if line.split()[-2] == "U"}
    weak = {line.split()[-1] for line in symbols if line.split()[-2] == "w"}
    assert not [name for name in undefined if name.startswith(("cuda", "cu", "__cuda"))]
    assert "aoti_torch_get_current_cuda_stream" not in undefined
    if ops.cuda_kernels():
        assert "aoti_torch_get_current_cuda_stream" in weak


def test_the_cuda_runtime_inside_is_not_exported(symbols: list[str]) -> None:
    """Torch's own CUDA runtime, of another version, would otherwise meet ours."""
    defined = [line for line in symbols if line.split()[-2] in "TtDdBbVvW"]
    assert not [line for line in defined if "cuda" in line.split()[-1].lower()]


def test_build_facts(symbols: list[str]) -> None:
    """Every op with a kernel says for what it was compiled."""
    for op, architectures in ops.cuda_kernels().items():
        assert op in ops.OP_NAMES
        assert architectures and set(architectures) <= {"sm_80", "sm_90a"}
