"""The planner: its arithmetic against published sizes, its bytes against what is allocated."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM
from qwen1m_ext.attention import Rotary
from qwen1m_ext.choices import KVCacheName
from qwen1m_ext.cli import byte_count, main
from qwen1m_ext.config import ModelConfig, read_config
from qwen1m_ext.cost_model import prefill_flops
from qwen1m_ext.errors import ConfigError, MemoryBudgetError
from qwen1m_ext.estimate import (
    CARDS,
    attention_pairs,
    elementwise_bytes_per_token,
    estimate,
    linear_params,
    link_bytes,
    measure_cpu,
)
from qwen1m_ext.fp8 import FP8
from qwen1m_ext.kv_cache import KVCache
from qwen1m_ext.model import Workspace, linear_scratch_bytes
from qwen1m_ext.offload import OffloadedCache, layer_bytes
from qwen1m_ext.plan import Deployment, fit_context, largest_context, memory_plan
from qwen1m_ext.planner import Report, cheapest_changes, plan_report
from qwen1m_ext.weights import expected_shapes

BF16 = torch.bfloat16
CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"  # as published
FILES = {size: CONFIGS / f"qwen2.5-{size}-instruct-1m.json" for size in ("7b", "14b")}
MODELS = {size: read_config(path) for size, path in FILES.items()}
H200 = CARDS["h200"]
LENGTHS = (1 << 17, 1 << 18, 1 << 19, 1 << 20)


def deployment(tokens: int = 1 << 20, **changes: Any) -> Deployment:
    base = Deployment(tokens, BF16, BF16, chunk_tokens=32_768, gpu=True)
    return replace(base, **changes)


def close(value: float, stated: str) -> None:
    """Within 2 %, and half a unit of the last digit that was written down."""
    digits = len(stated.partition(".")[2])
    assert abs(value - float(stated)) <= 0.02 * float(stated) + 0.5 * 10**-digits, (value, stated)


# Worked out by hand for one H200 (790 TFLOP/s, fp8 1,450, 4.3 TB/s), at the four LENGTHS.
BY_HAND = {
    "7b": {
        "linear PFLOP": "1.71 3.42 6.84 13.7",
        "linear s": "2.2 4.3 8.7 17.3",
        "linear s fp8": "1.2 2.4 4.7 9.4",
        "dense PFLOP": "3.45 13.8 55.2 221",
        "dense s": "4.4 17.5 69.8 279",
        "dense total s": "6.5 21.8 78.5 297",
        "sparse s, 7096": "0.46 0.93 1.88 3.8",
        "sparse s, 18000": "1.1 2.3 4.7 9.5",
        "sparse s, 32768": "1.9 4.1 8.5 17.2",
        "elementwise s": "0.19 0.37 0.74 1.5",
        "sparse total s": "3.5 7.0 14.1 28.3",
        "sparse total s fp8": "2.5 5.0 10.2 20.4",
        "kv GB": "7.5 15 30 60",
        "kv GB fp8": "3.8 7.5 15 30",
        "decode ms": "5.0 6.8 10.3 17.3",
        "decode ms kv8": "4.2 5.0 6.8 10.3",
        "decode ms w8 kv8": "2.6 3.5 5.3 8.8",
    },
    "14b": {
        "linear PFLOP": "3.46 6.93 13.9 27.7",
        "linear s": "4.4 8.8 17.5 35.1",
        "linear s fp8": "2.4 4.8 9.6 19.1",
        "dense PFLOP": "8.44 33.8 135 540",
        "dense s": "10.7 42.8 171 684",
        "dense total s": "15.1 51.5 189 719",
        "sparse s, 7096": "1.1 2.3 4.6 9.2",
        "sparse s, 18000": "2.7 5.7 11.5 23.3",
        "sparse s, 32768": "4.7 10.0 20.7 42.1",
        "elementwise s": "0.34 0.69 1.4 2.7",
        "sparse total s": "7.5 15.1 30.5 61.1",
        "sparse total s fp8": "5.5 11.1 22.5 45.1",
        "kv GB": "26 52 103 206",
        "kv GB fp8": "13 26 52 103",
        "decode ms": "12.5 18.5 30.5 54.5",
        "decode ms kv8": "9.5 12.5 18.5 30.5",
        "decode ms w8 kv8": "6.4 9.4 15.4 27.4",
    },
}


def planned(config: ModelConfig, what: str, tokens: int) -> float:
    """The planner's figure for a row of BY_HAND."""
    quantity, _, columns = what.partition(", ")
    config = replace(config, quantised="w8" in quantity or quantity.endswith("s fp8"))
    d = deployment(
        tokens,
        kv_dtype=FP8 if "kv8" in quantity or quantity == "kv GB fp8" else BF16,
        sparse="sparse" in quantity,
    )
    floor, _ = estimate(config, d, H200, int(columns or 18_000))
    kind = quantity.split()[0]
    if quantity.endswith("PFLOP"):
        flops = {
            "linear": 2 * tokens * linear_params(config),
            "dense": 4 * config.num_layers * config.q_size * attention_pairs(tokens, None),
        }
        return flops[kind] / 1e15
    if kind == "kv":
        return memory_plan(config, d).items["kv cache"] / 1e9
    if kind == "decode":
        return 1000 * floor.decode_step
    # by hand, four more copies of q are written, and elementwise work is left out beside dense
    more_q = 4 * config.q_size * config.num_layers * 2 * tokens / H200.bandwidth
    return {
        "linear": floor.linear,
        "dense": floor.linear + floor.attention if "total" in what else floor.attention,
        "sparse": floor.prefill + more_q if "total" in what else floor.attention,
        "elementwise": floor.elementwise + more_q,
    }[kind]


