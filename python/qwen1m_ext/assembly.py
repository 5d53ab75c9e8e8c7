"""What an engine is made of, put together in the order in which memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from . import kv_scales, ops
from .attention import Rotary
from .config import DualChunkConfig, ModelConfig
from .core import Core
from .cost_model import ASSUMED_FLOPS, GPU_FLOPS, CostModel
from .decode_step import DecodeStep, most_rows
from .device import Device, StreamDevice
from .fp8 import FP8
from .kv_cache import KVCache
from .model import Qwen2Model
from .offload import OffloadedCache
from .output_processor import OutputProcessor
from .plan import Deployment, stage_bytes
from .prefill_policy import PrefillPolicy
from .prefix_cache import PrefixCache
from .residency import Residency
from .runner import ModelRunner
from .scheduler import Limits, Scheduler
from .sequence import Sequence
from .sparsity import SparseAttention
from .weights import fingerprint, load_weights


@dataclass(frozen=True)
class Parts:
    """A loaded model and what it computes with."""

    model: Qwen2Model
    rotary: Rotary
    cache: KVCache
    sparse: SparseAttention | None  # None: nothing is reserved for sparse prefill
    kv_exponents: dict[str, list[list[int]]] | None  # of the scales of an fp8 cache
    key: bytes  # of all that keys and values depend on, besides the tokens

    @staticmethod
    def load(
        model_dir: Path,
        config: ModelConfig,
        dual_chunk: DualChunkConfig,
        policy: PrefillPolicy,
        device: Device,
        deployment: Deployment,
    ) -> Parts:
        """Read the weights of a checkpoint and reserve what `plan.memory_plan` has added up.

        Raises:
            ConfigError, WeightsError: a file of the checkpoint does not fit.
        """
        d = deployment
        size = config, d.kv_dtype, d.tokens, d.max_seqs, d.dtype
        with device.scope():
            weights = load_weights(model_dir, config, d.dtype, device)
            sparse = None
            if d.sparse:
                sparse = SparseAttention(
                    config, dual_chunk, policy.budgets, d.tokens, policy.settings, device, d.dtype
                )
            rotary = Rotary.build(config, dual_chunk, d.tokens, critical=d.sparse, device=device)
            model = Qwen2Model(config, weights, d.chunk + d.decode_rows, device)
            cache = (
                OffloadedCache(*size, device, d.device_kv_bytes)
                if d.kv_offload
                else KVCache(*size, device)
            )
            if d.kv_dtype == FP8 and not kv_scales.load(cache, config, model_dir):
                kv_scales.calibrate(model, rotary, cache, d.tokens)
            exponents = kv_scales.exponents(cache)
            checkpoint = fingerprint(weights)
        facts: tuple[object, ...] = config, dual_chunk, d.dtype, ops.PAGE_SIZE, checkpoint
        if exponents:
            facts += (d.kv_dtype, exponents)
        key = blake2b(repr(facts).encode(), digest_size=32).digest()
        return Parts(model, rotary, cache, sparse, exponents, key)


def build_core(
    parts: Parts,
    policy: PrefillPolicy,
    deployment: Deployment,
    limits: Limits,
    prefix_caching: bool,
    make_outputs: Callable[[Callable[[Sequence, int], None]], OutputProcessor],
) -> Core:
    """The threads' world. It must not know the engine, whose end is to end it.

    Args:
        parts: loaded for this `policy` and `deployment`.
        policy: which prompts are prefilled sparsely.
        deployment: the sizes.
        limits: of the scheduler's steps.
        prefix_caching: whether pages are found again by what is in them.
        make_outputs: as `Core`.
    """
    model, rotary, cache = parts.model, parts.rotary, parts.cache
    decodes = _decode_step(parts, deployment)
    keys = policy.expected_keys()
    cost = CostModel(model.config, keys, GPU_FLOPS if decodes else ASSUMED_FLOPS)
    prefixes = PrefixCache(cache.allocator, parts.key, prefix_caching)
    residency = Residency(cache, prefixes, rotary.dual_chunk.temperature, limits.max_num_seqs)
    runner = ModelRunner(model, rotary, cache, residency.temperature, cost.prefill_seconds, decodes)
    return Core(Scheduler(residency, cost, limits), runner, make_outputs)


def _decode_step(parts: Parts, deployment: Deployment) -> DecodeStep | None:
    """What decodes on a device with a queue, its graphs captured."""
    model, rotary, cache, d = parts.model, parts.rotary, parts.cache, deployment
    device = cache.device
    if not isinstance(device, StreamDevice):
        return None
    shape = replace(model.config, dual_chunk=rotary.dual_chunk)
    stage, graphs, rows = stage_bytes(shape, d), d.graphs(shape), d.decode_rows
    with device.scope():
        device.reserve(stage, most_rows(rows, d.speculative, model.workspace.chunk_tokens))
        return DecodeStep(model, rotary, cache, rows, graphs, d.speculative)
