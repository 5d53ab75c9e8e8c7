"""n-gram speculation: the guesses, and that no output depends on them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.checkpoints import model_config, write_checkpoint
from lib.hold import held
from qwen1m_ext import LLM, SamplingParams, demo_model_path, ops
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import ConfigError
from qwen1m_ext.haystack import make_sample
from qwen1m_ext.request import RequestOutput
from qwen1m_ext.speculative import MAX_DRAFT, MAX_PAUSE, NgramSpeculator

# --- the guesses ----------------------------------------------------------------------------------


def guess(tokens: list[int], room: int = 4) -> list[int]:
    return NgramSpeculator().guess(tokens, room)


def test_a_guess_is_what_followed_the_same_tokens() -> None:
    assert guess([7, 1, 2, 3, 4, 5, 6, 1, 2]) == [3, 4, 5, 6]
    assert guess([7, 1, 2, 3, 4, 5, 6, 1, 2], room=2) == [3, 4]
    assert guess([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]) == [4, 9, 1, 2], "the last time counts"
    assert guess([0, 1, 2, 3, 9, 9, 1, 2, 4, 0, 1, 2]) == [3, 9, 9, 1], "a longer match counts more"


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4], [2, 5, 1, 6, 9, 1]])
def test_without_two_tokens_that_occurred_before_there_is_none(tokens: list[int]) -> None:
    assert guess(tokens) == []
    assert guess([5, 6, 7, 5, 6], room=0) == []


def test_a_repeating_end_goes_on_repeating() -> None:
    assert guess([9, 1, 2, 1, 2]) == [1, 2, 1, 2]
    assert guess([3, 3, 3]) == [3, 3, 3, 3]


def test_a_history_that_grows_is_searched_whole() -> None:
    """Token by token, far beyond the first capacity, as a search from scratch finds it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (900,), generator=generator).tolist()
    speculator = NgramSpeculator()
    for n in range(3, 900, 7):
        assert speculator.guess(tokens[:n], 4) == guess(tokens[:n])


def test_length_adapts_to_what_was_right() -> None:
    speculator, tokens = NgramSpeculator(), [3] * 9
    assert len(speculator.guess(tokens, 99)) == 4

    def checked(drafted: int, accepted: int) -> None:
        speculator.keep(0, drafted, [(3, None)] * (accepted + 1))
        speculator.ahead.clear()

    for expected in (8, MAX_DRAFT, MAX_DRAFT):
        drafted = len(speculator.guess(tokens, 99))
        checked(drafted, drafted)
        assert len(speculator.guess(tokens, 99)) == expected
    checked(15, 5)
    assert len(speculator.guess(tokens, 99)) == 6
    pauses = []
    for _ in range(8):
        checked(6, 0)
        pause = 0
        while not speculator.guess(tokens, 99):
            pause += 1
        pauses.append(pause)
        assert len(speculator.guess(tokens, 99)) == 2
    assert pauses == [1, 2, 4, 8, 16, MAX_PAUSE, MAX_PAUSE, MAX_PAUSE]
    checked(2, 1)
    assert len(speculator.guess(tokens, 99)) == 2, "one that is right ends the pauses"


# --- the output -----------------------------------------------------------------------------------


def repetitive(length: int, seed: int, period: int = 11) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(0, 256, (period,), generator=generator).tolist()
    return (some * length)[:length]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> LLM:
    return LLM(checkpoint, max_model_len=1024, prefill_chunk_tokens=128)


@pytest.fixture(scope="module")
def fast(checkpoint: Path) -> LLM:
    return LLM(checkpoint, max_model_len=1024, prefill_chunk_tokens=128, speculative="ngram")


def run(llm: LLM, prompt: list[int], params: SamplingParams) -> RequestOutput:
    return llm.generate({"prompt_token_ids": prompt}, params)[0]


