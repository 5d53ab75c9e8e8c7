"""Builds the compiled modules (_C, _host) with CMake; pyproject.toml holds everything else.

Environment:
    QWEN1M_CUDA: auto (default), 1 or 0; see CMakeLists.txt.
    QWEN1M_BUILD_DIR: where CMake builds; default: setuptools' own build folder.
    CMAKE_ARGS: further arguments of the CMake configuration, quoted as in a shell.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def package_dir(name: str) -> Path:
    """Folder of an installed package, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(
            f"qwen1m_ext: building needs the package {name}; install it, or let pip do so: "
            "`pip install .` without --no-build-isolation"
        )
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """Configures, builds and installs the two modules into the package folder."""

    def run(self) -> None:
        """Runs CMake; the outputs go to the source tree in an editable installation."""
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = ROOT / "python" if in_place else Path(self.build_lib).resolve()
        build = Path(os.environ.get("QWEN1M_BUILD_DIR") or self.build_temp).resolve()
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "QWEN1M_TORCH_DIR": package_dir("torch"),
            "QWEN1M_TESTS": "OFF",
            "QWEN1M_CUDA": os.environ.get("QWEN1M_CUDA", "auto"),
            "pybind11_DIR": package_dir("pybind11") / "share" / "cmake" / "pybind11",
        }
        # Given anew each time: pip's isolated build environments come and go under one build tree.
        if ninja := shutil.which("ninja"):
            settings["CMAKE_MAKE_PROGRAM"] = ninja
        self.call(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
            + [f"-D{name}={value}" for name, value in settings.items()]
            + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        )
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        self.call(["cmake", "--build", build, "--target", "_C", "_host", *jobs])
        self.call(
            ["cmake", "--install", build, "--component", "python"]
            + ["--prefix", target / "qwen1m_ext"]
        )

    def call(self, command: list[str | Path]) -> None:
        """Runs a command with its output shown; the build stops if it fails."""
        if shutil.which(str(command[0])) is None:
            sys.exit(f"qwen1m_ext: {command[0]} not found; `pip install cmake ninja` provides it")
        self.announce(shlex.join(map(str, command)), level=2)
        if subprocess.run([str(part) for part in command]).returncode != 0:
            sys.exit(f"qwen1m_ext: {command[0]} failed; its own message stands above")

    def get_outputs(self) -> list[str]:
        """The files are installed by CMake; setuptools packs the whole folder."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """As get_outputs."""
        return {}


# The extension only tells setuptools that the wheel depends on the platform and the Python version
# (_host does, _C does not).
setup(ext_modules=[Extension("qwen1m_ext._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
