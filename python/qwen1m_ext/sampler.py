"""Logits to a token: penalties, temperature, min_p, top_k, top_p and a seeded draw.

The order of the steps is vLLM's. Everything runs in float32 on one row of logits; probabilities
are drawn by inverse transform in float64, so that the same seed gives the same token.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import WeightsError
from .request import Logprob, SamplingParams, TokenLogprobs
from .tokenizer import Tokenizer

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
"""(the sample's output tokens so far, [vocab] float32 logits) -> logits; it may change them in
place. It may be asked again after the token that ends the sample: those draws are discarded."""


class Sampler:
    """The state of one sample: its random stream and the tokens that penalties look at."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: Sequence[int] = (),
        index: int = 0,
        logits_processor: LogitsProcessor | None = None,
    ) -> None:
        """Prepare for sample `index` of a request.

        Args:
            params: the request's parameters, checked by themselves and against the vocabulary.
            prompt_token_ids: what repetition_penalty counts besides the output.
            stop_token_ids: suppressed until `min_tokens` are out.
            index: which of the `n` samples; each draws from its own stream.
            logits_processor: masks logits before every draw (a grammar, for example).
        """
        self.params = params
        self._prompt = torch.tensor(sorted(set(prompt_token_ids)), dtype=torch.int64)
        self._output: Counter[int] = Counter()
        self._output_ids: list[int] = []
        self._processor = logits_processor
        self._stops = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.int64)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        # the index goes through a large odd factor: seed and seed + 1 share no stream
        self.stream = (seed + index * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
        self._random = torch.Generator().manual_seed(self.stream)
        bias = params.logit_bias or {}
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        p = self.params
        return bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)

    @property
    def on_device(self) -> bool:
        """Whether `ops.sample` can do all of it, so that nothing has to come to the host."""
        p = self.params
        masked = self._processor is not None or len(self._bias_ids) > 0 or p.min_tokens > 0
        return not masked and p.logprobs is None

    def sample(self, logits: Tensor) -> int:
        """Choose the next token from [vocab] float32 logits, and remember it.

        Raises:
            WeightsError: a logit is NaN, so the weights are damaged or the model overflows.
        """
        if logits.isnan().any():
            raise not_a_number()
        adjusted = self.adjust(logits)
        if self._processor is not None:
            adjusted = self._processor(self._output_ids, adjusted.clone())
        if self.params.temperature == 0:
            token = int(adjusted.argmax())
        else:
            token = self._draw(self.probabilities(adjusted))
        self._output[token] += 1
        self._output_ids.append(token)
        return token

    def stops_at(self, token: int) -> bool:
        """Whether a token may end the sample."""
        return bool((self._stops == token).any())

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits with bias and penalties applied; a new tensor when anything changes."""
        p, penalised = self.params, self.penalised
        suppressed = self._output.total() < p.min_tokens and len(self._stops)
        if not (penalised or suppressed or len(self._bias_ids)):
            return logits
        logits = logits.clone()
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if suppressed:
            logits[self._stops] = -torch.inf
        if penalised:
            output = torch.tensor(list(self._output), dtype=torch.int64)
            counts = torch.tensor(list(self._output.values()), dtype=torch.float32)
            if p.repetition_penalty != 1:
                seen = torch.cat([self._prompt, output]).unique()  # type: ignore[no-untyped-call]
                values = logits[seen]
                logits[seen] = torch.where(
                    values > 0, values / p.repetition_penalty, values * p.repetition_penalty
                )
            logits[output] -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from, [vocab] float64; needs temperature > 0."""
        p = self.params
        exact = logits.double()
        # The largest first becomes 0: with a tiny temperature it would be inf, and inf - inf NaN.
        probs = torch.softmax((exact - exact.max()) / p.temperature, -1)
        if p.min_p > 0:
            probs = torch.where(probs >= p.min_p * probs.max(), probs, 0.0)
        keep_k = 0 < p.top_k < probs.numel()
        if keep_k or p.top_p < 1:
            ordered, order = probs.sort(descending=True, stable=True)
            if keep_k:
                ordered[p.top_k :] = 0
            ordered /= ordered.sum()
            if p.top_p < 1:  # the token that reaches top_p is still in
                ordered[ordered.cumsum(-1) - ordered >= p.top_p] = 0
            probs = torch.zeros_like(probs).scatter_(0, order, ordered)
        return probs / probs.sum()

    def _draw(self, probs: Tensor) -> int:
        u = torch.rand((), generator=self._random, dtype=torch.float64)
        cumulative = probs.cumsum(-1)
        token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
        # u can round up to the very end; the last possible token is meant then
        return min(token, int(probs.nonzero()[-1]))


def not_a_number() -> WeightsError:
    """What is wrong with a model whose logits are NaN."""
    return WeightsError(
        "logits: expected numbers, got NaN: the weights are damaged, or values overflow"
    )


Candidates = dict[int, tuple[float, int]]
"""token -> (log probability, rank): the chosen token first, then the likeliest."""


def rank_tokens(logits: Tensor, chosen: Tensor, count: int) -> list[Candidates]:
    """Log probabilities of the chosen token and of the `count` likeliest, row by row.

    Args:
        logits: [rows, vocab] float32, unmodified.
        chosen: [rows] int64.
        count: how many of the best to report besides the chosen one.
    """
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(1, chosen.to(logits.device)[:, None])
    ranks = (logprobs > own).sum(1) + 1
    values, ids = logprobs.topk(min(count, logits.shape[1]), dim=1)
    columns = chosen, own[:, 0], ranks, values, ids
    result = []
    for token, value, place, best, likeliest in zip(*(c.tolist() for c in columns), strict=True):
        entries = {token: (value, place)}
        for rank, (other, its_value) in enumerate(zip(likeliest, best, strict=True), 1):
            entries.setdefault(other, (its_value, rank))
        result.append(entries)
    return result


def with_texts(candidates: Candidates, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """The same with `decoded_token`, which is empty without a tokenizer."""
    return {
        token: Logprob(value, rank, tokenizer.decode([token], False) if tokenizer else "")
        for token, (value, rank) in candidates.items()
    }