@pytest.mark.parametrize("length", [3, 30, 60, 120, 300])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.05, "min_tokens": 20},
        {"temperature": 1, "seed": 3, "n": 3},
        {"temperature": 0.7, "top_k": 4, "seed": 1},
    ],
    ids=str,
)
def test_the_output_is_the_same(plain: LLM, fast: LLM, length: int, params: dict[str, Any]) -> None:
    """Across pages of 128 and chunks of 48 tokens, below and beyond the trained length of 64."""
    sampling = SamplingParams(max_tokens=150, ignore_eos=True, logprobs=2, **params)
    want, got = (run(llm, repetitive(length, length), sampling) for llm in (plain, fast))
    for a, b in zip(want.outputs, got.outputs, strict=True):
        assert a.token_ids == b.token_ids and a.text == b.text
        assert a.finish_reason == b.finish_reason
        assert a.logprobs is not None and b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert list(x) == list(y)
            for token in x:
                assert x[token].logprob == pytest.approx(y[token].logprob, abs=1e-3)
    assert got.metrics.output_tokens == want.metrics.output_tokens
    assert want.metrics.draft_tokens == 0


def test_fewer_steps_than_tokens(fast: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = fast.engine.model, []
    forward = model.forward

    def spy(ids: Tensor, *args: Any) -> Tensor:
        calls.append(len(ids))
        return forward(ids, *args)

    monkeypatch.setattr(model, "forward", spy)
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    metrics = run(fast, repetitive(60, 5), params).metrics
    assert metrics.output_tokens == 300
    assert 0 < metrics.accepted_tokens <= metrics.draft_tokens
    decodes = len(calls) - 1
    # a step yields its own token and those accepted; perhaps one is computed beyond the end
    assert abs(decodes + metrics.accepted_tokens - 299) <= 2
    assert decodes < 200 and max(calls[1:]) <= MAX_DRAFT + 1


@pytest.mark.parametrize("stop", ["token", "text", "eos"])
def test_a_sample_ends_inside_a_guess(plain: LLM, fast: LLM, stop: str) -> None:
    prompt = repetitive(60, 5)
    whole = run(plain, prompt, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    tokens, text = whole.outputs[0].token_ids, whole.outputs[0].text
    if stop == "token":
        params = SamplingParams(temperature=0, max_tokens=80, stop_token_ids=[tokens[37]])
    elif stop == "text":
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, stop=text[40:43])
    else:
        params = SamplingParams(temperature=0, max_tokens=80, logit_bias={258: 8.0})
    want, got = (run(llm, prompt, params) for llm in (plain, fast))
    assert got.outputs[0].token_ids == want.outputs[0].token_ids
    assert got.outputs[0].text == want.outputs[0].text
    assert got.outputs[0].stop_reason == want.outputs[0].stop_reason
    cache = fast.engine.cache
    assert cache.allocator.num_free == cache.num_pages


def test_sessions_go_on_from_what_was_sampled(plain: LLM, fast: LLM) -> None:
    """What a session keeps after a speculative answer is that answer's keys and values."""
    turns = []
    for llm in (plain, fast):
        session = llm.open_session()
        prompt, said = repetitive(20, 8, period=5), []
        for turn in range(3):
            params = SamplingParams(temperature=0, max_tokens=12 + turn, ignore_eos=True)
            *_, output = llm.stream({"prompt_token_ids": prompt}, params, session=session)
            said.append(output.outputs[0].token_ids)
            prompt = prompt + said[-1] + [65 + turn, 66]
        session.close()
        turns.append(said)
    assert turns[0] == turns[1]


def test_many_requests_and_too_few_pages(checkpoint: Path, plain: LLM) -> None:
    """Preempted among tokens that were sampled ahead: none is lost or sampled anew."""
    engine = Engine(
        checkpoint, max_model_len=1024, prefill_chunk_tokens=128, max_num_seqs=6,
        speculative="ngram",
    )  # fmt: skip
    plan = [
        (repetitive(length, seed), params)
        for seed, (length, params) in enumerate(
            [
                (400, SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)),
                (400, SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)),
                (390, SamplingParams(temperature=0.5, seed=2, max_tokens=300, ignore_eos=True)),
                (50, SamplingParams(n=3, seed=5, max_tokens=30, ignore_eos=True)),
                (700, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)),
            ]
        )
    ]
    with held(engine):
        handles = [engine.submit(prompt, params) for prompt, params in plan]
    accepted = 0
    for handle, (prompt, params) in zip(handles, plan, strict=True):
        output = handle.result()
        accepted += output.metrics.accepted_tokens
        want = run(plain, prompt, params)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in want.outputs]
    stats = engine.stats()
    assert stats.preemptions_total > 0 and accepted > 100
    engine.shutdown(drain=True)
    assert engine.cache.allocator.num_free == engine.cache.num_pages


