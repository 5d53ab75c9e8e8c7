"""The engine through its face: chunking, logprobs, samples, stops, refusals, cancelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext import device as device_module
from qwen1m_ext import model as model_module
from qwen1m_ext.cost_model import prefill_flops
from qwen1m_ext.errors import (
    BackendError,
    ConfigError,
    ContextTooLong,
    MemoryBudgetError,
    RequestError,
)
from qwen1m_ext.events import Progress

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def ids(llm: LLM, tokens: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate({"prompt_token_ids": tokens}, params)[0].outputs[0].token_ids


@pytest.mark.parametrize("chunk", [1, 7, 48, 100, 128, 333])
def test_any_prefill_chunking_gives_the_same_tokens(checkpoint: Path, llm: LLM, chunk: int) -> None:
    """Across several DCA chunks of 48 tokens, which `chunk` mostly does not divide."""
    prompt = prompt_ids(300)
    other = LLM(checkpoint, max_model_len=1024, prefill_chunk_tokens=chunk)
    assert ids(other, prompt) == ids(llm, prompt)
    torch.testing.assert_close(other.logits(prompt), llm.logits(prompt), atol=1e-3, rtol=0)


def test_decode_continues_what_prefill_began(llm: LLM) -> None:
    """Token by token or at once: the logits of the last position agree.

    Below the trained length only: beyond it the temperature depends on the prompt's length.
    """
    prompt = prompt_ids(40)
    output = ids(llm, prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    logits = llm.logits(prompt + output)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output


def test_only_requested_rows_of_the_last_layer_change_nothing(llm: LLM) -> None:
    """prompt_logprobs computes every row, plain generation only the last: same continuation."""
    prompt = prompt_ids(300)
    with_logprobs = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=1)
    assert ids(llm, prompt, with_logprobs) == ids(llm, prompt)


def test_prompt_logprobs_are_the_logits_of_each_position(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "LOGITS_BLOCK_BYTES", 7 * 4 * 260)  # 7 rows a block
    prompt = prompt_ids(250)
    params = SamplingParams(max_tokens=1, prompt_logprobs=3)
    output = llm.generate({"prompt_token_ids": prompt}, params)[0]
    want = torch.log_softmax(llm.logits(prompt).double(), -1)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 250 and output.prompt_logprobs[0] is None
    for position in range(1, 250):
        entries = output.prompt_logprobs[position]
        assert entries is not None and prompt[position] in entries and len(entries) in (3, 4)
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(want[position - 1, token]), abs=1e-4)


def test_output_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
    output = llm.generate("abc", params)[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 5
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert entries[token].rank == 1 and len(entries) == 2
    total = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)


def test_two_runs_with_one_seed_are_identical_and_samples_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("seed", params)[0] for _ in range(2))
    samples = [o.token_ids for o in first.outputs]
    assert samples == [o.token_ids for o in second.outputs]
    assert len({tuple(s) for s in samples}) == 3
    one = SamplingParams(n=1, seed=11, max_tokens=12, ignore_eos=True)
    assert ids(llm, llm.get_tokenizer().encode("seed"), one) == samples[0]


def test_streaming_ends_in_what_generate_returns(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    states = list(llm.stream("stream", params))
    assert [len(s.outputs[0].token_ids) for s in states] == list(range(1, 10))
    assert [s.finished for s in states] == [False] * 8 + [True]
    whole = llm.generate("stream", params)[0]
    assert states[-1].outputs[0].text == whole.outputs[0].text
    assert whole.metrics.output_tokens == 9 and whole.metrics.time_to_first_token > 0


def test_chat_uses_the_template(llm: LLM) -> None:
    output = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)[0]
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    several = [[{"role": "user", "content": c}] for c in "ab"]
    assert len(llm.chat(several, GREEDY)) == 2


def test_prompts_in_every_form(llm: LLM) -> None:
    text = [97, 98, 99]
    outputs = llm.generate(["abc", {"prompt": "abc"}, {"prompt_token_ids": text}], [GREEDY] * 3)
    assert [o.prompt_token_ids for o in outputs] == [text] * 3
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["abc", "abc", None]


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", RequestError, "expected at least one token, got an empty prompt"),
        ({"prompt_token_ids": []}, RequestError, "at least one token"),
        ({"prompt_token_ids": [5, 260]}, RequestError, r"ids in \[0, 260\), got 260"),
        ({"prompt_token_ids": [-1]}, RequestError, r"ids in \[0, 260\), got -1"),
        ({"prompt_token_ids": ["a"]}, RequestError, "list of integers"),
        ({"text": "a"}, RequestError, "prompt: expected a string or"),
        (7, RequestError, "got int"),
        ("x" * 1024, ContextTooLong, "at most 1023 tokens .* got 1024; nothing was truncated"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        llm.generate([prompt], GREEDY)  # type: ignore[list-item]


@pytest.mark.parametrize("params", [{"logit_bias": {5: 1.0, 260: 1.0}}, {"stop_token_ids": [260]}])
def test_sampling_outside_the_vocabulary_is_refused_before_any_work(
    llm: LLM, params: dict[str, Any]
) -> None:
    reports: list[Progress] = []
    (name,) = params
    with pytest.raises(RequestError, match=rf"{name}: expected token ids in \[0, 260\), got 260"):
        llm.generate("fine", SamplingParams(**params), on_progress=reports.append)
    assert not reports


def test_a_bad_prompt_among_good_ones_is_refused_before_any_work(llm: LLM) -> None:
    reports: list[Progress] = []
    with pytest.raises(RequestError):
        llm.generate(["fine", ""], GREEDY, on_progress=reports.append)
    assert not reports


def test_output_ends_at_the_context_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = llm.generate("x" * 1000, params)[0].outputs[0]
    assert len(output.token_ids) == 24 and output.finish_reason == "length"


def test_progress_is_monotonic_and_ends_at_the_total(llm: LLM) -> None:
    reports: list[Progress] = []
    llm.generate({"prompt_token_ids": prompt_ids(250)}, GREEDY, on_progress=reports.append)
    done = [r.done for r in reports]
    assert len(done) == 6  # 3 chunks x 2 layers
    assert done == sorted(done) and done[-1] == 250 and reports[-1].eta == 0
    assert all(r.eta is not None and r.eta >= 0 and r.total == 250 for r in reports)


def test_work_is_counted_in_flops(llm: LLM) -> None:
    """Two halves add up, and the second half of a long prompt is more work than the first."""
    config = llm.engine.config
    whole = prefill_flops(config, 0, 1000)
    halves = prefill_flops(config, 0, 500), prefill_flops(config, 500, 1000)
    assert sum(halves) == pytest.approx(whole) and halves[1] > halves[0]


class _Stop(Exception):
    pass


def test_cancelling_gives_every_page_back(llm: LLM) -> None:
    def cancel(progress: Progress) -> None:
        if progress.done > 150:
            raise _Stop

    with pytest.raises(_Stop):
        llm.generate({"prompt_token_ids": prompt_ids(250)}, GREEDY, on_progress=cancel)
    cache = llm.engine.cache
    assert cache.allocator.num_free == cache.num_pages
    stream = llm.stream("abc", GREEDY)
    next(stream)
    stream.close()
    assert cache.allocator.num_free == cache.num_pages
    assert len(ids(llm, [1, 2, 3])) == 24


def test_plain_rope_differs_only_beyond_the_chunk(checkpoint: Path, llm: LLM) -> None:
    """DCA equals plain RoPE up to chunk_size + 1 = 65 tokens, if the temperature is still 1."""
    plain = LLM(checkpoint, max_model_len=1024, rope="plain")
    short, long = prompt_ids(64), prompt_ids(300)
    torch.testing.assert_close(plain.logits(short), llm.logits(short), atol=1e-3, rtol=0)
    assert (plain.logits(long) - llm.logits(long)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_model_len": 5000}, ConfigError, "max_model_len: expected 2 to 4096 .* got 5000"),
        ({"max_model_len": 0}, ConfigError, "max_model_len"),
        ({"dtype": "float16"}, ConfigError, "dtype: expected auto, bfloat16 or float32"),
        ({"rope": "yarn"}, ConfigError, "rope: expected auto, dca or plain, got 'yarn'"),
        ({"device": "tpu"}, ConfigError, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"device": "cuda"}, BackendError, "device: cuda was asked for, but "),
        ({"prefill_chunk_tokens": 0}, ConfigError, "prefill_chunk_tokens: expected >= 1, got 0"),
    ],
)
def test_bad_arguments(
    checkpoint: Path, arguments: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        LLM(checkpoint, **arguments)  # type: ignore[arg-type]


def test_dca_without_its_config_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, model_config(dual_chunk_attention_config=None))
    with pytest.raises(ConfigError, match="no dual_chunk_attention_config"):
        LLM(directory, rope="dca")


def test_float16_checkpoints_need_a_choice(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, model_config(torch_dtype="float16"))
    with pytest.raises(ConfigError, match="dtype: the checkpoint is float16"):
        LLM(directory)
    assert LLM(directory, dtype="float32").engine.dtype == torch.float32


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, model_config(vocab_size=258))
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 259 tokens.*vocab_size 258"):
        LLM(directory)


def test_memory_is_checked_before_work(
    checkpoint: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_module, "available_bytes", lambda: 3_000_000)
    with pytest.raises(MemoryBudgetError, match=r"4096 tokens need \d+ bytes .* 3000000 bytes"):
        LLM(checkpoint, max_model_len=4096)
    smaller = LLM(checkpoint, prefill_chunk_tokens=512)
    assert 128 <= smaller.max_model_len < 4096
    assert smaller.engine.plan.total <= 2_700_000
    assert "not the model's 4096" in caplog.text
    monkeypatch.setattr(device_module, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match=r"KV cache of 124 tokens needs 65536 bytes"):
        llm.generate({"prompt_token_ids": prompt_ids(100)}, GREEDY)


def test_bfloat16_runs_close_to_float32(checkpoint: Path, llm: LLM) -> None:
    low = LLM(checkpoint, dtype="bfloat16", max_model_len=1024)
    prompt = prompt_ids(200)
    a, b = low.logits(prompt), llm.logits(prompt)
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.98


def test_without_a_tokenizer(checkpoint: Path) -> None:
    llm = LLM(checkpoint, max_model_len=256, skip_tokenizer_init=True)
    assert ids(llm, [1, 2, 3]) and llm.generate({"prompt_token_ids": [1]}, GREEDY)[0].outputs
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        llm.generate("text", GREEDY)
    with pytest.raises(RequestError, match="stop: expected none"):
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(stop="x"))
