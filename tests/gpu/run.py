"""Everything that needs a GPU, in one go: `make gpu`, or `python tests/gpu/run.py [stage ...]`.

Needs CMake, a C++ compiler, nvcc, torch with CUDA (2.11 or newer) and pytest; no pip, no network.
Builds into $BUILD (default build/gpu-tree) and writes into $OUT (default build/gpu):
summary.json, one log per stage, the benches' JSON. A stage that fails does not stop the others
(unless they cannot run without it); the exit status is 0 only if none failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
BUILD = Path(os.environ.get("BUILD") or ROOT / "build" / "gpu-tree").resolve()
PACKAGE = BUILD / "package"
SECONDS = 900  # a stage that takes longer has failed

FUSED_TESTS = [
    "tests/ops/test_embedding.py", "tests/ops/test_rms_norm.py", "tests/ops/test_swiglu.py",
    "tests/ops/test_qkv_rope_append.py", "tests/ops/test_widen_pages.py",
    "tests/ops/test_sample.py",
]  # fmt: skip
OP_TESTS = [
    "tests/ops/test_prefill_attention.py", "tests/ops/test_decode_attention.py",
    "tests/ops/test_sparse_estimate.py", "tests/ops/test_sparse_plan.py",
    "tests/ops/test_sparse_prefill.py",
    "tests/ops/test_registration.py", *FUSED_TESTS, "tests/ops/test_gpu_refusals.py",
    "tests/cuda/test_gpu_ops.py", "--device=cuda",
]  # fmt: skip
# Small shapes for the sanitizers, which slow a kernel down by a factor of 10 to 100.
SMALL = (
    "test_matches_definition and bf16 and (page_plus_1 or two_chunks_clamp or chunk_896_border"
    " or vectors_of_8 or qwen_7b or chunk_border or page_edges or gqa_7 or split_edges"
    " or everything)"
)
NO_GPU = "no CUDA device"  # the reason of tests/conftest.py
NEEDED_BY_ALL = ("configure", "build", "package")


@dataclass
class Result:
    """What became of one stage."""

    stage: str
    status: str  # ok, failed or skipped
    seconds: float = 0
    command: str = ""
    note: str = ""


def pytest(*arguments: str) -> list[str]:
    """A command that runs tests against the package built here."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def sanitizer(name: str) -> list[str] | str:
    """One tool of compute-sanitizer over the small shapes, or why not."""
    path = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if path is None:
        return "compute-sanitizer is not installed"
    tests = pytest(
        "tests/ops/test_prefill_attention.py",
        "tests/ops/test_decode_attention.py",
        *FUSED_TESTS,
        "--device=cuda",
        "-k",
        SMALL,
    )
    return [path, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *tests]


def program(name: str, *arguments: str) -> list[str] | str:
    """A program of the CMake tree, or why not."""
    path = BUILD / name
    return [str(path), *arguments] if path.is_file() else f"{path} was not built"


def bench_ceiling() -> list[str]:
    """`--ceiling` with the matrix product that the SDPA bench measured, if it has."""
    try:
        environment = json.loads((OUT / "prefill_attention_sdpa.json").read_text())["environment"]
        return ["--ceiling", str(environment["ceiling_tflops"])]
    except (OSError, ValueError, KeyError):
        return []