@pytest.mark.parametrize(
    ("size", "what"), [(size, what) for size, rows in BY_HAND.items() for what in rows]
)
def test_arithmetic_of_one_h200(size: str, what: str) -> None:
    for tokens, stated in zip(LENGTHS, BY_HAND[size][what].split(), strict=True):
        close(planned(MODELS[size], what, tokens), stated)


def test_parameters_and_bytes_of_the_published_models() -> None:
    for size, linear, embed, total, per_token in (
        ("7b", "6.53", "0.545", "7.62", 57_344),
        ("14b", "13.21", "0.779", "14.77", 196_608),
    ):
        config = MODELS[size]
        close(linear_params(config) / 1e9, linear)
        close(config.vocab_size * config.hidden_size / 1e9, embed)
        close(memory_plan(config, deployment()).items["weights"] / 2e9, total)
        assert config.kv_bytes_per_token(BF16) == per_token


def test_whole_plans_of_one_h200() -> None:
    """7B in bf16 is easy; 14B needs an fp8 cache, and fp8 weights leave room."""
    seven = memory_plan(MODELS["7b"], deployment())
    assert 77e9 < seven.total < 81e9 and seven.total < H200.memory
    fourteen = MODELS["14b"]
    assert memory_plan(fourteen, deployment()).total > H200.memory
    cache8 = memory_plan(fourteen, deployment(kv_dtype=FP8))
    close((cache8.items["weights"] + cache8.items["kv cache"]) / 1e9, "132.6")
    close(cache8.items["scratch"] / 1e9, "4.3")
    close(cache8.total / (1 << 30), "132")
    both = memory_plan(replace(fourteen, quantised=True), deployment(kv_dtype=FP8))
    close(both.items["weights"] / 1e9, "16.3")
    close(both.total / (1 << 30), "119")


def test_the_work_is_the_one_that_a_prefill_reports() -> None:
    config, tokens = MODELS["7b"], 100_000
    attention = 4 * config.num_layers * config.q_size * attention_pairs(tokens, None)
    whole = 2 * tokens * linear_params(config) + attention
    assert whole == pytest.approx(prefill_flops(config, 0, tokens), rel=1e-4)
    assert attention_pairs(10, 3) == 1 + 2 + 8 * 3


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    return sum(t.untyped_storage().nbytes() for t in {id(t): t for t in tensors}.values())


def cache_tensors(cache: KVCache) -> list[torch.Tensor]:
    """What a cache keeps; not the pages that one in fp8 widens into, which are scratch."""
    scales = [scale for scale in (cache.k_scale, cache.v_scale) if scale is not None]
    return [*cache.k, *cache.v, cache.block_table, *scales]


def scratch_tensors(cache: KVCache) -> list[torch.Tensor]:
    """The pages that a cache in fp8 widens into."""
    plain = cache.unrounded()
    return [plain.k[0], plain.v[0]]


