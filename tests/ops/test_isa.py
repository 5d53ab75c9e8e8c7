"""The tests marked `isa`, again for each instruction set the kernels were compiled for.

The instruction set is chosen once per process, so each runs in a process of its own; the one of
this process is left out, because the marked tests themselves run on it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen1m_ext import _host

ISAS = ("portable", "avx512", "avx512_bf16", "amx")  # each contains those before it
OPS = Path(__file__).parent
GOLDEN = OPS.parent / "golden"


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != _host.build_info()["cpu_isa"]])
def test_ops_on_isa(isa: str) -> None:
    """Every case of every op on this instruction set."""
    facts = _host.build_info()
    best = min(facts["cpu_isas_compiled"][-1], facts["cpu_isa_machine"], key=ISAS.index)
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"{isa}: this build and machine go up to {best}")
    environment = os.environ | {"QWEN1M_CPU_ISA": isa}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(OPS),
        str(GOLDEN),
        "-m",
        "isa",
        "--device=cpu",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(
        command, env=environment, cwd=OPS.parent.parent, capture_output=True, text=True
    )
    print(result.stdout[-2000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) > 150, "the marked tests did not run"


def test_an_isa_that_does_not_exist_is_refused() -> None:
    """The message names the variable, what it may be and what it was."""
    code = (
        "import torch; from qwen1m_ext import ops; ops.swiglu(torch.ones(1, 1), torch.ones(1, 2))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"QWEN1M_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    for word in ("QWEN1M_CPU_ISA", "portable", "sse9"):
        assert word in result.stderr
