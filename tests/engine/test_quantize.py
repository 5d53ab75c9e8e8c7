"""fp8 checkpoints: what is written, what is refused, and how far the model moves."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.checkpoints import model_config, random_tensors, write_checkpoint
from qwen1m_ext import LLM, SamplingParams, accuracy, demo_model_path, quantize
from qwen1m_ext.accuracy import compare
from qwen1m_ext.cli import main
from qwen1m_ext.config import load_config
from qwen1m_ext.errors import ConfigError, MemoryBudgetError, RequestError, WeightsError
from qwen1m_ext.fp8 import FP8, Fp8Matrix, quantise
from qwen1m_ext.haystack import is_correct, make_sample
from qwen1m_ext.quantize import quantize_checkpoint
from qwen1m_ext.weights import load_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", gain=2.0)


@pytest.fixture(scope="module")
def fp8(source: Path) -> Path:
    out = source.parent / "fp8"
    quantize_checkpoint(source, out)
    return out


@pytest.fixture(scope="module")
def demo_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "fp8"
    quantize_checkpoint(demo_model_path(), out)
    return out


def test_linear_layers_are_fp8_and_the_rest_is_bf16(source: Path, fp8: Path) -> None:
    tensors, stored = random_tensors(model_config(), gain=2.0), load_file(fp8 / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            want = quantise(tensor)
            assert torch.equal(stored[name].view(torch.int8), want.data.view(torch.int8))
            assert torch.equal(stored.pop(name + "_scale"), want.scale)
        else:
            assert torch.equal(stored[name], tensor.bfloat16())
        del stored[name]
    assert not stored
    config = load_config(fp8)
    assert config.quantised and config.dtype == torch.bfloat16
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (fp8 / file).read_bytes() == (source / file).read_bytes()
    assert sorted(p.name for p in fp8.parent.iterdir()) == ["fp8", "model"]


def test_shards_hold_the_same(source: Path, fp8: Path, tmp_path: Path) -> None:
    done: list[int] = []
    quantize_checkpoint(source, tmp_path / "out", done.append, shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sum(done) == sum(t.numel() for t in random_tensors(model_config()).values())
    one, many = (load_weights(d, load_config(d)) for d in (fp8, tmp_path / "out"))
    for a, b in zip(one.layers, many.layers, strict=True):
        assert isinstance(a.qkv, Fp8Matrix) and isinstance(b.qkv, Fp8Matrix)
        assert torch.equal(a.qkv.data.view(torch.int8), b.qkv.data.view(torch.int8))
        assert torch.equal(a.qkv.scale, b.qkv.scale) and torch.equal(a.qkv_bias, b.qkv_bias)


def test_an_fp8_model_is_the_bf16_model_of_its_widened_weights(
    source: Path, fp8: Path, tmp_path: Path
) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        matrix = Fp8Matrix(tensors[weight], tensors.pop(name))
        tensors[weight] = matrix.dequantise(torch.bfloat16)
    wide = write_checkpoint(tmp_path, model_config(torch_dtype="bfloat16"))
    save_file(tensors, wide / "model.safetensors")
    ids = list(range(200))
    a, b = (LLM(d, max_model_len=256).logits(ids) for d in (fp8, wide))
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)
    narrow = LLM(source, dtype="bfloat16", max_model_len=256).logits(ids)
    assert (a - narrow).abs().max() > 0.2, "nothing was quantised"
    as_float = LLM(fp8, dtype="float32", max_model_len=256).logits(ids)
    assert torch.nn.functional.cosine_similarity(a, as_float, dim=-1).min() > 0.98


def test_the_plan_counts_fp8_weights(fp8: Path) -> None:
    engine = LLM(fp8, max_model_len=256).engine
    weights = engine.model.weights
    total = weights.embed.nbytes + weights.norm.nbytes
    for layer in weights.layers:
        for part in vars(layer).values():
            both = (part.data, part.scale) if isinstance(part, Fp8Matrix) else (part,)
            total += sum(t.nbytes for t in both)
    assert engine.plan.items["weights"] == total
    assert engine.plan.items["scratch"] > 0


# --- crashes and refusals -------------------------------------------------------------------------


class _Stop(Exception):
    pass


def test_an_interrupted_run_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        quantize_checkpoint(source, tmp_path / "out", stop)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_checkpoint_under_its_name(source: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from qwen1m_ext import quantize\n"
        "quantize._copy_the_rest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "quantize.quantize_checkpoint(sys.argv[1], sys.argv[2])\n"
    )
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", script, str(source), str(out)], timeout=600)
    assert run.returncode == -signal.SIGKILL and not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.unfinished-")
    quantize_checkpoint(source, out)  # and the next run is not in its way
    assert load_config(out).quantised


def test_what_cannot_be_quantised(
    source: Path, fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"OUT_DIR: expected a new directory, but .* exists"):
        quantize_checkpoint(source, tmp_path)
    with pytest.raises(ConfigError, match="OUT_DIR: expected a directory to put it in"):
        quantize_checkpoint(source, tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="expected a checkpoint in bf16 or fp32, this one is"):
        quantize_checkpoint(fp8, tmp_path / "out")
    tensors = random_tensors(model_config())
    tensors[Q_PROJ][3, 5] = math.nan
    broken = write_checkpoint(tmp_path / "broken")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(
        WeightsError, match=rf"{Q_PROJ}: expected numbers of at most 57344, got nan"
    ):
        quantize_checkpoint(broken, tmp_path / "out")

    class Usage:
        free = 1000

    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(MemoryBudgetError, match=r"needs \d+ bytes .* of disk, but 1000 bytes"):
        quantize_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["quant_method"], "fp8"),
        (["format"], "pack-quantized"),
        (["ignore"], []),
        (["kv_cache_scheme"], {"num_bits": 8}),
        (["sparsity_config"], {}),
        (["config_groups", "group_0", "weights", "strategy"], "tensor"),
        (["config_groups", "group_0", "weights", "num_bits"], 4),
        (["config_groups", "group_0", "input_activations"], {"num_bits": 8}),
        ([], "fp8"),
    ],
)
def test_any_other_quantisation_is_refused(
    fp8: Path, tmp_path: Path, path: list[str], value: Any
) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    place = config
    for name in ["quantization_config", *path][:-1]:
        place = place[name]
    place[["quantization_config", *path][-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"quantization_config.*{path[0] if path else ''}.*got"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no scale", "1 missing tensor"),
        ("scale", "weight_scale: expected powers of two from .* got 0.75"),
        ("nan", "expected numbers, got NaN"),
        ("bf16", "expected float8_e4m3fn, got torch.bfloat16"),
        ("bf16 scale", "expected float32, got torch.bfloat16"),
    ],
)
def test_damaged_fp8_tensors_are_refused(
    fp8: Path, tmp_path: Path, damage: str, words: str
) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    scale = tensors[Q_PROJ + "_scale"]
    if damage == "no scale":
        del tensors[Q_PROJ + "_scale"]
    elif damage == "scale":
        scale[3] = 0.75
    elif damage == "nan":
        tensors[Q_PROJ].view(torch.uint8)[1, 1] = 0xFF
    elif damage == "bf16":
        tensors[Q_PROJ] = tensors[Q_PROJ].bfloat16()
    else:
        tensors[Q_PROJ + "_scale"] = scale.bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=words):
        load_weights(tmp_path, load_config(fp8))


def test_an_fp8_tensor_needs_its_config(fp8: Path, tmp_path: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((fp8 / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="unknown tensor.*weight_scale"):
        load_weights(tmp_path, load_config(tmp_path))
    assert load_file(fp8 / "model.safetensors")[Q_PROJ].dtype == FP8


# --- accuracy -------------------------------------------------------------------------------------


def test_a_model_compared_with_itself(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "WINDOW_TOKENS", 64)
    llm = LLM(source, max_model_len=256)
    ids = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    same = compare(llm, llm, ids)
    assert same.tokens == 63 + 63 + 21 and same.kl_max == 0 and same.same_top_token == 1
    nll = 0.0
    for begin in (0, 64, 128):
        window = ids[begin : begin + 64]
        logprobs = torch.log_softmax(llm.logits(window).double(), -1)
        nll -= sum(float(logprobs[i, t]) for i, t in enumerate(window[1:]))
    assert same.perplexity == same.reference_perplexity == pytest.approx(math.exp(nll / 147))
    with pytest.raises(RequestError, match="text: expected at least 2 tokens, got 1"):
        compare(llm, llm, [5])


def test_divergence_is_that_of_its_definition(source: Path, fp8: Path) -> None:
    a, b = (LLM(d, dtype="float32", max_model_len=256) for d in (source, fp8))
    ids = list(range(40))
    p, q = (torch.softmax(m.logits(ids)[:-1].double(), -1) for m in (a, b))
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(1)
    result = compare(a, b, ids)
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    assert 0 < result.kl_mean <= result.kl_p99 <= result.kl_max and result.same_top_token < 1
    assert compare(b, a, ids).kl_mean != pytest.approx(result.kl_mean, rel=1e-3)


def test_the_demo_model_still_finds_its_needles(demo_fp8: Path) -> None:
    """docs/numerics.md states the divergence; the facts are found as before."""
    before = LLM(demo_model_path(), max_model_len=4200)
    after = LLM(demo_fp8, max_model_len=4200)
    once = SamplingParams(temperature=0, max_tokens=8)
    for seed in range(8):
        sample = make_sample(4096, seed=seed)
        for llm in (before, after):
            text = llm.generate(sample.prompt, once)[0].outputs[0].text
            assert is_correct(text, sample), (seed, llm is after, text)
    ids = before.get_tokenizer().encode(accuracy.read_text(None)[:2048])
    result = compare(before, after, ids)
    assert 0 < result.kl_mean < 0.02 and result.same_top_token > 0.9
    assert result.perplexity < 1.02 * result.reference_perplexity


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    out = tmp_path / "out"
    command = ["quantize", str(source), str(out), "--text", str(text), "--report-tokens", "600"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "perplexity" in said.out and "KL" in said.out and "100%" in said.err
    report = json.loads((out / "accuracy.json").read_text())
    assert report["tokens"] == report["with_fp8_cache"]["tokens"] == 598 and report["kl_mean"] > 0
    assert report["with_fp8_cache"]["kl_mean"] != report["kl_mean"] and "--kv fp8" in said.out
    assert main(command) == 2 and "expected a new directory" in capsys.readouterr().err
    assert (
        main(["generate", "a", "-m", str(out), "--max-tokens", "3", "--max-model-len", "64"]) == 0
    )
    assert main(["quantize", str(source), str(tmp_path / "b"), "--no-report", "-q"]) == 0
    assert (
        "perplexity" not in capsys.readouterr().out and not (tmp_path / "b/accuracy.json").exists()
    )
