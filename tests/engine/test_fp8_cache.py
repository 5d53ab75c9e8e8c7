"""A cache in fp8: its scales, and that every way to the keys and values meets the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.checkpoints import model_config, random_tensors, write_checkpoint, write_weights
from qwen1m_ext import LLM, SamplingParams, demo_model_path, kv_scales
from qwen1m_ext.accuracy import compare
from qwen1m_ext.attention import Batch
from qwen1m_ext.cli import main
from qwen1m_ext.config import load_config
from qwen1m_ext.errors import ConfigError, SessionFileError, WeightsError
from qwen1m_ext.fp8 import FP8, LARGEST
from qwen1m_ext.haystack import is_correct, make_sample
from qwen1m_ext.kv_cache import KVCache
from qwen1m_ext.session_files import load_session, save_session

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
PROMPT = [(7 * i + i * i) % 250 for i in range(300)]  # 3 pages; 7 chunks of the model


def make(checkpoint: Path, **options: Any) -> LLM:
    options = {"max_model_len": 1024, "prefill_chunk_tokens": 100, "attention": "dense"} | options
    return LLM(checkpoint, **options)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def fp8(request: pytest.FixtureRequest, checkpoint: Path) -> LLM:
    """A random model with its cache in fp8."""
    return make(checkpoint, dtype=request.param, kv_cache_dtype="fp8")


@pytest.fixture(scope="module")
def fp8_exact(checkpoint: Path) -> LLM:
    """The same in float32: results are token-identical, however they are batched."""
    return make(checkpoint, dtype="float32", kv_cache_dtype="fp8")


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """What e4m3 with these scales keeps of pages [n, kv_heads, 128, D], by torch's conversion."""
    scale = scale[:, None, None]
    codes = (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)
    return (codes.float() * scale).to(x.dtype)


class Rounding(Batch):
    """A batch over a cache in the computing dtype that holds what e4m3 would have kept."""

    of: KVCache  # whose scales

    def append_kv(self, layer: int, *args: Any) -> None:
        super().append_kv(layer, *args)
        for pool, scales in ((self._cache.k, self.of.k_scale), (self._cache.v, self.of.v_scale)):
            assert scales is not None
            pool[layer].copy_(rounded(pool[layer], scales[layer]))


def logprobs(llm: LLM, prompt: list[int]) -> tuple[list[int], Tensor]:
    """(tokens, their log probabilities)."""
    output = llm.generate({"prompt_token_ids": prompt}, GREEDY)
    one = output[0].outputs[0]
    assert one.logprobs is not None
    values = [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)]
    return one.token_ids, torch.tensor(values)


# --- the numbers ----------------------------------------------------------------------------------


def test_prefill_meets_what_e4m3_keeps_to_the_bit(
    fp8_exact: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a cache in float32 that is rounded by torch after every append."""
    plain = make(checkpoint, dtype="float32")
    unrounded = plain.logits(PROMPT)
    monkeypatch.setattr(Rounding, "of", fp8_exact.engine.cache, raising=False)
    monkeypatch.setattr("qwen1m_ext.runner.Batch", Rounding)
    expected = plain.logits(PROMPT)
    monkeypatch.undo()
    actual = fp8_exact.logits(PROMPT)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, unrounded)


def test_decode_meets_the_same_numbers(
    fp8_exact: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op widens on its way: the same tokens, log probabilities within rounding of fp32."""
    plain = make(checkpoint, dtype="float32")
    monkeypatch.setattr(Rounding, "of", fp8_exact.engine.cache, raising=False)
    monkeypatch.setattr("qwen1m_ext.runner.Batch", Rounding)
    tokens, expected = logprobs(plain, PROMPT)
    monkeypatch.undo()
    again, actual = logprobs(fp8_exact, PROMPT)
    assert again == tokens
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_results_do_not_depend_on_chunks_batches_and_reuse(
    fp8_exact: LLM, checkpoint: Path
) -> None:
    prompts = [PROMPT, PROMPT[:130], PROMPT[5:77]]
    alone = [logprobs(fp8_exact, prompt)[0] for prompt in prompts]
    whole = make(checkpoint, dtype="float32", kv_cache_dtype="fp8", prefill_chunk_tokens=1024)
    together = whole.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)
    assert [output.outputs[0].token_ids for output in together] == alone
    again = whole.generate({"prompt_token_ids": PROMPT}, GREEDY)[0]
    assert again.num_cached_tokens == 256 and again.outputs[0].token_ids == alone[0]
    guessing = make(checkpoint, dtype="float32", kv_cache_dtype="fp8", speculative="ngram")
    assert [logprobs(guessing, prompt)[0] for prompt in prompts] == alone


