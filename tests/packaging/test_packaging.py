"""What an installation needs: sources every Python reads, a complete sdist, a build without CUDA.

The slow half (a wheel from the sdist, an editable install, a path with spaces) is
check_install.sh beside this file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINOR_VERSIONS = (10, 11, 12, 13)  # of Python 3; pyproject.toml says >= 3.10


def interpreters() -> dict[str, str]:
    """Version -> path of the supported Pythons of this machine, the running one included."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in MINOR_VERSIONS:
        name = f"python3.{minor}"
        for path in [*sorted(pyenv.glob(f"3.{minor}.*/bin/{name}")), shutil.which(name)]:
            if path and f"3.{minor}" not in found:
                run = subprocess.run([str(path), "-c", ""], capture_output=True)
                if run.returncode == 0:  # a pyenv shim of a version that is not active fails
                    found[f"3.{minor}"] = str(path)
    return found


def sources(*folders: str) -> list[Path]:
    """Files below some folders of the repository, without what builds leave there."""
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file()
        and path.suffix not in (".pyc", ".so")
        and not any(part.endswith(".egg-info") for part in path.parts)
    ]


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in MINOR_VERSIONS])
def test_every_supported_python_compiles_the_sources(version: str) -> None:
    """Syntax only: imports would need a torch for each."""
    if version not in interpreters():
        pytest.skip(f"no Python {version} on this machine")
    files = [str(p) for p in sources("python", "recipes", "bench", "tests") if p.suffix == ".py"]
    assert len(files) > 60
    code = (
        "import sys\n"
        "for name in sys.stdin.read().split('\\n'):\n"
        "    compile(open(name, encoding='utf-8').read(), name, 'exec')\n"
    )
    run = subprocess.run(
        [interpreters()[version], "-c", code],
        input="\n".join(files),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    """Every source of the package and of its compiled modules, and nothing that was built."""
    pytest.importorskip("setuptools", minversion="77", reason="building an sdist needs it")
    copy = tmp_path / "copy"  # setuptools writes an .egg-info beside the package
    kept = ["pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "CMakePresets.json",
            "Makefile", "README.md", "LICENSE"]  # fmt: skip
    copy.mkdir()
    for name in kept:
        shutil.copy(ROOT / name, copy)
    for folder in ("python", "csrc", "include"):
        # without what other tests may be writing at the moment
        built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, ignore=built)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {str(p.relative_to(ROOT)) for p in sources("python", "csrc", "include")}
    assert {"python/qwen1m_ext/py.typed", "python/qwen1m_ext/demo_model/config.json"} <= needed
    assert needed | set(kept) <= names, sorted((needed | set(kept)) - names)
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def configure(tmp_path: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    """Run CMake's configuration as if its search for nvcc had found none."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on PATH")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DQWEN1M_PYTHON=OFF",
               "-DQWEN1M_TESTS=OFF", f"-DQWEN1M_CUDA={cuda}", "-DQ1M_NVCC=",
               "-DCMAKE_MESSAGE_LOG_LEVEL=NOTICE"]  # fmt: skip
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_nvcc_one_line_says_so_and_the_build_goes_on(tmp_path: Path) -> None:
    run = configure(tmp_path, "auto")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert lines == ["qwen1m_ext: building CPU only (nvcc not found)"], run.stderr


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        ("1", ["QWEN1M_CUDA=1: nvcc not found", "CUDA_HOME", "QWEN1M_CUDA=0"]),
        ("maybe", ["QWEN1M_CUDA: expected auto, 1 or 0, got 'maybe'"]),
    ],
)
def test_cuda_that_cannot_be_had_is_an_error(tmp_path: Path, cuda: str, words: list[str]) -> None:
    run = configure(tmp_path, cuda)
    assert run.returncode != 0
    text = " ".join(run.stderr.split())  # CMake breaks lines
    for word in words:
        assert word in text, text