def command_of(stage: str) -> list[str] | str:
    """The command of a stage, or the reason why it cannot run here."""
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    sdpa = str(ROOT / "bench" / "e2e" / "prefill_attention_sdpa.py")
    commands = {
        "device": ["nvidia-smi"],
        "configure": [
            "cmake", "-S", str(ROOT), "-B", str(BUILD), *ninja, "-DQWEN1M_CUDA=1",
            "-DQWEN1M_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}",
        ],
        "build": [
            "cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count()), "--target", "_C",
            "_host", "conformance_gpu", "decode_attention_bench", "fused_bench",
            "prefill_attention_bench", "sparse_prefill_bench", "tma_bandwidth_bench",
        ],
        "package": [
            "cmake", "--install", str(BUILD), "--component", "python",
            "--prefix", str(PACKAGE / "qwen1m_ext"),
        ],
        "doctor": [sys.executable, "-m", "qwen1m_ext", "doctor"],
        "stream": pytest("tests/cuda/test_gpu_ops.py", "--device=cuda", "-k", "stream or graph"),
        "conformance": program(
            "tests/arch/conformance_gpu", "--json", str(OUT / "conformance.json")
        ),
        "ops": pytest(*OP_TESTS),
        "ops-sm80": pytest(*OP_TESTS),
        "model": pytest("tests/gpu/test_model.py", "tests/engine/test_device.py", "--device=cuda"),
        "kernels": pytest("tests/cuda/test_kernels.py", "tests/cuda/test_library.py"),
        "memcheck": sanitizer("memcheck"),
        "racecheck": sanitizer("racecheck"),
        "synccheck": sanitizer("synccheck"),
        "bench-tma": program(
            "tma_bandwidth_bench", "--json", str(OUT / "tma_bandwidth.json")
        ),
        "bench-fused": program("fused_bench", "--json", str(OUT / "fused.json")),
        "bench-norms": [
            sys.executable, str(ROOT / "bench" / "e2e" / "norms_torch.py"),
            "--json", str(OUT / "norms_torch.json"),
        ],
        "bench-decode": program(
            "decode_attention_bench", "--json", str(OUT / "decode_attention.json")
        ),
        "bench-decode-sdpa": [
            sys.executable, str(ROOT / "bench" / "e2e" / "decode_attention_sdpa.py"),
            "--json", str(OUT / "decode_attention_sdpa.json"),
        ],
        "bench-sdpa": [sys.executable, sdpa, "--json", str(OUT / "prefill_attention_sdpa.json")],
        "bench-sparse": program(
            "sparse_prefill_bench", "--json", str(OUT / "sparse_prefill.json"), *bench_ceiling()
        ),
        "bench-offload": [
            sys.executable, str(ROOT / "bench" / "e2e" / "offload_gpu.py"),
            "--json", str(OUT / "offload.json"),
        ],
        "bench-speculative": [
            sys.executable, str(ROOT / "bench" / "e2e" / "speculative_gpu.py"),
            "--json", str(OUT / "speculative.json"),
        ],
        "bench-model": [
            sys.executable, str(ROOT / "bench" / "e2e" / "model_gpu.py"),
            "--json", str(OUT / "model.json"), "--models", "7b", "14b", "--seconds", "700",
        ],
        "bench-kernel": program(
            "prefill_attention_bench", "--json", str(OUT / "prefill_attention.json"),
            *bench_ceiling(),
        ),
    }  # fmt: skip
    return commands[stage]


STAGES = (
    "device", "configure", "build", "package", "doctor", "stream", "conformance", "ops", "ops-sm80",
    "model", "kernels", "memcheck", "racecheck", "synccheck", "bench-tma", "bench-fused",
    "bench-norms", "bench-decode", "bench-decode-sdpa", "bench-sdpa", "bench-kernel",
    "bench-sparse", "bench-offload", "bench-speculative", "bench-model",
)  # fmt: skip


def run_stage(stage: str) -> Result:
    """Run one stage; its output goes to the terminal's log file and its end to the terminal."""
    command = command_of(stage)
    if isinstance(command, str):
        return Result(stage, "skipped", note=command)
    if stage == "package":
        shutil.rmtree(PACKAGE, ignore_errors=True)
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "python" / "qwen1m_ext", PACKAGE / "qwen1m_ext", ignore=ignore)
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "QWEN1M_BUILD_DIR": str(BUILD)}
    if stage == "ops-sm80":
        environment["QWEN1M_CUDA_KERNELS"] = "sm80"
    begin = time.monotonic()
    log = OUT / f"{stage}.log"
    note = ""
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            code = process.wait(SECONDS)
            if code:
                note = f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            code, note = 1, f"took longer than {SECONDS} s"
        except OSError as error:
            code, note = 1, str(error)
    text = log.read_text(errors="replace")
    if code == 0 and "--device=cuda" in command and (NO_GPU in text or " passed" not in text):
        code, note = 1, "the tests did not run on a GPU"  # skipped is not passed
    for line in text.splitlines()[-12 if code else -3 :]:
        print(f"    {line}")
    seconds = round(time.monotonic() - begin, 1)
    return Result(stage, "failed" if code else "ok", seconds, " ".join(command), note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("stage", nargs="*", help=f"some of {', '.join(STAGES)}; default: all")
    wanted = parser.parse_args(arguments).stage or list(STAGES)
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]}; expected some of {', '.join(STAGES)}")
    OUT.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    broken = ""
    for stage in (stage for stage in STAGES if stage in wanted):
        print(f"== {stage}", flush=True)
        result = (
            Result(stage, "skipped", note=f"needs {broken}, which failed")
            if broken
            else run_stage(stage)
        )
        results.append(result)
        print(f"   {result.status} {result.seconds} s {result.note}", flush=True)
        if result.status == "failed" and stage in NEEDED_BY_ALL:
            broken = stage
        summary = {"stages": [asdict(one) for one in results]}
        (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [result.stage for result in results if result.status == "failed"]
    skipped = [result.stage for result in results if result.status == "skipped"]
    print(f"{len(results)} stages; failed: {', '.join(failed) or 'none'}; skipped: "
          f"{', '.join(skipped) or 'none'}; {OUT / 'summary.json'}")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
