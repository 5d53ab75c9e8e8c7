"""A decode step is work that a CUDA graph can hold: no op allocates, and nothing comes to the host.

What the host does before (pages, positions, block tables: `Batch`) is no part of it. The step
itself is the model's forward pass, the LM head and the op that samples; it runs here on the CPU
under a dispatch mode that sees every op, and with the ways from a tensor to a Python number closed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.capture import mapped, recorded
from lib.checkpoints import write_checkpoint
from qwen1m_ext import LLM, ops
from qwen1m_ext.attention import Batch, Segment, reserve_decode_scratch

SEQUENCES = 3


class Step:
    """A decode step of three sequences of different lengths over buffers that stay."""

    def __init__(self, llm: LLM) -> None:
        engine = llm.engine
        self.model, self.rotary, self.cache = engine.model, engine.rotary, engine.cache
        config = self.model.config
        self.sequences = [self.cache.open() for _ in range(SEQUENCES)]
        self.hidden = torch.empty(SEQUENCES, config.hidden_size, dtype=self.model.dtype)
        self.logits = torch.empty(SEQUENCES, config.vocab_size, dtype=self.model.dtype)
        self.token_ids = torch.zeros(SEQUENCES, dtype=torch.int64)
        ones = torch.ones(SEQUENCES)
        self.settings = dict(
            temperature=0.8 * ones, top_k=torch.full((SEQUENCES,), 50), top_p=0.9 * ones,
            min_p=0.01 * ones, penalties=torch.tensor([[1.1, 0.0, 0.1]]).repeat(SEQUENCES, 1),
            seed=torch.arange(SEQUENCES),
        )  # fmt: skip
        self.history = torch.zeros(SEQUENCES, config.vocab_size, dtype=torch.int32)
        prompts = [[5, 6, 7], [8] * 127, [9, 10]]
        for sequence, prompt in zip(self.sequences, prompts, strict=True):
            sequence.append(len(prompt))
            batch = Batch(self.rotary, self.cache, [Segment(sequence, 0, len(prompt), 1.0)])
            self.model.forward(torch.tensor(prompt), batch)

    def close(self) -> None:
        for sequence in self.sequences:
            self.cache.close(sequence)

    def plan(self) -> Batch:
        """The host's part: a place for one more token of each sequence."""
        segments = []
        for sequence in self.sequences:
            sequence.append(1)
            segments.append(Segment(sequence, sequence.length - 1, sequence.length, 1.0))
        return Batch(self.rotary, self.cache, segments)

    def run(self, batch: Batch) -> None:
        """What a graph would hold: from the last tokens to the next ones."""
        self.model.forward(self.token_ids, batch, out=self.hidden)
        self.model.logits(self.hidden, self.logits)
        ops.sample(
            self.token_ids, None, self.history, self.logits, position=batch.positions,
            **self.settings,
        )  # fmt: skip


