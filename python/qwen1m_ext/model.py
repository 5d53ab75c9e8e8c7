"""The Qwen2 forward pass over a batch of tokens.

Two ideas keep a million tokens affordable. Only attention sees the whole batch at once: all
matrix products run over blocks of rows, so the wide MLP activations exist for one block only. And
in the last layer only keys and values are computed for every token; queries, attention, MLP and
norm run for the rows that somebody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import ops
from .attention import Batch
from .config import ModelConfig
from .device import CPU, Device
from .linear import linear, project, scratch_bytes
from .weights import LayerWeights, ModelWeights

BLOCK_ROWS = 4096
"""Rows of one matrix product: large enough for full speed, small enough for the MLP's width."""

LOGITS_BLOCK_BYTES = 64 << 20
"""Logits of many rows are computed in blocks of at most this size, never N x vocabulary at once."""

OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers) after each layer; may raise to stop the work."""


class Workspace:
    """The activations of a batch, allocated once: what `activation_bytes` says and no more."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, chunk_tokens: int, device: Device = CPU
    ) -> None:
        self.chunk_tokens = chunk_tokens
        block = min(BLOCK_ROWS, chunk_tokens)
        heads = (config.num_q_heads, config.head_dim)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device.where)

        self.residual = empty(chunk_tokens, config.hidden_size)
        self.q = empty(chunk_tokens, *heads)
        self.attended = empty(chunk_tokens, *heads)
        self.normed = empty(block, config.hidden_size)
        self.delta = empty(block, config.hidden_size)
        self.qkv = empty(block, config.q_size + 2 * config.kv_size)
        self.gate_up = empty(block, 2 * config.intermediate_size)
        self.activated = empty(block, config.intermediate_size)


