"""The published definition: outputs of public implementations, reproduced through our ops.

README.md here says where the vectors come from. Everything runs in float32 through the registered
ops: qkv_rope_append into a paged cache with shuffled pages, then prefill or decode attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lib.budgets import BUDGETS
from lib.cases import empty_cache
from lib.compare import assert_close, worst_error
from lib.emulator import ARCHITECTURES, library_path, operator
from lib.generator import tensor
from lib.golden import Rules, append, load, right_rules
from qwen1m_ext import ops
from qwen1m_ext.attention import build_rope_table
from reference.attention import temperature

DENSE = ["d64_t100", "d64_t400", "d64_t1100", "d64_t1100_noscale", "d128_t400", "d128_t1100"]
SENSITIVE = 1e-3  # a broken rule is off by more than this, 50 times the budget


def prefill(
    rules: Rules,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_call: int | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A prompt through both ops, in one call or several; returns (out [T, H, D], lse [T, H]).

    `device` is that of the attention: "cpu", or an emulated kernel.
    """
    attend = operator("prefill_attention", device)
    total, heads, dim = q.shape
    cache = empty_cache([total], k.shape[1], dim, q.dtype)
    out, lse = torch.empty_like(q), torch.empty(total, heads)
    step = tokens_per_call or total
    for begin in range(0, total, step):
        end = min(begin + step, total)
        now = slice(begin, end)
        rotated = append(rules, q[now], k[now], v[now], cache, 0, range(begin, end))
        attend(
            out[now],
            lse[now],
            rotated,
            cache.k_cache,
            cache.v_cache,
            cache.block_table,
            torch.tensor([0, end - begin]),
            torch.tensor([end]),
            torch.tensor([rules.logit_scale]),
            rules.query_table,
            rules.chunk_size,
            rules.local_size,
        )
    return out, lse


def decode_rows(
    rules: Rules, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, device: str = "cpu"
) -> Tensor:
    """The same rows as if each were the newest token: one decode over a cache they all share."""
    total, heads, dim = q.shape
    cache = empty_cache([total], k.shape[1], dim, q.dtype)
    q = append(rules, q, k, v, cache, 0, range(total))
    batch = len(rows)
    out = torch.empty(batch, 1, heads, dim, dtype=q.dtype)
    lse = torch.empty(batch, 1, heads)
    operator("decode_attention", device)(
        out,
        lse,
        q[rows][:, None],
        cache.k_cache,
        cache.v_cache,
        cache.block_table.expand(batch, -1),
        rows + 1,
        torch.full((batch, 1), rules.logit_scale),
        rules.query_table,
        rules.chunk_size,
        rules.local_size,
    )
    return out[:, 0]


def test_generator() -> None:
    """Our counter generator is theirs, bit for bit; the stored inputs of t100 are generated."""
    file = load("generator")
    assert torch.equal(tensor(int(file["seed"]), 8), file["first8"])
    file = load("dense_d64_t100")
    for name, value in zip("qkv", file.qkv(file.meta["seed_q"], 100), strict=True):
        assert torch.equal(value, file[name])