def test_sparse_prefill_reads_it(fp8_exact: LLM, checkpoint: Path) -> None:
    """With full budgets the answer is that of dense prefill."""
    sparse = make(checkpoint, dtype="float32", kv_cache_dtype="fp8", attention="sparse",
                  prefill_chunk_tokens=1024)  # fmt: skip
    assert sparse.engine.sparse is not None
    sparse.engine.sparse.v_size.fill_(1024)
    sparse.engine.sparse.s_size.fill_(1024)
    output = sparse.generate({"prompt_token_ids": PROMPT}, GREEDY)[0]
    assert output.metrics.sparse and output.metrics.recall == pytest.approx(1, abs=1e-5)
    assert output.outputs[0].token_ids == logprobs(fp8_exact, PROMPT)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_pages(checkpoint: Path, dtype: torch.dtype) -> None:
    """Every code, with a NaN that stays one; pages that nobody asked for are left alone."""
    cache = KVCache(load_config(checkpoint), FP8, 512, widened=dtype)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    for pool in (cache.k[1], cache.v[1]):
        pool.view(-1, 256).copy_(codes.expand(pool.numel() // 256, 256))
    assert cache.k_scale is not None and cache.v_scale is not None
    cache.k_scale[1] = torch.tensor([0.25, 2.0**-30])
    cache.v_scale[1] = torch.tensor([64.0, 1.0])
    for wide in cache.widened(1, torch.arange(4)):
        wide.fill_(-1)
    k, v = cache.widened(1, torch.tensor([3, 1]))
    for wide, pool, scale in ((k, cache.k[1], cache.k_scale), (v, cache.v[1], cache.v_scale)):
        expected = pool.float() * scale[1][:, None, None]
        assert torch.equal(wide[[1, 3]].nan_to_num(7), expected[[1, 3]].nan_to_num(7))
        assert wide[1].isnan().sum() == expected[1].isnan().sum() > 0
        assert (wide[[0, 2]] == -1).all()


def test_the_demo_model_finds_its_needles() -> None:
    """docs/numerics.md states the divergence; the facts are found as with a bf16 cache."""
    llm = LLM(demo_model_path(), max_model_len=4200, kv_cache_dtype="fp8", attention="dense")
    for seed in range(4):
        sample = make_sample(4096, seed=seed)
        text = llm.generate(sample.prompt, SamplingParams(temperature=0, max_tokens=8))
        assert is_correct(text[0].outputs[0].text, sample), seed


# --- scales ---------------------------------------------------------------------------------------


def test_scales_hold_what_the_model_writes(fp8: LLM) -> None:
    """Powers of two with room to spare: nothing of a prompt saturates, and little is given away."""
    cache = fp8.engine.cache
    cache.allocator.clear()
    for pool in (*cache.k, *cache.v):
        pool.zero_()
    logprobs(fp8, PROMPT)
    for pools, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        assert scales is not None
        assert (scales.log2() == scales.log2().round()).all()
        for pool in pools:
            largest = pool.float().abs().amax((0, 2, 3))
            assert (largest < LARGEST).all() and (largest > LARGEST / 16).all()


def test_scales_depend_on_the_checkpoint_alone(fp8_exact: LLM, checkpoint: Path) -> None:
    other = make(checkpoint, dtype="float32", kv_cache_dtype="fp8", max_model_len=300,
                 prefill_chunk_tokens=64)  # fmt: skip
    other.generate({"prompt_token_ids": [200] * 50}, GREEDY)
    assert other.engine.kv_exponents == fp8_exact.engine.kv_exponents
    assert other.engine.model_key == fp8_exact.engine.model_key


def test_a_large_bias_leaves_the_other_channels_their_precision(tmp_path: Path) -> None:
    """300 in a channel that hardly turns: the same for every key, so that softmax drops it."""
    tensors = random_tensors(model_config())
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_proj.bias"][7] = 300.0
    write_checkpoint(tmp_path)
    write_weights(tmp_path, tensors)
    plain, fp8 = make(tmp_path), make(tmp_path, kv_cache_dtype="fp8")
    exponents = fp8.engine.kv_exponents
    assert exponents is not None and exponents["k"][0][0] == 1  # 600 / 448 -> 2
    assert compare(plain, fp8, PROMPT).kl_mean < 1e-4


def test_stored_scales_are_used_and_checked(
    fp8_exact: LLM, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    kv_scales.store(fp8_exact.engine.cache, copy)
    path = copy / kv_scales.FILE_NAME
    fields = json.loads(path.read_text())
    assert fields == fp8_exact.engine.kv_exponents
    fields["v"][1][0] += 1
    path.write_text(json.dumps(fields))
    changed = make(copy, dtype="float32", kv_cache_dtype="fp8").engine
    assert changed.kv_exponents == fields and changed.model_key != fp8_exact.engine.model_key
    for bad, text in (
        ({"k": fields["k"]}, r"expected the fields k and v, got \['k'\]"),
        (fields | {"v": [[1, 2]]}, "v: expected 2 lists of 2 whole numbers"),
        (fields | {"k": [[0, 0.5], [0, 0]]}, "k: expected 2 lists of 2 whole numbers"),
        (fields | {"k": [[0, 90], [0, 0]]}, "k: expected exponents from -100 to 7, got 0 to 90"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=text):
            make(copy, kv_cache_dtype="fp8")


def test_a_model_without_finite_keys_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(model_config())
    tensors["model.layers.1.self_attn.v_proj.bias"][3] = torch.inf
    write_checkpoint(tmp_path)
    write_weights(tmp_path, tensors)
    with pytest.raises(WeightsError, match="fp8 needs finite keys and values, .* of layer 1"):
        make(tmp_path, kv_cache_dtype="fp8")


def test_an_unknown_kind_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: expected auto or fp8, got 'int8'"):
        make(checkpoint, kv_cache_dtype="int8")


# --- what depends on it ---------------------------------------------------------------------------


def test_a_session_file_keeps_codes_and_scales(
    fp8_exact: LLM, checkpoint: Path, tmp_path: Path
) -> None:
    engine = fp8_exact.engine
    session = fp8_exact.open_session(freeze_temperature=True)
    *_, first = fp8_exact.stream({"prompt_token_ids": PROMPT}, GREEDY, session=session)
    info = save_session(engine, session, tmp_path, "book")
    assert info.key.dtype == "float8_e4m3fn" and info.key.kv_exponents == engine.kv_exponents
    follow = {"prompt_token_ids": [*PROMPT, *first.outputs[0].token_ids, 65, 66]}
    *_, expected = fp8_exact.stream(follow, GREEDY, session=session)
    session.close()

    fresh = make(checkpoint, dtype="float32", kv_cache_dtype="fp8")
    loaded = load_session(fresh.engine, Path(info.path))
    *_, actual = fresh.stream(follow, GREEDY, session=loaded)
    assert actual.outputs[0].token_ids == expected.outputs[0].token_ids
    assert actual.num_cached_tokens == expected.num_cached_tokens >= len(PROMPT)

    plain = make(checkpoint, dtype="float32")
    with pytest.raises(SessionFileError, match="dtype: expected float32 .* got float8_e4m3fn"):
        load_session(plain.engine, Path(info.path))
    fresh.engine.kv_exponents = {"k": [[0, 0], [0, 0]], "v": [[0, 0], [0, 0]]}
    with pytest.raises(SessionFileError, match="kv_exponents: expected the scales .* got others"):
        load_session(fresh.engine, Path(info.path))


def test_the_prefix_root_knows_the_cache(fp8_exact: LLM, checkpoint: Path) -> None:
    assert make(checkpoint, dtype="float32").engine.model_key != fp8_exact.engine.model_key


def test_quantize_stores_scales(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(checkpoint), str(tmp_path / "new"), "--no-report", "-q"]) == 0
    stored = json.loads((tmp_path / "new" / kv_scales.FILE_NAME).read_text())
    engine = make(tmp_path / "new", kv_cache_dtype="fp8").engine
    assert engine.kv_exponents == stored
    kv_scales.calibrate(engine.model, engine.rotary, engine.cache, 64)
    assert kv_scales.exponents(engine.cache) == stored


def test_on_the_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-m", str(checkpoint), "--max-model-len", "64", "--temperature", "0", "-q"]
    assert main(["generate", "abc", *options, "--max-tokens", "4", "--kv", "fp8"]) == 0
    assert capsys.readouterr().out