@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
@pytest.mark.parametrize("size", ["7b", "14b"])
def test_a_plan_is_what_the_published_models_allocate(size: str, kv_dtype: torch.dtype) -> None:
    """On the meta device, every item at a million tokens: to the byte."""
    config = MODELS[size]
    d = deployment(1_000_000, max_seqs=8, gpu=False, kv_dtype=kv_dtype)
    plan = memory_plan(config, d)
    with torch.device("meta"):
        weights = [torch.empty(s, dtype=BF16) for s in expected_shapes(config).values()]
        cache = KVCache(config, kv_dtype, d.tokens, d.max_seqs)
        workspace = Workspace(config, BF16, d.chunk)
        rotary = Rotary.build(config, config.dual_chunk, d.tokens)
    activations = [t for t in vars(workspace).values() if isinstance(t, torch.Tensor)]
    assert plan.items["weights"] == nbytes(weights)
    assert plan.items["kv cache"] == nbytes(cache_tensors(cache))
    if kv_dtype == FP8:
        scratch = plan.items["scratch"] - linear_scratch_bytes(config, BF16, d.chunk)
        assert scratch == nbytes(scratch_tensors(cache))
        assert scratch == memory_plan(config, replace(d, gpu=True)).items["scratch"]
    assert plan.items["activations"] == nbytes(activations)
    assert plan.items["rotary table"] == nbytes([rotary.table])


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_an_engine_allocates_its_plan(checkpoint: Path, kv: KVCacheName) -> None:
    engine = LLM(checkpoint, max_model_len=1000, prefill_chunk_tokens=300, kv_cache_dtype=kv).engine
    model, items = engine.model, engine.plan.items
    weights = [model.weights.embed, model.weights.norm]
    weights += [t for layer in model.weights.layers for t in vars(layer).values()]
    assert items["weights"] == sum(t.numel() * t.itemsize for t in weights)
    cache = engine.cache
    assert items["kv cache"] == nbytes(cache_tensors(cache))
    if kv == "fp8":
        scratch = nbytes(scratch_tensors(cache))
        assert 0 < scratch <= items["scratch"]
    assert items["activations"] == nbytes(
        [t for t in vars(model.workspace).values() if isinstance(t, torch.Tensor)]
    )
    assert items["rotary table"] == nbytes([engine.rotary.table])


def test_the_largest_context_is_the_largest() -> None:
    config = MODELS["14b"]
    d = deployment()
    tokens = largest_context(config, d, H200.memory)
    assert memory_plan(config, replace(d, tokens=tokens)).total <= H200.memory
    assert memory_plan(config, replace(d, tokens=tokens + 1)).total > H200.memory
    assert largest_context(config, d, 1 << 30) == 0


def test_a_context_that_does_not_fit_is_refused_with_its_items() -> None:
    config, d = MODELS["7b"], deployment(0, gpu=False)
    assert fit_context(config, d, 1_000_000, None) == 1_000_000
    assert fit_context(config, d, 1_000_000, 100 << 30) == 1_000_000
    with pytest.raises(MemoryBudgetError, match=r"1000000 tokens need \d+ bytes .*weights 14\.2 G"):
        fit_context(config, d, 1_000_000, 32 << 30)
    assert 100_000 < fit_context(config, d, None, 32 << 30) < 400_000
    with pytest.raises(MemoryBudgetError, match="not even a short context fits in 10.0 GiB"):
        fit_context(config, d, None, 10 << 30)
    with pytest.raises(ConfigError, match="max_model_len: expected 2 to 1010000 .* got 2000000"):
        fit_context(config, d, 2_000_000, None)


# --- what would make it fit -----------------------------------------------------------------------


def report(size: str, tokens: int, **options: Any) -> Report:
    return plan_report(FILES[size], tokens, machine="h200", **options)


def test_changes_fit_and_are_minimal() -> None:
    plan = report("14b", 1_000_000)
    assert not plan.fits and len(plan.changes) == 3
    assert plan.changes[0].options == {"kv": "fp8"}
    for change in plan.changes:
        assert change.total <= H200.memory
        for other in plan.changes:
            assert change is other or not change.options.items() <= other.options.items()
    assert report("14b", 1_000_000, kv="fp8").fits
    assert report("14b", 1_000_000, kv="fp8").changes == []
    assert any("fp8 cache" in note for note in report("14b", 1_000_000, kv="fp8").notes())
    assert not any("fp8 cache" in note for note in plan.notes())