@pytest.mark.isa
@pytest.mark.parametrize("tokens_per_call", [None, 97], ids=["one_call", "calls_of_97"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_prefill(name: str, tokens_per_call: int | None) -> None:
    """Dense DCA prefill of the peers, with and without the temperature."""
    file = load(f"dense_{name}")
    q, k, v = file.qkv(file.meta["seed_q"], file.meta["T"])
    out, lse = prefill(right_rules(file.meta, len(q)), q, k, v, tokens_per_call)
    rows = file["rows"].long()
    assert_close(out[rows], file["out"], "golden/fp32")
    if "stage_intra_lse" in file.arrays:  # one softmax here, three merged there
        stages = torch.stack([file[f"stage_{stage}_lse"] for stage in ("intra", "succ", "inter")])
        expected = stages.double().nan_to_num(-torch.inf).logsumexp(0).T
        assert_close(lse[rows], expected, "golden/fp32", "lse")


@pytest.mark.skipif(library_path() is None, reason="emu: libqwen1m_emu_ops.so is not built")
@pytest.mark.parametrize("kernel", ARCHITECTURES)
@pytest.mark.parametrize("name", ["d64_t400", "d128_t400", "d128_t1100"])
def test_dense_prefill_by_emulated_kernels(name: str, kernel: str) -> None:
    """The GPU kernels have bf16 only: the same inputs, rounded."""
    file = load(f"dense_{name}")
    q, k, v = (x.bfloat16() for x in file.qkv(file.meta["seed_q"], file.meta["T"]))
    rules = right_rules(file.meta, len(q))
    out, _ = prefill(rules, q, k, v, tokens_per_call=700, device=kernel)
    rows = file["rows"].long()
    assert_close(out[rows], file["out"], "golden/bf16")


@pytest.mark.skipif(library_path() is None, reason="emu: libqwen1m_emu_ops.so is not built")
@pytest.mark.parametrize("kernel", ARCHITECTURES)
def test_a_broken_rule_is_seen_in_emulated_kernels(kernel: str) -> None:
    """The budget of bf16 inputs is narrow enough to tell a clamp that is off by one."""
    file = load("dense_d64_t400")
    q, k, v = (x.bfloat16() for x in file.qkv(file.meta["seed_q"], file.meta["T"]))
    rules = BROKEN["clamp_below"](right_rules(file.meta, len(q)))
    rows = file["rows"].long()
    out, _ = prefill(rules, q, k, v, device=kernel)
    assert worst_error(out[rows], file["out"]) > 10 * BUDGETS["golden/bf16"].atol
    # The clamp matters to the last rows of a chunk.
    out = decode_rows(rules, q, k, v, rows[-40:], kernel)
    assert worst_error(out, file["out"][-40:]) > 10 * BUDGETS["golden/bf16"].atol


@pytest.mark.isa
@pytest.mark.parametrize("name", DENSE)
def test_dense_rows_by_decode(name: str) -> None:
    """Every stored row of the dense prefill is also the decode of its prefix."""
    file = load(f"dense_{name}")
    q, k, v = file.qkv(file.meta["seed_q"], file.meta["T"])
    out = decode_rows(right_rules(file.meta, len(q)), q, k, v, file["rows"].long())
    assert_close(out, file["out"], "golden/fp32")


@pytest.mark.skipif(library_path() is None, reason="emu: libqwen1m_emu_ops.so is not built")
@pytest.mark.parametrize("kernel", ARCHITECTURES)
@pytest.mark.parametrize("name", ["d64_t400", "d64_t1100", "d128_t400", "d128_t1100"])
def test_dense_rows_by_emulated_decode(name: str, kernel: str) -> None:
    """The same by the GPU kernels, from rounded inputs."""
    file = load(f"dense_{name}")
    q, k, v = (x.bfloat16() for x in file.qkv(file.meta["seed_q"], file.meta["T"]))
    rules = right_rules(file.meta, len(q))
    out = decode_rows(rules, q, k, v, file["rows"].long()[::4], kernel)
    assert_close(out, file["out"][::4], "golden/bf16")


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param("cpu", marks=pytest.mark.isa),
        *(
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    library_path() is None, reason="emu: libqwen1m_emu_ops.so is not built"
                ),
            )
            for name in ARCHITECTURES
        ),
    ],
)
def test_decode(kernel: str) -> None:
    """Two sequences, six steps, over a chunk border and the temperature's threshold.

    The peers scale K by s(n) when it is written, n being the length then; we keep K unscaled, so
    the factor goes into k before the append and only s(now) into the logits.
    """
    file = load("decode_d64")
    meta, lengths = file.meta, file.meta["prefill_lens"]
    steps, batch = meta["steps"], len(lengths)
    rules = right_rules(meta, 1)
    totals = [length + steps for length in lengths]
    dtype, budget = (
        (torch.float32, "golden/fp32") if kernel == "cpu" else (torch.bfloat16, "golden/bf16")
    )
    cache = empty_cache(totals, meta["KV"], meta["D"], dtype)
    s = lambda n: temperature(n, meta["original_max_position_embeddings"])  # noqa: E731
    qkv = []
    for sequence, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        q, k, v = file.qkv(meta["seeds_q"][sequence], total)
        written_at = [s(max(length, token + 1)) for token in range(total)]
        k = k * torch.tensor(written_at)[:, None, None]
        q, k, v = (x.to(dtype) for x in (q, k, v))
        append(rules, q[:length], k[:length], v[:length], cache, sequence, range(length))
        qkv.append((q, k, v))
    for step in range(steps):
        now = [length + step for length in lengths]
        rows = []
        for sequence, token in enumerate(now):
            one = [x[token : token + 1] for x in qkv[sequence]]
            rows.append(append(rules, *one, cache, sequence, range(token, token + 1)))
        q = torch.stack(rows)
        out = torch.empty_like(q)
        operator("decode_attention", kernel)(
            out,
            None,
            q,
            cache.k_cache,
            cache.v_cache,
            cache.block_table,
            torch.tensor(now) + 1,
            torch.tensor([[s(token + 1) * meta["softmax_scale"]] for token in now]),
            rules.query_table,
            rules.chunk_size,
            rules.local_size,
        )
        assert_close(out[:, 0], file["out"][step], budget, f"step {step}")
    assert batch == 2


