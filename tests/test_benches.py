"""The benches run: every one of bench/ with its smallest sizes, and none is forgotten.

What they measure at these sizes says nothing and is not looked at; that something was measured, and
is written as the committed results are, is.
"""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
COMMITTED = BENCH / "results"

# Script -> what writes which results: arguments, and names below bench/results.
RUNS: dict[str, list[tuple[str, list[str]]]] = {
    "attention_cpu": [
        (
            "--pairs 1 --prefill 256 --decode 1024 --cold-mib 2",
            ["attention_prefill", "attention_decode"],
        )
    ],
    "eta_cpu": [("--tokens 4096", ["eta"])],
    "fairness_cpu": [("--tokens 4096 --shorts 1 --gap 0.05 --answer 8", ["fairness"])],
    "fp8_accuracy_cpu": [
        (
            "--samples 1 --length 1024 --tokens 256 --heads small --random-tokens 64",
            ["fp8_accuracy"],
        )
    ],
    "linear_cpu": [("--pairs 2 --size 64 --cpus AVX2", ["linear"])],
    "model_cpu": [("--pairs 2 --lengths 512 --layers 1", ["model"])],
    "offload_cpu": [("--pairs 1 --prompt 256 --chunk 128 --output 4", ["offload", "offload.png"])],
    "overlap_cpu": [("--streams 2 --prompt 64 --output 16", ["overlap", "overlap.png"])],
    "profile_cpu": [("--tokens 256 --decode 4", ["profile", "profile.png"])],
    "same_output_cpu": [("--tokens 1400 --output 16 --long 0 --dtypes float32", ["same_output"])],
    "sparse_cpu": [
        ("--tokens 512", ["sparse_prefill"]),
        ("--tokens 512 --shapes demo --dense-rows 128 --dense-seconds 0", ["sparse_prefill"]),
    ],
    "speculative_cpu": [("--pairs 1 --prompt 400 --tokens 8", ["speculative"])],
}
HELPERS = {"paired", "timeline"}  # what the scripts share
GPU_SCRIPTS = sorted(path.stem for path in (BENCH / "e2e").glob("*.py"))
GPU_PROGRAMS = sorted(path.stem for path in (BENCH / "kernels").glob("*.cu"))
ENVIRONMENT = {"build", "command", "cores", "cpu", "date", "threads", "versions"}


def run(command: list[str], results: Path) -> subprocess.CompletedProcess[str]:
    """A command with the package of this process and its results in a folder."""
    import qwen1m_ext

    package = Path(qwen1m_ext.__file__).parents[1]
    environment = os.environ | {"BENCH_RESULTS": str(results), "PYTHONPATH": str(package)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def keys(rows: list[dict[str, Any]]) -> set[str]:
    return {key for row in rows for key in row}


@pytest.mark.soak
@pytest.mark.parametrize("script", RUNS)
def test_a_bench_writes_what_the_tables_are_made_of(script: str, tmp_path: Path) -> None:
    for arguments, names in RUNS[script]:
        for package in ("matplotlib", "transformers"):
            if package in (BENCH / f"{script}.py").read_text() and find_spec(package) is None:
                pytest.skip(f"needs {package}")
        path = f"bench/{script}.py"
        done = run([sys.executable, path, *arguments.split()], tmp_path)
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}{done.stderr}"
        for name in names:
            if name.endswith(".png"):
                assert (tmp_path / "cpu" / name).read_bytes().startswith(b"\x89PNG")
                continue
            written = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
            where, rows = written["environment"], written["rows"]
            assert where.keys() >= ENVIRONMENT
            assert where["command"] == f"python {path} {arguments}"
            assert where["versions"]["torch"] == torch.__version__
            committed = json.loads((COMMITTED / "cpu" / f"{name}.json").read_text())
            missing = keys(committed["rows"]) - keys(rows)
            assert not missing, f"{script} {arguments}: no row has {sorted(missing)}"
            for row in rows:
                if "ratio" in row:
                    assert math.isfinite(row["ratio"]) and row["ratio"] > 0 < row["pairs"], row


