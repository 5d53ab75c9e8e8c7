"""Our engine against transformers: the same checkpoint, the same logits, the same tokens.

Up to the trained length Dual Chunk Attention is plain RoPE (a query meets keys of the chunk before
it at their true distance), so transformers, which ignores dual_chunk_attention_config, is the
truth there also for checkpoints that have one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import model_config, random_tensors, write_checkpoint, write_weights
from lib.compare import worst_error
from qwen1m_ext import LLM, SamplingParams

transformers = pytest.importorskip("transformers")

TRAINED = 320  # tokens: three pages, and a chunk border at 256 where there are chunks
MAX_LOGIT_ERROR = 1e-4

TRAINED_DCA = dict(chunk_size=TRAINED, local_size=64, original_max_position_embeddings=TRAINED)
# What published Qwen2.5 configs also say, and what does not change the computation.
INERT = dict(
    attention_dropout=0.0,
    bos_token_id=256,
    initializer_range=0.02,
    max_window_layers=2,
    sliding_window=32768,
    transformers_version="4.57.0",
    use_cache=True,
)


def shape(q_heads: int, kv_heads: int, dim: int, **changes: Any) -> dict[str, Any]:
    """A config.json; hidden_size is the width of all heads, no Dual Chunk Attention."""
    sizes = dict(
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        hidden_size=q_heads * dim,
        tie_word_embeddings=False,
        dual_chunk_attention_config=None,
    )
    return model_config(**(sizes | INERT | changes))


DCA = dict(dual_chunk_attention_config=TRAINED_DCA)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa_2": (shape(4, 2, 64, rope_theta=1e6, rms_norm_eps=1e-5), {}),
    "gqa_2_tied_dca": (shape(4, 2, 32, tie_word_embeddings=True, **DCA), {"shards": 3}),
    "gqa_1": (shape(3, 3, 32, vocab_size=301, num_hidden_layers=3), {"shards": 2}),
    "gqa_7_dca": (shape(14, 2, 16, rope_theta=1e7, **DCA), {}),
    "gqa_5_wide_heads": (shape(5, 1, 128, hidden_size=80, head_dim=128), {}),
    "head_dim_80": (shape(2, 1, 80, num_hidden_layers=1), {}),
    "stored_as_bf16": (shape(4, 2, 16, torch_dtype="bfloat16"), {"dtype": torch.bfloat16}),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint; the gain makes what it says depend on the whole prompt."""
    config, how = MODELS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(directory, config, seed=1, gain=2.0, **how)
    tensors = random_tensors(config, seed=1, gain=2.0)
    # Logits of a few units, as a trained model has: the head of a tied model is its unit-variance
    # embedding, the others' has the gain.
    scale = 2 / config["hidden_size"] ** 0.5 if config["tie_word_embeddings"] else 1.0
    tensors["model.norm.weight"] *= scale
    dtype = how.get("dtype", torch.float32)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_weights(directory, tensors, how.get("shards", 1))
    return directory


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Any:
    """The checkpoint in transformers, float32."""
    return load_truth(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    """The checkpoint in our engine, float32."""
    return LLM(checkpoint, dtype="float32", max_model_len=400)


def load_truth(directory: Path) -> Any:
    """Load with transformers' own reader and eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def prompt(length: int, vocab: int = 259) -> list[int]:
    """Token ids that repeat now and then, so that attention has something to find."""
    ids = torch.randint(0, min(vocab, 259), (length,), generator=torch.Generator().manual_seed(3))
    return torch.where(torch.arange(length) % 3 == 0, ids % 16, ids).tolist()


def test_logits(truth: Any, llm: LLM) -> None:
    """Every position of a prompt of the trained length, and of one token."""
    for length in (1, TRAINED):
        ids = prompt(length)
        with torch.inference_mode():
            expected = truth(torch.tensor([ids])).logits[0]
        assert 1 < expected.std() < 5  # a model that says something
        actual = llm.logits(ids)
        assert actual.shape == expected.shape
        assert worst_error(actual, expected) <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("length", [5, 230], ids=["short", "over_the_border"])
def test_64_greedy_tokens(length: int, truth: Any, llm: LLM) -> None:
    """Prefill and then decode, the second prompt over the chunk border at 256 and page border."""
    ids = prompt(length)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": ids}], params)[0].outputs[0]
    expected = list(ids)
    with torch.inference_mode():
        for _ in range(64):  # no cache: nothing of transformers' generation is trusted
            expected.append(int(truth(torch.tensor([expected])).logits[0, -1].argmax()))
    assert output.token_ids == expected[length:]
    assert len(set(output.token_ids)) > 8  # not a loop that any model would fall into


def test_prompt_logprobs(truth: Any, llm: LLM) -> None:
    """The log probability of each prompt token under the ones before it."""
    ids = prompt(200)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    output = llm.generate([{"prompt_token_ids": ids}], params)[0]
    with torch.inference_mode():
        expected = truth(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    for token in range(1, 200):
        entry = output.prompt_logprobs[token]
        assert entry is not None
        assert abs(entry[ids[token]].logprob - expected[token - 1, ids[token]]) <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("chunk_tokens", [1, 100, 128])
def test_prefill_chunks_do_not_change_logits(
    checkpoint: Path, truth: Any, chunk_tokens: int
) -> None:
    """A prompt in pieces gives transformers' logits too."""
    ids = prompt(150 if chunk_tokens == 1 else 300)
    llm = LLM(checkpoint, dtype="float32", max_model_len=400, prefill_chunk_tokens=chunk_tokens)
    with torch.inference_mode():
        expected = truth(torch.tensor([ids])).logits[0]
    assert worst_error(llm.logits(ids), expected) <= MAX_LOGIT_ERROR


def test_checkpoint_saved_by_transformers(tmp_path: Path) -> None:
    """What save_pretrained writes today (its config fields, its shards) is read."""
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    truth = transformers.Qwen2ForCausalLM(config).float().eval()
    truth.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    llm = LLM(tmp_path, dtype="float32", max_model_len=300, skip_tokenizer_init=True)
    ids = prompt(200)
    with torch.inference_mode():
        expected = truth(torch.tensor([ids])).logits[0]
    assert worst_error(llm.logits(ids), expected) <= MAX_LOGIT_ERROR
