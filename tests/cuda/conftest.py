"""CUDA without a GPU: the kernels are compiled and looked at, never run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import cuda_objects

compile_times: dict[str, str] = {}


@pytest.fixture(scope="session")
def kernel_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of qwen1m_cuda that hold kernels, each with its log beside it."""
    if cuda_objects.NVCC is None:
        pytest.skip("no nvcc: CUDA kernels cannot be compiled here")
    folder = cuda_objects.build_kernels(tmp_path_factory.mktemp("cuda"))
    objects = sorted(folder.glob("csrc/ops/**/*.o"))
    for path in objects:
        log = path.with_name(path.name + ".log")
        assert log.is_file(), f"{log} is missing: was {path.name} compiled by nvcc_log.sh?"
        compile_times[path.name.removesuffix(".o")] = log.read_text().splitlines()[-1]
    return objects


@pytest.fixture(scope="session")
def disassembler() -> None:
    """Skip where machine code cannot be read."""
    for name in ("cuobjdump", "nvdisasm"):
        if cuda_objects.tool(name) is None:
            pytest.skip(f"no {name}: `pip install nvidia-cuda-{name}`, or the `test` extra")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long nvcc took for each file with kernels."""
    for name, text in compile_times.items():
        terminalreporter.write_line(f"nvcc {name}: {text}")
