"""No launcher calls what a CUDA graph's capture forbids: read off the sources, no GPU needed.

tests/engine/test_capture_safety.py says the same of the Python around them, tests/cuda/
test_gpu_ops.py captures every op where there is a GPU.
"""

from __future__ import annotations

import re

from lib.cuda_objects import ROOT

# Queries of the device, a kernel's own attribute, the launch; errors. Nothing that allocates,
# copies, waits or touches another stream.
ALLOWED = {
    "cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernelExC",
    "cudaGetDriverEntryPointByVersion", "cudaGetLastError", "cudaGetErrorName",
    "cudaGetErrorString",
}  # fmt: skip


def calls(text: str) -> set[str]:
    """Functions of the CUDA runtime and driver that a source calls."""
    code = re.sub(r"//.*", "", text)
    return set(re.findall(r"\b(cu(?:da)?[A-Z]\w*)\s*\(", code))


def test_launchers_call_nothing_that_a_capture_forbids() -> None:
    found = {
        (path.name, name)
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".cu", ".cuh", ".h", ".cpp")
        for name in calls(path.read_text())
    }
    assert {"cudaLaunchKernelExC", "cudaGetDevice"} <= {name for _, name in found}
    assert {(file, name) for file, name in found if name not in ALLOWED} == set()


def test_a_forbidden_call_is_found() -> None:
    text = "// cudaFree(x)\n  Q1M_CUDA_CHECK(cudaMallocAsync(&p, 8, s));\n cuMemAlloc(&p, 8);"
    assert calls(text) - ALLOWED == {"cudaMallocAsync", "cuMemAlloc"}