@pytest.mark.soak
def test_the_peak_of_a_core(tmp_path: Path) -> None:
    """Built as its first lines say."""
    text = (BENCH / "cpu_peak.cpp").read_text()
    command = re.search(r"^// +(g\+\+ .*) && \./cpu_peak$", text, re.MULTILINE)
    assert command is not None
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = str(tmp_path / "cpu_peak")
    done = run([program if w == "cpu_peak" else w for w in command[1].split()], tmp_path)
    assert done.returncode == 0, done.stderr
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx512_bf16" not in flags:
        pytest.skip("built; this CPU has no AVX512_BF16")
    figures = re.findall(r"(\S+) G(?:FLOP|B)/s", run([program], tmp_path).stdout)
    assert len(figures) >= 3 and all(float(figure) > 0 for figure in figures)


def test_no_bench_is_forgotten() -> None:
    assert set(RUNS) | HELPERS == {path.stem for path in BENCH.glob("*.py")}
    assert all(script.endswith("_cpu") for script in RUNS)  # what `make bench` runs
    assert {path.name for path in BENCH.iterdir() if path.is_dir()} - {"__pycache__"} == {
        "e2e", "kernels", "results",
    }  # fmt: skip
    assert {p.name for p in BENCH.glob("*.*") if p.suffix != ".py"} == {"cpu_peak.cpp"}
    stages = (ROOT / "tests" / "gpu" / "run.py").read_text()
    for script in GPU_SCRIPTS:
        assert f"{script}.py" in stages, script
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for program in GPU_PROGRAMS:
        assert f"q1m_cuda_program({program} " in cmake and f'program("{program}"' in re.sub(
            r"\(\s+", "(", stages
        ), program


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, options) of the commands in a text; one may go on in indented lines."""
    found = re.findall(r"python (bench/\S+\.py)((?:[^`\n]|\n +(?=\[))*)", text)
    return [(script, re.findall(r"--[a-z][a-z-]*", rest)) for script, rest in found]


def test_written_commands_name_scripts_and_options_that_exist() -> None:
    """In the documents and at the head of each script."""
    texts = [path.read_text() for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md")]
    texts += [path.read_text().split('"""')[1] for path in BENCH.rglob("*.py")]
    written = [command for text in texts for command in commands(text)]
    assert {script for script, _ in written} >= {f"bench/{script}.py" for script in RUNS}
    assert sum(len(options) for _, options in written) > 40
    for script, options in written:
        source = (ROOT / script).read_text()
        for option in options:
            assert f'"{option}"' in source, f"{script} has no {option}"


@pytest.mark.parametrize("script", GPU_SCRIPTS)
def test_a_gpu_bench_says_what_it_takes_and_what_it_needs(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BENCH / "e2e" / f"{script}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def ended(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        return end.value.code

    assert ended("--help") == 0
    assert "--json" in capsys.readouterr().out
    assert ended("--json") == 2 and ended("--nonsense", "1") == 2
    written = tmp_path / "results.json"
    message = ended("--json", str(written))
    assert isinstance(message, str) and message.startswith("needs a GPU"), message
    assert not written.exists()


@pytest.mark.parametrize("program", GPU_PROGRAMS)
def test_a_gpu_program_says_what_it_takes_and_what_it_needs(program: str, tmp_path: Path) -> None:
    built = Path(os.environ.get("QWEN1M_BUILD_DIR") or ROOT / "build" / "release") / program
    if not built.is_file():
        pytest.skip(f"{program} is not built (make test builds it where there is nvcc)")
    written = tmp_path / "results.json"
    for arguments, words in [
        ("--nonsense 1", ["--json", "--ceiling", "--runs", "--nonsense"]),
        ("--json", ["--json"]),
        ("--runs many", ["--runs", "many"]),
        (f"--json {written}", ["needs a GPU"]),
    ]:
        done = subprocess.run(
            [str(built), *arguments.split()], capture_output=True, text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1, (arguments, done)
        assert all(word in done.stderr for word in words), (arguments, done.stderr)
    assert not written.exists()
