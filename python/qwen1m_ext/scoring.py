"""Log probabilities of a prompt's own tokens, chunk by chunk, never N x vocabulary at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .model import Qwen2Model, logits_rows
from .sampler import Candidates, rank_tokens


class PromptScorer:
    """Collects what `SamplingParams.prompt_logprobs` asks for from the final hidden states."""

    def __init__(self, model: Qwen2Model, token_ids: list[int], count: int) -> None:
        """Score a prompt; `count` best tokens per position besides the prompt's own."""
        self._model, self._token_ids, self._count = model, token_ids, count
        self._rows: list[Candidates] = []
        self.on_complete: Callable[[list[Candidates]], None] = lambda rows: None

    def __call__(self, begin: int, hidden: Tensor) -> None:
        """Take the hidden states [n, hidden] of the positions from `begin` on."""
        following = self._token_ids[begin + 1 : begin + 1 + len(hidden)]
        block = logits_rows(self._model.config)
        for i in range(0, len(following), block):
            chosen = torch.tensor(following[i : i + block])
            logits = self._model.logits(hidden[i : i + len(chosen)])
            self._rows += rank_tokens(logits, chosen, self._count)
        if begin + len(hidden) == len(self._token_ids):
            self.on_complete(self._rows)
