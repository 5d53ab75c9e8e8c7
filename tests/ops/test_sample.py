"""sample: its distribution against the float64 definition, and the same token on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.cases import DTYPES, SEEDS, Case, case, cases, spread
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.generator import tensor
from lib.refuse import refuses
from qwen1m_ext import ops
from qwen1m_ext.request import SamplingParams
from qwen1m_ext.sampler import Sampler
from reference.sample import adjust, distribution


def row_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logits [vocab], history [vocab] int32): a third of the tokens was seen, some of it often."""
    vocab = case["vocab"]
    logits = (tensor(SEEDS["logits"], vocab) * case["amplitude"]).to(dtype)
    history = torch.where(tensor(SEEDS["logits"] + 1, vocab) > 0.6, torch.arange(vocab) % 8, 0)
    return logits, history.int()


def aligned(rows: Tensor) -> Tensor:
    """The same rows, each beginning at a multiple of 16 bytes, as the kernel wants them."""
    count, width = rows.shape
    return rows.new_zeros(count, -(-width // 8) * 8)[:, :width].copy_(rows)


def arguments_of(
    case: Case, dtype: torch.dtype, batch: int, logits: Tensor, history: Tensor
) -> dict[str, Any]:
    """The same row `batch` times, drawn for consecutive positions."""
    penalties = [case["repetition"], case["presence"], case["frequency"]]
    plain = penalties == [1, 0, 0]
    floats = lambda value: torch.full((batch,), value, dtype=torch.float32)  # noqa: E731
    return dict(
        token_ids=torch.full((batch,), -7, dtype=torch.int64),
        logprobs=floats(-7.0),
        history=None if plain else aligned(history.repeat(batch, 1)),
        logits=logits.expand(batch, -1),
        temperature=floats(case["temperature"]),
        top_k=torch.full((batch,), case["top_k"], dtype=torch.int64),
        top_p=floats(case["top_p"]),
        min_p=floats(case["min_p"]),
        penalties=None if plain else torch.tensor(penalties).expand(batch, -1),
        seed=torch.full((batch,), 2**40 + 77, dtype=torch.int64),
        position=torch.arange(batch) + 1_000_000,
    )


def run(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """Call the op on a device; returns the arguments there."""
    where = torch_device(device)
    on = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    operator("sample", device)(**on)
    return on


def assert_drawn_from(tokens: Tensor, expected: Tensor) -> None:
    """Chi-square over tokens expected at least five times; the others together are one more bin.

    The draws are fixed by their seed, so this either always passes or always fails; 5 standard
    deviations would fail once in a million seeds.
    """
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert not counts[expected == 0].any(), "a token was drawn that may not be"
    mean = expected * len(tokens)
    often = mean >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None]))
    mean = torch.cat((mean[often], mean[~often].sum()[None]))
    observed, mean = observed[mean > 0], mean[mean > 0]
    statistic = ((observed - mean).square() / mean.clamp_min(1)).sum().item()
    freedom = max(1, len(mean) - 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10, (statistic, freedom)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("sample"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Frequencies, tokens that may not be drawn, log probabilities and the history kept up."""
    logits, history = row_of(case, DTYPES[dtype])
    penalties = [
        torch.tensor(case[name]).item() for name in ("repetition", "presence", "frequency")
    ]
    adjusted = adjust(logits, history, *penalties)
    # top_p as the op has it, in float32
    top_p, min_p = (torch.tensor(case[name]).item() for name in ("top_p", "min_p"))
    expected = distribution(adjusted, case["temperature"], case["top_k"], top_p, min_p)
    # An emulated row takes as long as a hundred on the CPU, whose tokens it must draw anyway.
    draws = 4 if device == "emu_sm90" else 12 if device == "emu_sm80" else 3000
    draws = max(
        2, min(draws, 2_000_000 // case["vocab"] if draws > 12 else 300_000 // case["vocab"])
    )
    arguments = arguments_of(case, DTYPES[dtype], draws, logits, history)
    result = run(arguments, device)
    tokens = result["token_ids"].cpu()
    assert_drawn_from(tokens, expected)
    if device != "cpu":
        on_cpu = run(arguments_of(case, DTYPES[dtype], draws, logits, history), "cpu")
        assert torch.equal(tokens, on_cpu["token_ids"])
    logprobs = torch.log_softmax(logits.double(), -1)[tokens]
    assert_close(result["logprobs"], logprobs, f"sample_logprob/{dtype}")
    if result["history"] is not None:
        counted = history.repeat(draws, 1)
        counted[torch.arange(draws), tokens] += 2
        assert torch.equal(result["history"].cpu(), counted)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_backend_draws_the_same_token(dtype: torch.dtype, device: str) -> None:
    """The settings of all cases in one batch: the tokens are those of the CPU, each row alone."""
    vocab, batch = 2051, 45
    settings = [c.values[0] for c in cases("sample")]
    settings = [settings[i % len(settings)] for i in range(batch)]
    column = lambda name, kind: torch.tensor([s[name] for s in settings], dtype=kind)  # noqa: E731
    logits = torch.stack([tensor(100 + i, vocab) * s["amplitude"] for i, s in enumerate(settings)])
    history = (tensor(99, batch, vocab) > 1.2).int() * torch.arange(vocab) % 7
    names = ("repetition", "presence", "frequency")
    arguments = dict(
        token_ids=torch.full((batch,), -7),
        logprobs=torch.zeros(batch),
        history=aligned(history.int()),
        logits=aligned(logits.to(dtype)),
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int64),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        penalties=torch.stack([column(name, torch.float32) for name in names], 1),
        seed=spread(torch.arange(batch) - 5),
        position=torch.arange(batch) * 2**33,
    )
    together = run(dict(arguments, history=aligned(arguments["history"])), device)["token_ids"]
    assert together.unique().numel() > batch // 2
    for i in range(batch):  # on the CPU
        alone = {k: v[i : i + 1].clone() for k, v in arguments.items() if v is not None}
        ops.sample(**alone)
        assert alone["token_ids"].item() == together[i].item(), settings[i]["id"]


def test_the_steps_are_those_of_the_engines_sampler(device: str) -> None:
    """Sampler.adjust and Sampler.probabilities give the distribution that the op draws from."""
    c = case("sample", "everything")
    logits, history = row_of(c, torch.float32)
    sampler = Sampler(
        SamplingParams(
            temperature=c["temperature"], top_k=c["top_k"], top_p=c["top_p"], min_p=c["min_p"],
            repetition_penalty=c["repetition"], presence_penalty=c["presence"],
            frequency_penalty=c["frequency"],
        ),
        (history % 2).nonzero()[:, 0].tolist(),
    )  # fmt: skip
    for token, count in enumerate((history // 2).tolist()):
        if count:
            sampler._output[token] = count
    expected = sampler.probabilities(sampler.adjust(logits))
    draws = 40 if device.startswith("emu") else 3000
    result = run(arguments_of(c, torch.float32, draws, logits, history), device)
    assert_drawn_from(result["token_ids"].cpu(), expected)


def test_another_seed_or_position_is_another_draw(device: str) -> None:
    """Streams of neighbouring seeds and positions do not move together; the same ones repeat."""
    logits = torch.zeros(64)
    c = case("sample", "plain")
    count = 16 if device.startswith("emu") else 128
    base = arguments_of(c, torch.float32, count, logits, torch.zeros(64, dtype=torch.int32))
    first, again = (run(dict(base), device)["token_ids"].clone() for _ in range(2))
    assert torch.equal(first, again)
    for other in (dict(seed=base["seed"] + 1), dict(position=base["position"] + 2**32)):
        tokens = run(base | other, device)["token_ids"]
        assert (tokens == first).sum() < count // 4  # 2 of 128 expected
    same = run(base | dict(position=torch.zeros(count, dtype=torch.int64)), device)["token_ids"]
    assert (same == same[0]).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token(temperature: float, device: str) -> None:
    """NaN anywhere, an infinite maximum, or nothing but -inf: -1 and NaN, and no history."""
    logits = tensor(1, 6, 40)
    logits[0, 39], logits[1, 7] = float("nan"), float("inf")
    logits.view(torch.int32)[5, 3] = -0x400000  # a NaN with a sign
    logits[2] = float("-inf")
    logits[3, :39] = float("-inf")  # one token only
    c = case("sample", "plain") | dict(temperature=temperature, presence=0.1)
    arguments = arguments_of(c, torch.float32, 6, logits[0], torch.zeros(40, dtype=torch.int32))
    result = run(arguments | dict(logits=logits), device)
    assert result["token_ids"][:3].tolist() == [-1, -1, -1] and result["token_ids"][3] == 39
    assert result["logprobs"][:3].isnan().all() and result["logprobs"][3] == 0
    assert 0 <= result["token_ids"][4] < 40
    assert result["token_ids"][5] == -1 and result["logprobs"][5].isnan()
    assert result["history"].sum(1).tolist() == [0, 0, 0, 2, 2, 0]


def test_ties(device: str) -> None:
    """Greedy takes the lowest id of several, -0 being 0; top_k prefers lower ids."""
    logits = torch.tensor([-1.0, -0.0, 0.0, -2.0, 0.0]).repeat(30, 8)[:, :40].contiguous()
    c = case("sample", "plain")
    greedy = run(arguments_of(c | dict(temperature=0.0), torch.float32, 30, logits[0], logits[0]),
                 device)  # fmt: skip
    assert (greedy["token_ids"] == 1).all()
    top = run(arguments_of(c | dict(top_k=3), torch.float32, 30, logits[0], logits[0]), device)
    assert set(top["token_ids"].tolist()) == {1, 2, 4}


def test_rows_and_logprobs_may_be_absent(device: str) -> None:
    """No row, and a call without log probabilities: the same tokens."""
    c = case("sample", "qwen_defaults")
    logits, history = row_of(c, torch.float32)
    wanted = run(arguments_of(c, torch.float32, 10, logits, history), device)["token_ids"]
    less = arguments_of(c, torch.float32, 10, logits, history) | dict(logprobs=None)
    assert_same_bits(run(less, device)["token_ids"].float(), wanted.float())
    none = run(arguments_of(c, torch.float32, 0, logits, history), device)
    assert none["token_ids"].numel() == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(logits=lambda t: t.double()), ("logits", "float32", "float64")),
        (dict(logits=lambda t: t[:, ::2]), ("logits", "contiguous")),
        (dict(logits=lambda t: t[:, :0], history=lambda t: t[:, :0]), ("logits", "vocab", "0")),
        (dict(logits=lambda t: t[:, :1].expand(3, 2**19 + 1).contiguous()), ("vocab", "524289")),
        (dict(token_ids=lambda t: t.int()), ("token_ids", "int64", "int32")),
        (dict(token_ids=lambda t: t[:2]), ("token_ids", "3", "2")),
        (dict(token_ids=lambda t: t[:1].expand(3)), ("token_ids", "overlap")),
        (dict(logprobs=lambda t: t[:2]), ("logprobs", "3", "2")),
        (dict(history=lambda t: t.long()), ("history", "int32", "int64")),
        (dict(history=lambda t: t[:, :23]), ("history", "24", "23")),
        (dict(history=lambda _: None), ("penalties", "history")),
        (dict(penalties=lambda _: None), ("penalties", "history")),
        (dict(penalties=lambda t: t[:, :2]), ("penalties", "3", "2")),
        (dict(penalties=lambda t: t - 1.1), ("penalties[0]", "> 0", "-0.100000")),
        (dict(temperature=lambda t: t - 0.5), ("temperature[1]", ">= 0", "-0.500000")),
        (dict(temperature=lambda t: t / 0), ("temperature[0]", "inf")),
        (dict(top_p=lambda t: t + 0.5), ("top_p[0]", "(0, 1]", "1.500000")),
        (dict(top_p=lambda t: t * 0), ("top_p[0]", "0.000000")),
        (dict(min_p=lambda t: t - 0.05), ("min_p[0]", "-0.050000")),
        (dict(top_k=lambda t: t[:1]), ("top_k", "3", "1")),
        (dict(seed=lambda t: t.int()), ("seed", "int64", "int32")),
        (dict(position=lambda t: t[:1]), ("position", "3", "1")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(ops.sample, good_arguments("sample", device), change, ("sample", *text))
