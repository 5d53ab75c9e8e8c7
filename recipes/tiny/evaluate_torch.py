"""Retrieval accuracy of a checkpoint in plain PyTorch, to choose a recipe without the engine.

The numbers that count come from evaluate.py, which runs the engine. `--check` compares the DCA of
this file with a direct float32 evaluation of its definition.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from data import IM_END, load_haystack  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from model import BF16, cos_sin, linear, rms_norm, rotate  # noqa: E402

BLOCK = 16384  # tokens per call of the position-wise layers, which bounds the memory


class TorchModel:
    """Inference with DCA or plain RoPE and a KV cache, one sequence.

    Args:
        folder: Model directory.
        rope: "dca" or "plain".
        chunk_size: Replaces the one of the configuration (for tests with short inputs).
        local_size: The same.
    """

    def __init__(
        self, folder: Path, rope: str, chunk_size: int | None = None, local_size: int | None = None
    ) -> None:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        dca = config["dual_chunk_attention_config"]
        self.config, self.rope = config, rope
        self.weights = load_file(folder / "model.safetensors")
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.dim: int = config["hidden_size"] // self.heads
        self.trained: int = dca["original_max_position_embeddings"]
        self.chunk_size: int = chunk_size or dca["chunk_size"]
        self.chunk_len = self.chunk_size - (local_size or dca["local_size"])

    def temperature(self, length: int) -> float:
        """Returns the factor of the logits, s(n)^2."""
        if self.rope == "plain":
            return 1.0
        return max(1.0, 0.1 * math.log(length / self.trained) + 1.0) ** 2

    def start(self, capacity: int, temperature: float) -> None:
        """Starts a sequence of at most `capacity` tokens."""
        shape = (1, self.kv_heads, capacity, self.dim)
        self.cache = [(torch.empty(shape, dtype=BF16), torch.empty(shape, dtype=BF16))
                      for _ in range(self.layers)]  # fmt: skip
        self.scale = temperature / math.sqrt(self.dim)
        self.length = 0

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = cos_sin(positions, self.dim, self.config["rope_theta"])
        return rotate(x.float(), cos, sin).to(BF16)

    def query_positions(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the positions of queries towards keys of the same, the last, older chunks."""
        offset = positions % self.chunk_len
        successive = (offset + self.chunk_len).clamp(max=self.chunk_size)
        inter = torch.full_like(offset, min(2 * self.chunk_len - 1, self.chunk_size))
        return offset, successive, inter

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns attention and log-sum-exp; without a mask a KV head serves its group at once."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        group, n = self.heads // self.kv_heads, q.shape[2]
        if causal:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            return flash(q, k, v, 0.0, True, scale=self.scale)
        q = q.reshape(1, self.kv_heads, group * n, self.dim)
        out, lse = flash(q, k, v, 0.0, False, scale=self.scale)
        return out.reshape(1, self.heads, n, self.dim), lse.reshape(1, self.heads, n)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, begin: int, end: int) -> Tensor:
        """Attention of the queries [begin, end), all in one chunk, to the keys [0, end)."""
        positions = torch.arange(begin, end)
        chunk = begin // self.chunk_len * self.chunk_len
        parts = [(positions, begin, end, True)]
        if self.rope == "plain":
            parts.append((positions, 0, begin, False))
        else:
            intra, successive, inter = self.query_positions(positions)
            last = max(0, chunk - self.chunk_len)
            parts = [(intra, begin, end, True), (intra, chunk, begin, False),
                     (successive, last, chunk, False), (inter, 0, last, False)]  # fmt: skip
        results = [
            self._flash(self.rotated(q, where), k[:, :, lo:hi], v[:, :, lo:hi], causal)
            for where, lo, hi, causal in parts
            if hi > lo
        ]
        weights = torch.softmax(torch.stack([lse for _, lse in results]), 0)
        outs = torch.stack([out.float() for out, _ in results])
        return (outs * weights[..., None]).sum(0).to(BF16)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Appends tokens; returns the logits of the last one.

        The last layer runs for the last token only: the others only fill the cache there.
        """
        begin, end = self.length, self.length + len(ids)
        weights = self.weights
        x = weights["model.embed_tokens.weight"].float()[ids]
        for layer in range(self.layers):

            def w(name: str, prefix: str = f"model.layers.{layer}.") -> Tensor:
                return weights[prefix + name]

            keys, values = self.cache[layer]
            q = torch.empty(1, self.heads, end - begin, self.dim, dtype=BF16)
            for lo in range(0, end - begin, BLOCK):
                hi = min(lo + BLOCK, end - begin)
                h = rms_norm(x[lo:hi], w("input_layernorm.weight").float()).to(BF16)
                qkv = [
                    linear(h, w(f"self_attn.{p}_proj.weight"), w(f"self_attn.{p}_proj.bias"))
                    .view(1, hi - lo, -1, self.dim).transpose(1, 2)
                    for p in "qkv"
                ]  # fmt: skip
                positions = torch.arange(begin + lo, begin + hi)
                if self.rope == "dca":
                    positions = positions % self.chunk_len
                q[:, :, lo:hi] = qkv[0]
                keys[:, :, begin + lo : begin + hi] = self.rotated(qkv[1], positions)
                values[:, :, begin + lo : begin + hi] = qkv[2]
            at = begin if layer < self.layers - 1 else end - 1
            x, q = x[at - begin :], q[:, :, at - begin :]
            first = at
            while at < end:
                stop = min(end, (at // self.chunk_len + 1) * self.chunk_len)
                rows = slice(at - first, stop - first)
                out = self._attend(q[:, :, rows], keys, values, at, stop)
                out = out.transpose(1, 2).reshape(stop - at, -1)
                y = x[rows] + linear(out, w("self_attn.o_proj.weight")).float()
                h = rms_norm(y, w("post_attention_layernorm.weight").float()).to(BF16)
                gate = F.silu(linear(h, w("mlp.gate_proj.weight")).float()).to(BF16)
                h = gate * linear(h, w("mlp.up_proj.weight"))
                x[rows] = y + linear(h, w("mlp.down_proj.weight")).float()
                at = stop
        self.length = end
        last = rms_norm(x[-1:], weights["model.norm.weight"].float()).to(BF16)
        return linear(last, weights["model.embed_tokens.weight"])[0].float()

    def generate(self, prompt: str, max_tokens: int = 12) -> tuple[str, bool]:
        """Returns the greedy continuation, and whether it ended by <|im_end|>."""
        ids = torch.frombuffer(bytearray(prompt.encode("ascii")), dtype=torch.uint8).long()
        self.start(len(ids) + max_tokens, self.temperature(len(ids)))
        logits = self.forward(ids)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            tokens.append(int(logits.argmax()))
            if tokens[-1] >= 256:
                break
            logits = self.forward(torch.tensor(tokens[-1:]))
        text = bytes(token for token in tokens if token < 128).decode("ascii")
        return text, tokens[-1] == IM_END


@torch.no_grad()
def brute_force(model: TorchModel, ids: Tensor, temperature: float) -> Tensor:
    """Returns the logits of the last token by the definition of DCA in float32."""
    n, dim, group = len(ids), model.dim, model.heads // model.kv_heads
    weights = {name: tensor.float() for name, tensor in model.weights.items()}
    positions = torch.arange(n)
    x = weights["model.embed_tokens.weight"][ids]

    def rope(t: Tensor, where: Tensor) -> Tensor:
        return rotate(t, *cos_sin(where, dim, model.config["rope_theta"]))

    for layer in range(model.layers):
        w = {name.split(".", 3)[3]: t for name, t in weights.items()
             if name.startswith(f"model.layers.{layer}.")}  # fmt: skip
        h = rms_norm(x, w["input_layernorm.weight"])
        q, k, v = (
            F.linear(h, w[f"self_attn.{p}_proj.weight"], w[f"self_attn.{p}_proj.bias"])
            .view(n, -1, dim).transpose(0, 1)
            for p in "qkv"
        )  # fmt: skip
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        if model.rope == "plain":
            scores = rope(q, positions) @ rope(k, positions).mT
        else:
            k = rope(k, positions % model.chunk_len)
            same, last, older = (rope(q, p) @ k.mT for p in model.query_positions(positions))
            chunk = positions // model.chunk_len
            apart = chunk[:, None] - chunk
            scores = torch.where(apart == 0, same, torch.where(apart == 1, last, older))
        scores = scores * temperature / math.sqrt(dim)
        scores = scores.masked_fill(positions[:, None] < positions, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + F.linear(out, w["self_attn.o_proj.weight"])
        h = rms_norm(x, w["post_attention_layernorm.weight"])
        h = F.silu(F.linear(h, w["mlp.gate_proj.weight"])) * F.linear(h, w["mlp.up_proj.weight"])
        x = x + F.linear(h, w["mlp.down_proj.weight"])
    last_row = rms_norm(x[-1:], weights["model.norm.weight"])
    return F.linear(last_row, weights["model.embed_tokens.weight"])[0]


def check(folder: Path) -> None:
    """Prints the difference of the cached DCA from its definition."""
    text = load_haystack().make_sample(1100, seed=0, competing_keys=4).prompt
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    for rope in ("dca", "plain"):
        model = TorchModel(folder, rope, chunk_size=256, local_size=64)
        expected = brute_force(model, ids, 1.3)
        for name, pieces in {"one call": (1100,), "three calls": (333, 766, 1)}.items():
            model.start(1100, 1.3)
            for piece in ids.split(list(pieces)):
                logits = model.forward(piece)
            error = ((logits - expected).norm() / expected.norm()).item()
            print(f"{rope} {name}: relative error {error:.4f} (bfloat16 against float32)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--rope", choices=("dca", "plain"), default="dca")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="only compare with the definition")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        check(args.folder)
        return
    haystack = load_haystack()
    model = TorchModel(args.folder, args.rope)
    for length in map(int, args.lengths.split(",")):
        correct = ended = 0
        wrong: list[str] = []
        start = time.monotonic()
        for seed in range(args.seed, args.seed + args.samples):
            sample = haystack.make_sample(length, seed=seed, competing_keys=args.keys)
            text, stop = model.generate(sample.prompt)
            ended += stop
            if haystack.is_correct(text, sample):
                correct += 1
            else:
                wrong.append(f"{sample.depth:.2f} {sample.answer} ->{text!r}")
        seconds = time.monotonic() - start
        print(
            f"{args.rope} {length}: {correct}/{args.samples} correct, {ended} ended by <|im_end|>,"
            f" {seconds:.0f} s; wrong (depth, answer, generated): {wrong[:6]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
