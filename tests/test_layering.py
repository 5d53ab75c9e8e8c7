"""The house has one direction: what each layer may include or import, and nothing else.

include/qwen1m <- csrc/arch <- csrc/common <- csrc/ops/<op> <- csrc/torch, csrc/host
(Python) RANKS below: a module imports modules of a lower rank.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "qwen1m_ext"
FOLDERS = list(PACKAGE.glob("*/__init__.py"))

# --- C++ ------------------------------------------------------------------------------------------

CXX_FILES = sorted(
    path
    for folder in ("include", "csrc")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".S"}
)
# Project headers a folder may include, by the first parts of their path; its own is added.
MAY_INCLUDE = {
    "include/qwen1m": ["qwen1m"],
    "csrc/arch": ["qwen1m", "arch"],
    "csrc/common": ["qwen1m", "arch", "common"],
    "csrc/ops": ["qwen1m", "arch", "common"],  # and its own op folder, see below
    "csrc/torch": ["qwen1m", "common"],
    "csrc/host": ["qwen1m", "common"],
}
STANDARD_HEADER = re.compile(
    r"<[a-z_0-9]+>|<(sys|linux)/[a-z_]+\.h>|<(unistd|dlfcn|ucontext|cpuid|immintrin|arm_neon)\.h>"
)
CUDA_HEADER = re.compile(r"<cuda[a-z_0-9]*\.h>")


def may_include_cuda(path: Path) -> bool:
    """The CUDA back end of the primitives, and the launchers (CUDA sources) of the ops."""
    parts = path.relative_to(ROOT).parts
    return parts[:3] == ("csrc", "arch", "cuda") or (
        parts[:2] == ("csrc", "ops") and path.suffix == ".cu"
    )


def folder_of(path: Path) -> str:
    return "/".join(path.relative_to(ROOT).parts[:2])


def forbidden_includes(path: Path, text: str) -> Iterator[str]:
    """The includes of one C++ file that its layer may not have."""
    folder = folder_of(path)
    own = path.relative_to(ROOT / "csrc").parts[:2] if folder == "csrc/ops" else ()
    for include in re.findall(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', text, re.MULTILINE):
        name = include.strip('<>"')
        if include.startswith("<"):
            third_party = {"csrc/torch": "torch/", "csrc/host": "pybind11/"}.get(folder)
            if STANDARD_HEADER.fullmatch(include):
                if folder == "include/qwen1m" and "." in name:
                    yield f"{include} (the public headers use the C++ standard library only)"
            elif CUDA_HEADER.fullmatch(include) and may_include_cuda(path):
                pass
            elif third_party is None or not name.startswith(third_party):
                yield include
            elif re.search(r"ATen|c10|torch/extension\.h|torch/torch\.h|torch/library\.h", name):
                yield f"{include} (stable ABI only)"
        elif "/" in name:
            top = name.split("/")[0]
            is_own_op = own and name.startswith("/".join(own) + "/")
            if top not in MAY_INCLUDE[folder] and not is_own_op:
                yield include
        elif not (path.parent / name).is_file():
            yield f"{include} (no such file beside it)"


@pytest.mark.parametrize("path", CXX_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_cxx_layers(path):
    text = path.read_text()
    assert list(forbidden_includes(path, text)) == []
    if path.relative_to(ROOT).parts[:3] != ("csrc", "arch", "cuda") and path.suffix != ".S":
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        assert not re.search(r"\basm\b|\b__asm__\b", code), (
            "inline assembly lives in csrc/arch/cuda"
        )
    if folder_of(path) not in {"csrc/arch", "csrc/common"}:
        assert "__CUDACC__" not in text, "__CUDACC__ is for csrc/arch and csrc/common"


def test_every_cxx_folder_has_a_rule():
    assert {folder_of(path) for path in CXX_FILES} <= set(MAY_INCLUDE)


@pytest.mark.parametrize(
    ("file", "line", "fits"),
    [
        ("include/qwen1m/x.h", "#include <vector>", True),
        ("include/qwen1m/x.h", "#include <unistd.h>", False),
        ("include/qwen1m/x.h", '#include "common/check.h"', False),
        ("csrc/common/x.h", '#include "ops/swiglu/x.h"', False),
        ("csrc/common/x.h", "#include <torch/csrc/stable/tensor.h>", False),
        ("csrc/ops/swiglu/x.cpp", '#include "common/check.h"', True),
        ("csrc/ops/swiglu/x.cpp", '#include "ops/swiglu/x.h"', True),
        ("csrc/ops/swiglu/x.cpp", '#include "ops/rms_norm/x.h"', False),
        ("csrc/ops/swiglu/x.cpp", '#include "../rms_norm/x.h"', False),
        ("csrc/torch/x.cpp", "#include <torch/csrc/stable/tensor.h>", True),
        ("csrc/torch/x.cpp", "#include <torch/extension.h>", False),
        ("csrc/torch/x.cpp", "#include <ATen/ATen.h>", False),
        ("csrc/torch/x.cpp", "#include <cuda_runtime.h>", False),
        ("csrc/torch/x.cpp", '#include "arch/cuda/host.h"', False),
        ("csrc/arch/x.h", "#include <cuda.h>", False),
        ("csrc/arch/cuda/x.cu", "#include <cuda.h>", True),
        ("csrc/ops/swiglu/x.cu", "#include <cuda_runtime.h>", True),
        ("csrc/ops/swiglu/x.cpp", "#include <cuda_runtime.h>", False),
    ],
)
def test_the_cxx_rule_itself(file, line, fits):
    assert (not list(forbidden_includes(ROOT / file, line))) == fits


# --- Python ---------------------------------------------------------------------------------------

# A module may import modules of a lower rank only.
RANKS = [
    {"errors", "fp8", "haystack", "huge_pages", "machine", "memory", "_host"},  # leaves
    {"linear", "ops", "device", "heartbeat"},
    {"config"},
    {"weights", "choices", "tokenizer", "request", "sparse_config", "sparse_tiles"},
    {
        "kv_cache",
        "output",
        "sampler",
        "events",
        "cost_model",
        "prefill_policy",
        "sparsity",
        "offload_copies",
    },
    {
        "attention",
        "sessions",
        "handle",
        "prefix_cache",
        "terminal",
        "grammar",
        "session_files",
        "speculative",
        "offload",
        "device_sampler",
    },
    {"model", "sequence", "engine_messages"},
    {"decode_step", "drafts", "progress", "step_result"},
    {
        "engine_child",
        "scoring",
        "kv_scales",
        "residency",
        "runner",
        "output_processor",
        "plan",
    },
    {"scheduler", "estimate"},
    {"core"},
    {"assembly"},
    {"intake"},
    {"engine"},
    {"llm", "session_command", "refine", "crossover", "engine_worker"},
    {"engine_process"},
    {"server", "benchmark", "doctor", "demo", "accuracy", "chat", "planner", "quantize"},
    {"sparsity_report"},
    {"sparsity_commands"},
    {"cli"},
]
# Modules that launch no kernel: of ops they may have constants (PAGE_SIZE) only.
WITHOUT_KERNELS = {
    "offload",
    "offload_copies",
    "prefix_cache",
    "sequence",
    "residency",
    "scheduler",
    "core",
    "plan",
    "request",
    "config",
    "server",
    "cli",
}


def modules() -> dict[str, Path]:
    """Modules of the package; a folder with an __init__.py counts as one."""
    files = [path for path in sorted(PACKAGE.glob("*.py")) if path.stem[:2] != "__"]
    return {path.stem: path for path in [*files, *sorted(p.parent for p in FOLDERS)]}


def rank(module: str) -> int:
    for level, names in enumerate(RANKS):
        if module in names:
            return level
    raise AssertionError(f"qwen1m_ext.{module} has no place in RANKS: add it to its layer")


def imported_modules(source: str, level: int = 1) -> set[str]:
    """Modules of the package that `source` imports, at any depth of nesting.

    `level`: of relative imports that start at the package; 2 in a file of a folder.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == level or module.split(".")[0] == "qwen1m_ext":
                inner = module if node.level == level else module.partition(".")[2]
                found |= {inner.split(".")[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("qwen1m_ext.")
            }
    return found & (set(modules()) | {"_host"})


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def runtime_source(source: str) -> str:
    """Without `if TYPE_CHECKING:` blocks, which import nothing at run time."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_type_checking(node)] or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize("name", modules())
def test_python_layers(name):
    module = modules()[name]
    files = sorted(module.rglob("*.py")) if module.is_dir() else [module]
    for file in files:
        source = runtime_source(file.read_text())
        for other in imported_modules(source, 1 + len(file.relative_to(PACKAGE).parts[:-1])):
            assert rank(other) < rank(name), f"{file.name} imports {other}, which stands no lower"
        if name in WITHOUT_KERNELS:
            assert not re.search(r"from \.+ import ops", source)
            for names in re.findall(r"from \.+ops import (.+)", source):
                assert names.isupper(), f"{name} launches no kernel, but imports {names}"


def test_only_ops_touches_the_registered_operators():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "ops.py":
            assert "torch.ops" not in re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.S)


def test_the_python_rule_itself():
    source = "from .ops import swiglu\nfrom . import errors\nimport qwen1m_ext.config\nimport os\n"
    assert imported_modules(source) <= {"ops", "errors", "config"}
    assert "errors" in imported_modules(source)
    assert imported_modules("from ..engine import Engine\nfrom .app import x", 2) == {"engine"}
    assert {"server", "engine"} <= set(modules())
    assert rank("ops") < rank("model") < rank("engine") < rank("cli")
    with pytest.raises(AssertionError, match="no place in RANKS"):
        rank("utils")