def test_the_smallest_change_comes_first() -> None:
    """A shortage that a smaller chunk removes is not answered with another card."""
    config = MODELS["7b"]
    d = deployment(1 << 17, chunk_tokens=131_072)
    missing = 1 << 28
    card = replace(CARDS["h100"], memory=memory_plan(config, d).total - missing)
    first = cheapest_changes(config, d, card)[0]
    assert first.options == {"chunk": "16k"}
    nowhere = replace(CARDS["h200"], memory=1 << 20)
    assert all("gpu" in change.options for change in cheapest_changes(config, d, nowhere))


def test_a_change_is_a_command_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The options of each change, given to the command, make it say "fits"."""
    base = ["plan", str(FILES["14b"]), "--gpu", "h100", "--attention", "sparse", "--json"]
    assert main([*base, "--context", "1m"]) == 1
    first = json.loads(capsys.readouterr().out)
    assert len(first["changes"]) == 3
    for change in first["changes"]:
        options = {"context": "1m", **change["options"]}
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        assert main([*base, *flags]) == 0
        second = json.loads(capsys.readouterr().out)
        assert second["bytes"]["total"] == change["total_bytes"]


@pytest.mark.parametrize(
    ("context", "beyond"), [("512k", False), ("1m", False), ("1024k", True), ("2m", True)]
)
def test_units_and_the_model_s_own_limit(
    context: str, beyond: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(FILES["7b"]), "--context", context, "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    assert ("beyond the model: it supports 1,010,000 tokens" in text) == beyond
    tokens = {"512k": "524,288", "1m": "1,000,000", "1024k": "1,048,576", "2m": "2,000,000"}
    assert f"{tokens[context]} tokens on h200" in text and "fits, " in text
    for item in ("weights", "kv cache", "activations", "rotary table", "scratch", "logits"):
        assert f"  {item} " in text
    assert "floor" in text and "estimate" in text and "tok/s" in text


def test_this_machine_is_measured(checkpoint: Path) -> None:
    plan = plan_report(checkpoint, 4096)
    assert plan.fits and plan.machine.name == "cpu"
    assert plan.memory.total == plan.as_json()["bytes"]["total"]
    machine = measure_cpu(plan.config, torch.float32, 1 << 30)
    assert machine.matmul > 0 and machine.bandwidth > 0 and machine.dense_share > 0
    for s in (plan.floor, plan.expected):
        assert s.prefill == s.linear + s.attention + s.elementwise > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "abacus"], "gpu: expected cpu or one of h200, h100"),
        (["--memory", "0"], "expected GiB such as 80 or 23.5, got '0'"),
        (["--kv", "fp4"], "invalid choice"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(["plan", str(FILES["7b"]), "--context", "1m", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and words in capsys.readouterr().err


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "x"), "--context", "1m"]) == 2
    assert "file not found" in capsys.readouterr().err


def test_fp32_and_tied_embeddings(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, model_config(tie_word_embeddings=True))
    tied = plan_report(directory, 1000)
    assert tied.deployment.dtype == torch.float32
    assert elementwise_bytes_per_token(tied.config, torch.float32) == 2 * 4 * (
        8 * 64 + 2 * 128 + 3 * 96
    )
    halves = plan_report(directory, 1000, weights="bf16").memory.items["weights"]
    assert tied.memory.items["weights"] == 2 * halves


def test_an_offloaded_cache_is_planned_to_the_byte() -> None:
    """14B at a million tokens: host and device together hold the cache and two layers more."""
    config, tokens = MODELS["14b"], 1_000_000
    whole = memory_plan(config, deployment(tokens))
    layer = 7813 * 128 * 196_608 // 48  # pages x rows x bytes of a token
    for stay, budget in ((0, None), (0, 3 * layer - 1), (8, 10 * layer), (46, 47 * layer)):
        d = deployment(tokens, kv_offload=True, device_kv_bytes=budget)
        plan = memory_plan(config, d)
        away = 48 - stay if stay < 46 else 3
        assert plan.host == {"kv cache": away * layer}
        page = layer // 7813  # of each layer that is away, K and V: on its way to another page
        assert plan.items["kv slots"] == 2 * layer + away * page
        assert plan.items["kv cache"] + plan.host["kv cache"] == whole.items["kv cache"]
        graphs = 32 << 20  # captured only where all layers stay
        assert plan.total == whole.total - (away - 2) * layer + away * page - graphs
        on_cpu = memory_plan(config, replace(d, gpu=False))
        assert on_cpu.host == {} and on_cpu.items["kv cache"] == whole.items["kv cache"]
    with torch.device("meta"):
        cache = OffloadedCache(config, BF16, tokens, device_bytes=10 * layer)
    plan = memory_plan(config, deployment(tokens, kv_offload=True, device_kv_bytes=10 * layer))
    assert nbytes([*cache.device_tensors(), cache.block_table]) == (
        plan.items["kv cache"] + plan.items["kv slots"] - 40 * (layer // 7813)
    )
    everything = deployment(tokens, kv_offload=True, device_kv_bytes=48 * layer)
    assert memory_plan(config, everything) == whole


def test_decode_of_an_offloaded_cache_waits_for_the_link() -> None:
    """206 GB at 56.7 GB/s are 3.5 s; a prefill has more to compute than to copy."""
    config, d = MODELS["14b"], deployment(1 << 20)
    floor, expected = estimate(config, replace(d, kv_offload=True), H200)
    close(floor.decode_step, "3.64")
    assert expected.decode_step == floor.decode_step
    plain = estimate(config, d, H200)[0]
    assert floor.prefill == plain.prefill and floor.link == 0.0
    # 31 x 32 / 2 chunks of 32,768 tokens are loaded, and 32 stored: 3.4 TB in 719 s
    moved = link_bytes(config, replace(d, kv_offload=True))
    assert moved.loaded == 31 * 16 * 32_768 * 196_608
    assert moved.stored == moved.step == 196_608 << 20
    slow = replace(H200, link=1e9)
    assert estimate(config, replace(d, kv_offload=True), slow)[0].prefill == moved.loaded / 1e9
    on_cpu = replace(d, kv_offload=True, gpu=False)
    both = (moved.loaded + moved.stored) / 1e9
    assert estimate(config, on_cpu, replace(slow, gpu=False))[0].prefill == both
    # half of the layers stay: half of the bytes, and none is waited for before the first layer
    size = 26 * layer_bytes(config, BF16, 1 << 20)
    half = estimate(config, replace(d, kv_offload=True, device_kv_bytes=size), H200)[0]
    assert half.decode_step == pytest.approx(floor.decode_step / 2)
    # where the link is fast, computing is what lasts; on a CPU after the first layer has come
    fast = replace(H200, link=1e15)
    assert estimate(config, replace(d, kv_offload=True), fast)[0].decode_step == plain.decode_step
    assert estimate(config, on_cpu, replace(fast, gpu=False))[0].decode_step == pytest.approx(
        plain.decode_step + 196_608 * (1 << 20) / 48 / 1e15
    )


def test_offload_is_planned_and_proposed_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["plan", str(FILES["14b"]), "--gpu", "h200", "--context", "1m"]
    assert main(base) == 1
    assert "fits with --kv-offload host (38.1 GiB)" in capsys.readouterr().out
    offload = [*base, "--kv-offload", "host"]
    assert main(offload) == 0
    text = capsys.readouterr().out
    assert "  host kv cache    183.1 GiB" in text and "48 of 48 layers in page-locked" in text
    # what is said to have room has it, and one layer more has not
    room = re.search(r"there is room for (\d+) of them: --device-kv-bytes (\d+) keeps", text)
    assert room is not None
    layer = layer_bytes(MODELS["14b"], BF16, 1_000_000)
    for more, status in ((0, 0), (layer, 1)):
        assert main([*offload, "--device-kv-bytes", str(int(room[2]) + more)]) == status
        said = capsys.readouterr().out
        away = 48 - int(room[1]) - (1 if more else 0)
        assert f"{away} of 48 layers in page-locked" in said and "there is room" not in said
    assert main([*base, "--device-kv-bytes", "8g"]) == 2
    assert "device_kv_bytes: expected kv_offload beside it" in capsys.readouterr().err
    assert main([*offload, "--device-kv-bytes", "512m"]) == 2
    assert "device_kv_bytes: expected at least 8192524288" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1000000", 10**6), ("1.5k", 1536), ("512M", 512 << 20), ("8g", 8 << 30)],
)
def test_byte_counts(text: str, size: int) -> None:
    assert byte_count(text) == size
    for bad in ("", "0", "-1", "g", "8t", "1.5", "nan", "infg"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected bytes such as 512m or 8g"):
            byte_count(bad)
