"""What only a GPU can show: streams, graphs, and the kernels' own refusals. `pytest --device=cuda`.

The numbers are those of tests/ops, which run on the GPU too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.compare import assert_same_bits
from lib.refuse import refuses
from qwen1m_ext import ops

SLEEP_CYCLES = 200_000_000  # about 0.1 s


def call(arguments: dict[str, Any], op: str = "prefill_attention") -> Tensor:
    getattr(ops, op)(**arguments)
    return arguments["out"]


def test_work_goes_to_torchs_current_stream(gpu: str) -> None:
    """The query arrives late on a side stream; only work on that stream sees it."""
    expected = call(good_arguments("prefill_attention", gpu)).clone()
    arguments = good_arguments("prefill_attention", gpu)
    query = arguments["q"].clone()
    arguments["q"].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        arguments["q"].copy_(query)
        call(arguments)
        done = side.record_event()
    assert not done.query(), "the host waited for the GPU, or nothing was launched behind the sleep"
    side.synchronize()
    assert_same_bits(arguments["out"], expected)


def test_the_default_stream_does_not_wait_for_a_side_stream(gpu: str) -> None:
    """Work asked for on the default stream is not put onto another one."""
    arguments = good_arguments("prefill_attention", gpu)
    expected = call(arguments).clone()
    arguments["out"].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10 * SLEEP_CYCLES)
        slept = side.record_event()
    call(arguments)
    torch.cuda.default_stream().synchronize()
    assert not slept.query(), "the sleep was too short to show anything"
    assert_same_bits(arguments["out"], expected)


@pytest.mark.parametrize("op", ["prefill_attention", "decode_attention"])
def test_a_graph_can_hold_it(op: str, gpu: str) -> None:
    """Captured once, replayed with other lengths and queries: nothing was read by the host."""
    arguments = good_arguments(op, gpu)
    call(arguments, op)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(arguments, op)
    changed = good_arguments(op, gpu)
    changed["q"] *= 0.5
    changed["kv_len"] -= 1
    expected = call(changed, op).clone()
    for name in ("q", "kv_len"):
        arguments[name].copy_(changed[name])
    arguments["out"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(arguments["out"], expected)


def test_the_current_device_is_left_alone(gpu: str) -> None:
    """On another device than the current one, as torch's own operators do."""
    if torch.cuda.device_count() < 2:
        pytest.skip("cuda: one device only")
    expected = call(good_arguments("prefill_attention", "cuda:0")).cpu()
    other = good_arguments("prefill_attention", "cuda:0")
    other = {k: v.to("cuda:1") if isinstance(v, Tensor) else v for k, v in other.items()}
    assert_same_bits(call(other).cpu(), expected)
    assert torch.cuda.current_device() == 0


def test_extreme_logits(gpu: str) -> None:
    """Logits of +-1e4: the softmax is a choice, finite and exact; ties share."""
    q, k = torch.zeros(3, 1, 64), torch.zeros(1, 1, ops.PAGE_SIZE, 64)
    q[:, 0, 0] = 100.0
    k[0, 0, :3, 0] = torch.tensor([-100.0, 100.0, 100.0])
    v = torch.zeros_like(k)
    v[0, 0, :3] = torch.arange(3.0)[:, None]
    out = torch.zeros(3, 1, 64)
    tensors = [x.bfloat16().to(gpu) for x in (out, q, k, v)]
    lse = torch.zeros(3, 1, device=gpu)
    rope = torch.tensor([1.0, 0.0]).expand(3, 32, 2).contiguous().to(gpu)
    ops.prefill_attention(
        tensors[0], lse, *tensors[1:], torch.tensor([[0]], dtype=torch.int32, device=gpu),
        torch.tensor([0, 3], device=gpu), torch.tensor([3], device=gpu),
        torch.tensor([1.0], device=gpu), rope, ops.INFINITE_CHUNK, 0,
    )  # fmt: skip
    assert tensors[0][:, 0, 0].tolist() == [0.0, 1.0, 1.5]
    # 100 * 100 is exact in bf16 products; the logarithm of 1 is 0
    assert lse[:2, 0].tolist() == [-1e4, 1e4]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(q=lambda t: t.float(), out=lambda t: t.float(), k_cache=lambda t: t.float(),
              v_cache=lambda t: t.float()), ("q", "bfloat16", "float32")),
        (dict(q=lambda t: t.repeat(1, 1, 2)[..., :80].contiguous(),
              out=lambda t: t.repeat(1, 1, 2)[..., :80].contiguous(),
              k_cache=lambda t: t.repeat(1, 1, 1, 2)[..., :80].contiguous(),
              v_cache=lambda t: t.repeat(1, 1, 1, 2)[..., :80].contiguous(),
              rope_table=lambda t: t.repeat(1, 2, 1)[:, :40].contiguous()), ("q", "80")),
        (dict(kv_len=lambda t: t.cpu()), ("kv_len", "cuda:0")),
        (dict(lse=lambda t: t.double()), ("lse", "float32", "float64")),
        (dict(out=lambda t: t[:4]), ("out", "5", "4")),
        (dict(out=lambda t: t.as_strided(t.shape, (64, 64, 1))), ("out", "overlap")),
        (dict(v_cache=lambda t: t[:3]), ("v_cache", "4", "3")),
        (dict(block_table=lambda t: t.long()), ("block_table", "int32", "int64")),
        (dict(chunk_size=lambda _: 0), ("chunk_size", "0")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict[str, Any], text: tuple[str, ...], gpu: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(
        ops.prefill_attention,
        good_arguments("prefill_attention", gpu),
        change,
        ("prefill_attention", *text),
    )


# --- The elementwise kernels ---------------------------------------------------------------------

# op -> (what it writes, an input that a replay finds changed)
FUSED = {
    "embedding": (("out",), "token_ids"),
    "rms_norm": (("out", "residual"), "x"),
    "swiglu": (("out",), "gate_up"),
    "qkv_rope_append": (("q", "k_cache", "v_cache"), "qkv"),
    "widen_pages": (("wide",), "scale"),
    "sample": (("token_ids", "logprobs", "history"), "logits"),
}


@pytest.mark.parametrize("op", FUSED)
def test_a_graph_can_hold_a_fused_kernel(op: str, gpu: str) -> None:
    """Captured behind a kernel that writes its input, replayed with other values.

    The graph keeps the programmatic edge between the two: a kernel that read before the one in
    front had ended would see the old input, sooner or later.
    """
    if op not in ops.cuda_kernels():
        pytest.skip(f"cuda: {op} was built without a CUDA kernel")
    written, changed = FUSED[op]
    arguments = good_arguments(op, gpu)
    fresh = {name: value.clone() for name, value in arguments.items() if name in written}
    source = arguments[changed].clone()
    expected_arguments = good_arguments(op, gpu) | {changed: source.flip(0).contiguous()}
    getattr(ops, op)(**expected_arguments)
    getattr(ops, op)(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.add(source, 0, out=arguments[changed])  # a kernel, which a copy would not be
        getattr(ops, op)(**arguments)
    for _ in range(20):
        for name, value in fresh.items():
            arguments[name].copy_(value)
        source.copy_(expected_arguments[changed])
        graph.replay()
        torch.cuda.synchronize()
        for name in written:
            assert_same_bits(arguments[name], expected_arguments[name], name)
