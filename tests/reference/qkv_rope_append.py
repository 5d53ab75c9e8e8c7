"""What follows the QKV projection: bias, key rotation, append to the paged cache."""

from __future__ import annotations

from torch import Tensor

from reference.rope import rotate

PAGE_SIZE = 128


def qkv_rope_append(
    q_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    rope_table: Tensor,
    chunk_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, add the bias, rotate keys at positions % chunk_len, write them where slots say.

    Args:
        q_heads: number of query heads; the rest of the columns are keys, then values.
        k_cache, v_cache: [pages, kv_heads, 128, D]; not modified.
        qkv: [tokens, (q_heads + 2 kv_heads) D].
        bias: [(q_heads + 2 kv_heads) D] or None.
        positions: [tokens] absolute token index.
        slot_mapping: [tokens] page * 128 + row, or -1 for "append nothing".
        rope_table: [rows, D/2, 2] (cos, sin).
        chunk_len: tokens of a Dual Chunk.

    Returns:
        float64 (q [tokens, q_heads, D] un-rotated, k_cache, v_cache).
    """
    _, kv_heads, _, head_dim = k_cache.shape
    columns = qkv.double() if bias is None else qkv.double() + bias.double()
    heads = columns.view(len(qkv), q_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)
    k_cache, v_cache = k_cache.double().clone(), v_cache.double().clone()
    for token, (position, slot) in enumerate(
        zip(positions.tolist(), slot_mapping.tolist(), strict=True)
    ):
        if slot >= 0:
            page, row = divmod(slot, PAGE_SIZE)
            k_cache[page, :, row] = rotate(k[token], rope_table[position % chunk_len])
            v_cache[page, :, row] = v[token]
    return q, k_cache, v_cache