# --- Rotations, one coordinate at a time -------------------------------------------------------


@pytest.mark.isa
def test_rope_of_keys() -> None:
    """The cached key is the peers' rotated key."""
    file = load("rope")
    rules = right_rules(
        file.meta | {"softmax_scale": 1.0, "original_max_position_embeddings": 0}, 1
    )
    x, positions = file["x"], file["pos"]
    tokens, heads, dim = x.shape
    cache = empty_cache([tokens], heads, dim, torch.float32)
    slots = cache.slots(0, range(tokens))
    ops.qkv_rope_append(
        torch.empty(tokens, 0, dim),
        cache.k_cache,
        cache.v_cache,
        torch.cat([x.flatten(1)] * 2, dim=1),
        None,
        positions,
        slots,
        rules.key_table,
        rules.chunk_size - rules.local_size,
    )
    pages, rows = slots // ops.PAGE_SIZE, slots % ops.PAGE_SIZE
    assert_close(cache.k_cache[pages, :, rows], file["k"], "golden/fp32", "k")
    assert torch.equal(cache.v_cache[pages, :, rows], x)


def read_rotated_query(
    rules: Rules, x: Tensor, token: int, begin: int, end: int, decode: bool
) -> Tensor:
    """What attention makes of query x [D] of `token` for the keys [begin, end): [D] float64.

    The query meets D heads of keys. In head d the keys [begin, end) are the unit vector e_d and
    all others are zero, so that with logit scale 1
        exp(lse[d]) = others + (end - begin) * exp(<R(x), e_d>),
    which gives coordinate d of the rotated query.
    """
    dim, keys = len(x), token + 1
    cache = empty_cache([keys], dim, dim, torch.float32)
    slots = cache.slots(0, range(keys))
    values = torch.zeros(keys, dim, dim)
    values[begin:end] = torch.eye(dim)
    cache.k_cache[slots // ops.PAGE_SIZE, :, slots % ops.PAGE_SIZE] = values
    cache.v_cache[slots // ops.PAGE_SIZE, :, slots % ops.PAGE_SIZE] = 0
    q = x.expand(1, dim, dim).contiguous()
    out, lse = torch.empty_like(q), torch.empty(1, dim)
    tail = (
        cache.k_cache,
        cache.v_cache,
        cache.block_table,
        *(() if decode else (torch.tensor([0, 1]),)),
        torch.tensor([keys]),
        torch.full((1, 1) if decode else (1,), rules.logit_scale),
        rules.query_table,
        rules.chunk_size,
        rules.local_size,
    )
    if decode:
        ops.decode_attention(out[None], lse[None], q[None], *tail)
    else:
        ops.prefill_attention(out, lse, q, *tail)
    others = keys - (end - begin)
    return ((lse[0].double().exp() - others) / (end - begin)).log()


@pytest.mark.isa
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("variant", ["q", "q_succ", "q_inter"])
def test_rope_of_queries(variant: str, decode: bool) -> None:
    """The three rotations attention applies to a query are the peers' caches of them.

    They depend on a position's offset m in its chunk only, so the token is moved to the chunk
    where the keys of the variant are many: chunk 0, 1 and 4.
    """
    file = load("rope")
    meta = file.meta | {"softmax_scale": 1.0, "original_max_position_embeddings": 0}
    rules = right_rules(meta, 1)
    chunk_len = rules.chunk_size - rules.local_size
    for row, position in enumerate(file["pos"].tolist()):
        offset = position % chunk_len
        token, begin, end = {
            "q": (offset, 0, offset + 1),
            "q_succ": (offset + chunk_len, 0, chunk_len),
            "q_inter": (offset + 4 * chunk_len, 0, 3 * chunk_len),
        }[variant]
        for head in range(meta["H"]):
            got = read_rotated_query(rules, file["x"][row, head], token, begin, end, decode)
            # lse is float32 near 7 with a share of the keys as small as exp(-2.5): the reading
            # is 20 times less exact than the lse itself.
            error = worst_error(got, file[variant][row, head])
            assert error <= 4e-5, f"{variant} of position {position}, head {head}: {error}"


# --- Sensitivity: a rule broken by one is seen -------------------------------------------------


def shifted(rules: Rules, begin: int, end: int) -> Rules:
    """Rows [begin, end) of the query table hold the rotation of the next position."""
    meta_theta, dim = 10000.0, 2 * rules.query_table.shape[1]
    longer = build_rope_table(meta_theta, dim, len(rules.query_table) + 1)
    table = rules.query_table.clone()
    table[begin:end] = longer[begin + 1 : end + 1]
    return replace(rules, query_table=table)


def longer_table(rules: Rules, rows: int) -> dict[str, Tensor]:
    """Tables for rules that reach further."""
    table = build_rope_table(10000.0, 2 * rules.query_table.shape[1], rows)
    return dict(key_table=table, query_table=table)


BROKEN: dict[str, Callable[[Rules], Rules]] = {
    "chunk_size": lambda r: replace(r, chunk_size=257, **longer_table(r, 258)),
    "local_size": lambda r: replace(r, local_size=33),
    "clamp": lambda r: replace(r, chunk_size=257, local_size=33, **longer_table(r, 258)),
    "clamp_below": lambda r: replace(r, chunk_size=255, local_size=31),
    "intra_query": lambda r: shifted(r, 0, 224),
    "successive_query": lambda r: shifted(r, 224, 256),
    "inter_query": lambda r: shifted(r, 256, 257),
    "key_position": lambda r: replace(r, key_shift=1),
    "scale_not_squared": lambda r: replace(
        r, logit_scale=temperature(1100, 256) * r.logit_scale / temperature(1100, 256) ** 2
    ),
    "no_scale": lambda r: replace(r, logit_scale=r.logit_scale / temperature(1100, 256) ** 2),
    "plain_rope": lambda r: replace(
        r, chunk_size=ops.INFINITE_CHUNK, local_size=0, **longer_table(r, 1100)
    ),
}


@pytest.mark.parametrize("by_decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_seen(rule: str, by_decode: bool) -> None:
    """Each position rule broken by one misses the golden values by far more than the budget."""
    file = load("dense_d64_t1100")
    q, k, v = file.qkv(file.meta["seed_q"], file.meta["T"])
    rules, rows = right_rules(file.meta, len(q)), file["rows"].long()

    def error(rules: Rules) -> float:
        if by_decode:
            return worst_error(decode_rows(rules, q, k, v, rows), file["out"])
        return worst_error(prefill(rules, q, k, v)[0][rows], file["out"])

    assert error(rules) <= 2e-5
    assert error(BROKEN[rule](rules)) > SENSITIVE