def activation_bytes(config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> int:
    """Bytes of a `Workspace`."""
    block = min(BLOCK_ROWS, chunk_tokens)
    per_token = config.hidden_size + 2 * config.q_size
    per_block_row = (
        2 * config.hidden_size + config.q_size + 2 * config.kv_size + 3 * config.intermediate_size
    )
    return (chunk_tokens * per_token + block * per_block_row) * dtype.itemsize


def logits_rows(config: ModelConfig) -> int:
    """Rows of one block of logits."""
    return max(1, LOGITS_BLOCK_BYTES // (4 * config.vocab_size))


def logits_bytes(config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> int:
    """Bytes that log probabilities of every row of a chunk need: the most that logits ever take.

    The chunk's final hidden states, and for a block of rows the product in `dtype`, its float32
    copy and the log-softmax.
    """
    rows = min(chunk_tokens, logits_rows(config))
    copies = 8 if dtype == torch.float32 else 8 + dtype.itemsize
    return chunk_tokens * config.hidden_size * dtype.itemsize + rows * config.vocab_size * copies


def linear_scratch_bytes(config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> int:
    """Bytes that the matrix products of a block of rows take for a moment."""
    c = config
    shapes = [
        (c.q_size + 2 * c.kv_size, c.hidden_size),
        (c.hidden_size, c.q_size),
        (2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
    ]
    return scratch_bytes(min(BLOCK_ROWS, chunk_tokens), shapes, dtype, fp8=config.quantised)


class Qwen2Model:
    """Weights and workspace of one model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        chunk_tokens: int,
        device: Device = CPU,
    ) -> None:
        """Prepare for batches of up to `chunk_tokens` tokens on the device of the weights."""
        self.config, self.weights = config, weights
        self.dtype = weights.norm.dtype
        self.workspace = Workspace(config, self.dtype, chunk_tokens, device)

    def forward(
        self,
        token_ids: Tensor,
        batch: Batch,
        rows: Tensor | None = None,
        on_layer: OnLayer | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run the tokens of a batch through all layers; their keys and values enter the cache.

        Args:
            token_ids: [tokens] int64 on the device, tokens <= the workspace's chunk_tokens.
            batch: where the tokens are.
            rows: [n] int64 on the host, ascending rows whose final hidden state is wanted; None:
                all.
            on_layer: progress.
            out: [n, hidden] that receives the result. With it and without `rows` nothing is
                allocated and nothing waits for a device: a CUDA graph can hold the call.

        Returns:
            [n, hidden] hidden states after the final norm, ready for the LM head.
        """
        n, layers = len(batch), self.weights.layers
        if token_ids.numel() != n or n > self.workspace.chunk_tokens:
            raise ValueError(
                f"token_ids: expected {n} ids, at most {self.workspace.chunk_tokens}, "
                f"got {token_ids.numel()}"
            )
        residual, q, attended = (t[:n] for t in self._chunk_buffers())
        last = len(layers) - 1
        for block in _blocks(n):
            x = residual[block]
            ops.embedding(x, self.weights.embed, token_ids[block])
            normed = self.workspace.normed[: len(x)]
            ops.rms_norm(normed, None, x, layers[0].input_norm, self.config.rms_norm_eps)
            self._append_qkv(0, normed, q, batch, block, kv_only=last == 0 and rows is not None)
        for i in range(last):
            batch.attend(i, q, attended)
            for block in _blocks(n):
                normed = self._mlp(
                    layers[i], residual[block], attended[block], layers[i + 1].input_norm
                )
                self._append_qkv(
                    i + 1, normed, q, batch, block, kv_only=i + 1 == last and rows is not None
                )
            if on_layer:
                on_layer(i + 1, len(layers))
        if rows is None:
            batch.attend(last, q, attended)
            wanted = residual
        else:
            wanted, q, attended = self._last_layer_queries(residual[batch.put(rows)])
            if len(rows):
                batch.attend_rows(last, q, attended, rows)
        hidden = out
        if hidden is None:
            hidden = residual.new_empty(len(wanted), self.config.hidden_size)
        for block in _blocks(len(wanted)):
            hidden[block] = self._mlp(
                layers[last], wanted[block], attended[block], self.weights.norm
            )
        if on_layer:
            on_layer(len(layers), len(layers))
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """LM head: [n, hidden] -> [n, vocab] float32. The caller keeps n small.

        out: [n, vocab] of the model's dtype, which is returned instead.
        """
        if out is not None:
            project(out, hidden, self.weights.lm_head)
            return out
        return linear(hidden, self.weights.lm_head).float()

    def _chunk_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        w = self.workspace
        return w.residual, w.q, w.attended

    def _append_qkv(
        self, layer: int, normed: Tensor, q: Tensor, batch: Batch, block: slice, kv_only: bool
    ) -> None:
        """Project a block of normed rows; write its q rows and its keys and values."""
        weights = self.weights.layers[layer]
        skip = self.config.q_size if kv_only else 0
        qkv = self.workspace.qkv[: len(normed), skip:]
        if skip:  # a narrower product needs a contiguous destination
            qkv = self.workspace.qkv.view(-1)[: qkv.numel()].view(qkv.shape)
        project(qkv, normed, weights.qkv[skip:])
        q_rows = q[block, :0] if kv_only else q[block]
        batch.append_kv(layer, q_rows, qkv, weights.qkv_bias[skip:], block)

    def _last_layer_queries(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual, queries and room for the attention output of the requested rows."""
        c, weights = self.config, self.weights.layers[-1]
        normed = torch.empty_like(wanted)
        ops.rms_norm(normed, None, wanted, weights.input_norm, c.rms_norm_eps)
        q = linear(normed, weights.qkv[: c.q_size], weights.qkv_bias[: c.q_size])
        q = q.view(-1, c.num_q_heads, c.head_dim)
        return wanted, q, torch.empty_like(q)

    def _mlp(self, layer: LayerWeights, x: Tensor, attended: Tensor, next_norm: Tensor) -> Tensor:
        """Output projection, MLP and both residual additions for a block of rows.

        Returns the block normed for what follows (the next layer, or the LM head).
        """
        w, n, eps = self.workspace, len(x), self.config.rms_norm_eps
        delta, normed = w.delta[:n], w.normed[:n]
        project(delta, attended.reshape(n, -1), layer.o)
        ops.rms_norm(normed, x, delta, layer.post_norm, eps)
        gate_up, activated = w.gate_up[:n], w.activated[:n]
        project(gate_up, normed, layer.gate_up)
        ops.swiglu(activated, gate_up)
        project(delta, activated, layer.down)
        ops.rms_norm(normed, x, delta, next_norm, eps)
        return normed


def _blocks(n: int) -> Iterator[slice]:
    for begin in range(0, n, BLOCK_ROWS):
        yield slice(begin, min(n, begin + BLOCK_ROWS))
