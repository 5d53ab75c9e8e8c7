"""The compiled CUDA kernels as files: what ptxas said of them, and their machine code.

Nothing here needs a GPU. `nvcc_log.sh` keeps the output of each nvcc run beside the object.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: of the toolkit, or of the wheels in the `test` extra."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    places += [str(path.parent) for path in sorted(wheels.glob(f"*/bin/{name}"))]
    return shutil.which(name, path=os.pathsep.join(places))


def run(*command: str | Path) -> str:
    """Output of a command; raises with all of it if the command fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def built_with_cuda(folder: Path) -> bool:
    """Whether a CMake tree compiles the CUDA kernels."""
    cache = folder / "CMakeCache.txt"
    text = cache.read_text() if cache.is_file() else ""
    return bool(
        re.search(r"^QWEN1M_CUDA:\w+=(auto|1)$", text, re.MULTILINE)
        and re.search(r"^CMAKE_CUDA_COMPILER:\w+=.*nvcc", text, re.MULTILINE)
    )


def build_kernels(scratch: Path) -> Path:
    """Folder of the objects of qwen1m_cuda, up to date.

    The tree of `make test` is used if it is there (its objects are those of the package), else one
    in `scratch`.
    """
    folder = Path(os.environ.get("QWEN1M_BUILD_DIR") or ROOT / "build" / "release")
    if not built_with_cuda(folder):
        folder = scratch
        options = ["-DQWEN1M_PYTHON=OFF", "-DQWEN1M_TESTS=OFF", "-DQWEN1M_CUDA=1"]
        run("cmake", "-S", ROOT, "-B", folder, *options)
    run("cmake", "--build", folder, "--target", "qwen1m_cuda")
    return folder / "CMakeFiles" / "qwen1m_cuda.dir"


def compile_cubin(source: Path, architecture: str, folder: Path) -> Path:
    """Compile one file for one architecture ("80", "90a"); a warning is an error."""
    cubin = folder / f"{source.stem}.cubin"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings"]
    assert NVCC
    run(
        NVCC, *flags, f"-I{ROOT}/csrc", f"-I{ROOT}/include", "-cubin",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-o", cubin, source,
    )  # fmt: skip
    return cubin


@dataclass
class Usage:
    """What ptxas says of one kernel on one architecture."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


def parse_log(text: str) -> dict[str, Usage]:
    """{"kernel@architecture": usage} from `ptxas -v`."""
    found = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        head = re.match(r"'(\w+)' for '(\w+)'", part)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        used = re.search(r"Used (\d+) registers", part)
        assert head and frame and used, f"not the output of ptxas -v: {part[:200]!r}"
        shared = re.search(r"(\d+) bytes smem", part)
        found[f"{head[1]}@{head[2]}"] = Usage(
            registers=int(used[1]),
            stack_bytes=int(frame[1]),
            spill_bytes=int(frame[2]) + int(frame[3]),
            static_shared_bytes=int(shared[1]) if shared else 0,
        )
    return found


def complaints(text: str) -> list[str]:
    """Warnings in an nvcc log, serialised products of a warpgroup (C75xx) among them."""
    return [
        line for line in text.splitlines() if re.search(r"\(C\d{4}\)|\bwarning\b|\berror\b", line)
    ]


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def parse_sass(text: str) -> dict[str, Counter[str]]:
    """{"kernel@architecture": opcodes with their number} from `cuobjdump -sass`."""
    found = {}
    architecture = ""
    for part in re.split(r"(?=^\s*(?:arch = |Function : ))", text, flags=re.MULTILINE):
        if match := re.match(r"\s*arch = (\w+)", part):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\w+)", part):
            found[f"{match[1]}@{architecture}"] = Counter(INSTRUCTION.findall(part))
    return found


def sass(file: Path) -> dict[str, Counter[str]]:
    """Machine code of an object or a cubin."""
    dump, disassembler = tool("cuobjdump"), tool("nvdisasm")
    assert dump and disassembler
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [dump, "-sass", str(file)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return parse_sass(done.stdout)


def count(opcodes: Counter[str], family: str) -> int:
    """How many instructions of a family: "HGMMA" counts HGMMA.64x128x16.F32.BF16 and the like."""
    return sum(
        number for opcode, number in opcodes.items() if (opcode + ".").startswith(family + ".")
    )