def test_a_grammar_sees_every_token_once_and_in_order(fast: LLM) -> None:
    seen: list[list[int]] = []

    def processor(index: int) -> Callable[[list[int], Tensor], Tensor]:
        def allow(output: list[int], logits: Tensor) -> Tensor:
            seen.append(list(output))
            logits[:] = -torch.inf
            logits[[97 + len(output) % 3, 258][: 1 + (len(output) >= 40)]] = 1.0
            return logits if len(output) < 40 else logits.index_fill_(0, torch.tensor([258]), 9.0)

        return allow

    params = SamplingParams(temperature=0, max_tokens=60)
    handle = fast.engine.submit([1, 2, 3], params, logits_processor=processor)
    output = handle.result()
    tokens = output.outputs[0].token_ids
    assert tokens == [97 + i % 3 for i in range(40)] + [258]
    assert output.metrics.accepted_tokens > 10
    assert seen[:41] == [tokens[:i] for i in range(41)]
    # how many steps go on before the end is known depends on the machine, their order does not
    assert [len(prefix) for prefix in seen] == list(range(len(seen)))


def test_nothing_is_drawn_beyond_the_end(fast: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess that goes on after the end of the text is checked up to there."""
    monkeypatch.setattr(NgramSpeculator, "guess", lambda *_: [97, 258, 97, 97])
    asked: list[list[int]] = []
    ended, known = threading.Event(), []

    def processor(index: int) -> Callable[[list[int], Tensor], Tensor]:
        def allow(output: list[int], logits: Tensor) -> Tensor:
            asked.append(list(output))
            if len(output) > 2:  # a later step: the one with the end has told it to the caller
                known.append(ended.wait(30))
            logits[:] = -torch.inf
            logits[258 if len(output) == 2 else 97] = 1.0
            return logits

        return allow

    params = SamplingParams(temperature=0, max_tokens=60)
    output = fast.engine.submit([1, 2, 3], params, logits_processor=processor).result()
    ended.set()
    assert output.outputs[0].token_ids == [97, 97, 258]
    assert asked[:3] == [[], [97], [97, 97]] and all(known)


def test_the_distribution_is_the_model_s(
    fast: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,560 samples of three tokens, three choices each, against exact probabilities.

    The guess is always the likeliest token, which is right about every second time.
    """
    prompt, count = repetitive(30, 9), 2560
    params = SamplingParams(n=64, temperature=2.0, top_k=3, max_tokens=4, ignore_eos=True)

    def choices(tokens: list[int]) -> list[tuple[int, float]]:
        logits = plain.logits(tokens)[-1]
        values, ids = logits.double().topk(3)
        return list(zip(ids.tolist(), torch.softmax(values / 2.0, 0).tolist(), strict=True))

    exact: dict[tuple[int, ...], float] = {(): 1.0}
    likeliest: dict[tuple[int, ...], int] = {}
    for _ in range(3):
        longer = {}
        for head, p in exact.items():
            options = choices([*prompt, *head])
            likeliest[head] = options[0][0]
            longer |= {(*head, token): p * q for token, q in options}
        exact = longer

    def guess(self: NgramSpeculator, tokens: list[int], room: int) -> list[int]:
        head, draft = tuple(tokens[len(prompt) :]), []
        while head in likeliest and len(draft) < room:
            draft.append(likeliest[head])
            head = (*head, draft[-1])
        return draft

    monkeypatch.setattr(NgramSpeculator, "guess", guess)
    outputs = [run(fast, prompt, replace(params, seed=i)) for i in range(count // params.n)]
    seen = Counter(tuple(o.token_ids[:3]) for output in outputs for o in output.outputs)
    assert set(seen) <= set(exact)
    drafted = sum(output.metrics.draft_tokens for output in outputs)
    accepted = sum(output.metrics.accepted_tokens for output in outputs)
    assert 500 < accepted < drafted - 500, "the check has to accept and to refuse"
    kept = {head: p for head, p in exact.items() if p * count >= 5}
    rest = count - sum(seen[head] for head in kept)
    chi2 = sum((seen[head] - p * count) ** 2 / (p * count) for head, p in kept.items())
    expected_rest = count * (1 - sum(kept.values()))
    if expected_rest >= 5:
        chi2 += (rest - expected_rest) ** 2 / expected_rest
    freedom = len(kept)
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5, (chi2, freedom)  # one in a million


def test_bfloat16_differs_only_where_two_tokens_are_near(tmp_path: Path) -> None:
    """Up to the first step whose two best logits are less than 0.05 apart, all tokens agree."""
    plain = LLM(demo_model_path(), max_model_len=4096)
    fast = LLM(demo_model_path(), max_model_len=4096, speculative="ngram")
    near = steps = accepted = 0
    for seed in range(6):
        prompt = plain.get_tokenizer().encode(make_sample(1500, seed=seed).prompt)
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        want, got = (run(llm, prompt, params) for llm in (plain, fast))
        tokens = want.outputs[0].token_ids
        logits = plain.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        gaps = logits.topk(2).values
        close = (gaps[:, 0] - gaps[:, 1] < 0.05).tolist()
        until = close.index(True) if True in close else len(tokens)
        assert got.outputs[0].token_ids[:until] == tokens[:until]
        near, steps = near + sum(close), steps + len(close)
        accepted += got.metrics.accepted_tokens
    print(f"{near} of {steps} steps had two near tokens; {accepted} guesses accepted")
    assert near < 0.1 * steps and accepted > 50


def test_plain_rope_and_one_layer(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, model_config(num_hidden_layers=1), gain=2.0)
    outputs = [
        run(LLM(directory, rope="plain", max_model_len=512, speculative=s), repetitive(100, 1),
            SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        for s in (None, "ngram")
    ]  # fmt: skip
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_a_check_reads_the_cache_once(fast: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the trained length too, where each of its rows has a temperature of its own."""
    calls: list[tuple[int, list[float]]] = []
    plain = ops.decode_attention

    def spy(out: Tensor, lse: Any, q: Tensor, k: Any, v: Any, table: Any, kv_len: Tensor,
            logit_scale: Tensor, *rest: Any) -> None:  # fmt: skip
        assert len(q) == 1
        calls.append((int(kv_len[0]) - q.shape[1], logit_scale[0].tolist()))
        plain(out, lse, q, k, v, table, kv_len, logit_scale, *rest)

    monkeypatch.setattr(ops, "decode_attention", spy)
    prompt = repetitive(900, 5)
    output = run(fast, prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert output.metrics.accepted_tokens > 10
    config = fast.engine.model.config
    layers, dim = config.num_layers, config.head_dim
    checks = [call for call in calls if len(call[1]) > 1]
    # The last layer leaves out rows that nobody asked for: all of a check are asked for.
    assert len(checks) > layers and len(checks) % layers == 0
    for first, scales in calls:
        lengths = [max(len(prompt), first + row + 1) for row in range(len(scales))]
        expected = [fast.engine.dual_chunk.temperature(n) ** 2 / dim**0.5 for n in lengths]
        assert scales == pytest.approx(expected, rel=1e-6)
        assert len(set(scales)) == len(scales)


def test_another_name_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="speculative: expected ngram or None, got 'medusa'"):
        LLM(checkpoint, speculative="medusa")  # type: ignore[arg-type]
