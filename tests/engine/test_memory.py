"""KV memory: a long prefill costs its pages and the stated activations, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import huge_pages, memory

# In a process of its own: what earlier tests left in the heap would hide the growth.
SCRIPT = """
import ctypes, json, sys
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # pages of 2 MiB would be touched whole
import torch
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.memory import resident_bytes
from qwen1m_ext.model import activation_bytes

tokens = 32768
llm = LLM(sys.argv[1], max_model_len=2 * tokens, prefill_chunk_tokens=4096)
engine = llm.engine
once = SamplingParams(temperature=0, max_tokens=1)
ids = torch.randint(0, 256, (tokens,)).tolist()
llm.generate({"prompt_token_ids": ids[:8192]}, once)  # code, thread pools, the whole workspace
for pages in (engine.cache.k, engine.cache.v):        # the first pages are touched by now:
    for layer in pages:                               # start again with untouched ones
        layer.set_(torch.empty_like(layer))
before = resident_bytes()
llm.generate({"prompt_token_ids": ids}, once)
print(json.dumps({
    "growth": resident_bytes() - before,
    "pages": tokens // 128 * engine.cache.page_bytes,
    "activations": activation_bytes(engine.config, engine.dtype, engine.step_tokens),
    "workspace": sum(t.nbytes for t in vars(engine.model.workspace).values()
                     if isinstance(t, torch.Tensor)),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_resident_growth_of_a_32k_prefill_is_its_pages(tmp_path: Path) -> None:
    """The workspace is resident before, so growth beyond the pages would be a hidden copy."""
    config = model_config(
        num_hidden_layers=8, hidden_size=256, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=1 << 20,
        dual_chunk_attention_config={"chunk_size": 2048, "local_size": 512,
                                     "original_max_position_embeddings": 2048},
    )  # fmt: skip
    directory = write_checkpoint(tmp_path, config)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)],
        # each thread of torch's pool has memory of its own, and machines have up to hundreds
        env=os.environ | {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["workspace"] == measured["activations"]
    assert measured["pages"] == 256 * 128 * 8 * 2 * 2 * 64 * 4
    assert abs(measured["growth"] / measured["pages"] - 1) < 0.03, measured


def test_sizes_for_a_person() -> None:
    assert memory.format_bytes(512) == "512 B"
    assert memory.format_bytes(57_344 * 10**6) == "53.4 GiB"


def test_peak_is_at_least_what_is_resident() -> None:
    resident = memory.resident_bytes()
    assert resident is not None and memory.peak_bytes() >= resident * 0.9
    available = memory.available_bytes()
    assert available is None or available > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_a_tensor_in_huge_pages_is_a_tensor(dtype: torch.dtype) -> None:
    """Nothing is committed before it is written, and it goes when the last view of it goes."""
    shape = (4 * huge_pages.MIN_BYTES // dtype.itemsize // 512, 8, 64)
    before = memory.resident_bytes()
    tensor = huge_pages.empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert before is None or memory.resident_bytes() - before < tensor.nbytes // 8
    rows = tensor[-3:]
    rows.view(torch.uint8).fill_(56)
    del tensor
    assert rows.view(torch.uint8).eq(56).all()


def flags_of_mapping(address: int) -> list[str]:
    """VmFlags of the mapping in which an address lies; "hg": huge pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            begin, end = (int(x, 16) for x in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_large_tensors_ask_for_huge_pages() -> None:
    large = huge_pages.empty((huge_pages.MIN_BYTES,), torch.uint8)
    assert "hg" in flags_of_mapping(large.data_ptr() + large.nbytes // 2)
    small = huge_pages.empty((huge_pages.MIN_BYTES // 2,), torch.uint8)
    assert "hg" not in flags_of_mapping(small.data_ptr() + small.nbytes // 2)