@pytest.fixture(scope="module", params=["float32", "bfloat16", "fp8 cache"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model in each dtype, and with a cache in fp8."""
    checkpoint: Path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), gain=2.0)
    kinds: dict[str, Any] = {"dtype": request.param}
    if request.param == "fp8 cache":
        kinds = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    return LLM(checkpoint, max_model_len=512, max_num_seqs=SEQUENCES + 1, **kinds)


@pytest.fixture
def step(llm: LLM) -> Iterator[Step]:
    """Three open sequences."""
    with torch.inference_mode():
        made = Step(llm)
    yield made
    made.close()


def test_a_decode_step_neither_allocates_nor_waits(step: Step) -> None:
    """Two steps, the second across a page border; every kind of op has been there."""
    for _ in range(2):
        with torch.inference_mode():
            batch = step.plan()
        with recorded() as recorder:
            step.run(batch)
        assert recorder.problems == []
        seen = set(recorder.ops)
        wanted = (
            "embedding",
            "rms_norm",
            "qkv_rope_append",
            "decode_attention",
            "swiglu",
            "sample",
        )
        assert {f"qwen1m.{op}" for op in wanted} | {"aten.mm"} <= seen
    assert (step.history.sum(1) == 4).all()  # two tokens each, counted by the op


def test_the_same_buffers_give_the_same_tokens(step: Step) -> None:
    """With `out` the numbers are those of the call that allocates."""
    with torch.inference_mode():
        batch = step.plan()
        fresh = step.model.forward(step.token_ids, batch)
        logits = step.model.logits(fresh)
        step.model.forward(step.token_ids, batch, out=step.hidden)
        step.model.logits(step.hidden, step.logits)
    assert torch.equal(fresh, step.hidden)
    assert torch.equal(logits, step.logits.float())


def test_every_call_is_given_the_scratch_that_is_kept(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's: large enough for each call, so that none makes its own."""
    config = step.model.config
    q = torch.empty(SEQUENCES, 1, config.num_q_heads, config.head_dim)
    reserve_decode_scratch(step.rotary, step.cache, q, num_sms=132)
    kept = step.cache.decode_scratch
    assert kept is not None
    given, plain = [], ops.decode_attention

    def spy(out: Any, lse: Any, q: Any, k: Any, v: Any, table: Any, *rest: Any) -> None:
        needed = ops.decode_attention_scratch(q, k, table, rest[3], rest[4], num_sms=132)
        given.append((rest[5], len(needed)))
        plain(out, lse, q, k, v, table, *rest)

    monkeypatch.setattr(ops, "decode_attention", spy)
    with torch.inference_mode():
        step.run(step.plan())
    step.cache.decode_scratch = step.cache.decode_rows = None
    assert len(given) == config.num_layers
    assert all(scratch is kept and size <= len(kept) for scratch, size in given)


def test_the_recorder_sees_what_it_is_for(step: Step) -> None:
    """Results in new memory, chosen rows, a length read on the host."""
    with torch.inference_mode():
        batch = step.plan()
        rows = torch.tensor([0, 2])
    with recorded() as recorder:
        step.model.forward(step.token_ids, batch)
    assert recorder.problems == ["aten.new_empty allocates"]  # the result, and nothing else
    with recorded() as recorder:
        step.model.forward(step.token_ids, batch, rows)
    assert "Tensor.tolist reads on the host" in recorder.problems
    assert "aten.index allocates" in recorder.problems
    with recorded() as recorder:
        int(batch.positions.max())
    assert "Tensor.__int__ reads on the host" in recorder.problems
    with recorded() as recorder:
        torch.nonzero(batch.positions)
    assert recorder.problems == ["aten.nonzero waits", "aten.nonzero allocates"]


def without_values(value: Any) -> Any:
    """The same object with tensors that have shapes only ("meta")."""
    return mapped(value, lambda tensor: tensor.to("meta"))


def stripped(value: Any, *names: str) -> Any:
    """A copy of an object of which some attributes have no values."""
    value = copy.copy(value)
    for name in names:
        setattr(value, name, without_values(getattr(value, name)))
    return value


def test_no_value_is_needed_on_the_host(step: Step) -> None:
    """The step runs on tensors without values: no length, no token, no page is looked at."""
    with torch.inference_mode():
        batch = step.plan()
        empty = stripped(step, "token_ids", "history", "hidden", "logits", "rotary")
        empty.settings = {name: without_values(value) for name, value in step.settings.items()}
        empty.model = stripped(step.model, "weights")
        buffers = [n for n, v in vars(step.model.workspace).items() if isinstance(v, Tensor)]
        empty.model.workspace = stripped(step.model.workspace, *buffers)
        planned = stripped(batch, "positions", "_slots", "_every_row", "_rotary")
        planned._cache = stripped(step.cache, "k", "v", "k_scale", "v_scale", "block_table")
        empty.run(planned)
        assert empty.logits.device.type == "meta"
        with pytest.raises((RuntimeError, NotImplementedError)):  # what reads a value fails
            empty.model.forward(empty.token_ids, planned, torch.zeros(1, device="meta").long())
