"""What a step costs: one model for chunk sizes, for the time left and for the latency cap.

    t(step) = c + sum over prefill pieces (b x + a pairs) + sum over decodes (d + g keys)

with x the tokens of a piece and pairs its (query, key) pairs, (end^2 - begin^2) / 2. Dense and
sparse pieces have coefficients of their own; a sparse piece pays for its tokens with the keys near
them, for the pairs with far keys that its budgets let expect, and for the keys that its selection
reads. The coefficients start from counted operations and are refined from every measured step:
least squares of the relative errors, none negative, old steps fading. Where the steps say nothing
(no long prompt yet) the counted proportions stay, scaled to the measured speed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .config import ModelConfig
from .sparse_config import WINDOW_TOKENS, ExpectedKeys

ASSUMED_FLOPS = 50e9
"""Operations per second before anything has been measured, on a CPU."""

GPU_FLOPS = 300e12
"""The same on a GPU."""

SELECTION_PAIRS = 72
"""What a window's selection costs for each key before its end, in (query, key) pairs: 64 rows that
select and 8 whose recall is measured."""

FADING = 0.998
"""Weight of the past per step: about the last 500 count."""

PRIOR_WEIGHT = 1e-5
"""Weight of the counted proportions, in steps. Small: a fixed cost of 100 times the counted one is
normal. It decides only where the steps say nothing."""

RECENT_STEPS = 48
"""Prefill steps that say how late steps come: few, so that a machine that becomes busy is noticed
after two of them."""

WITHIN_CAP = 0.95
"""Share of steps that a latency cap holds for."""

SPARSE_PRIOR_WEIGHT = 1e-2
"""The same for sparse prefill, whose few windows, one after the other, hardly tell its three parts
apart."""

MAX_CHUNK_TOKENS = 1 << 21
"""More than any context."""

_SWEEPS = 60
_YOUNG = 8  # steps: a fit of fewer starts afresh, and its predictions are not judged


def prefill_flops(config: ModelConfig, begin: int, end: int) -> float:
    """Multiply-adds times two of the tokens [begin, end): linear layers plus causal attention."""
    pairs = (end - begin) * (end + begin + 1) / 2
    return (end - begin) * _linear_flops(config) + pairs * _pair_flops(config)


def _linear_flops(config: ModelConfig) -> float:
    """Of one token in all layers, without attention."""
    layer = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    layer += 3 * config.hidden_size * config.intermediate_size
    return 2.0 * config.num_layers * layer


def _pair_flops(config: ModelConfig) -> float:
    """Of one query token and one key."""
    return 4.0 * config.num_layers * config.q_size


@dataclass(frozen=True)
class Work:
    """Tokens [begin, end) of one sequence in a step."""

    begin: int
    end: int
    decode: bool = False
    sparse: bool = False


class CostModel:
    """Seconds of steps. One thread observes; any may ask."""

    def __init__(
        self,
        config: ModelConfig,
        sparse: ExpectedKeys = ExpectedKeys(1024.0),  # noqa: B008 - frozen
        flops: float = ASSUMED_FLOPS,
    ) -> None:
        """Start from the counted operations of a model.

        Args:
            config: the model.
            sparse: keys that a row of sparse attention meets.
            flops: operations per second.
        """
        linear, pair = _linear_flops(config), _pair_flops(config)
        head = 2.0 * config.hidden_size * config.vocab_size
        counted = (
            linear,  # c: a step's fixed cost, about a token's
            linear, pair,  # dense: per token, per pair
            linear + sparse.near * pair, pair,  # sparse: per token, per far pair
            SELECTION_PAIRS * pair,  # and per key of the selection
            linear + head, pair,  # decode: per sequence, per key
        )  # fmt: skip
        self._sparse = sparse
        self._prior = [f / flops for f in counted]
        n = len(counted)
        self._normal = [[0.0] * n for _ in range(n)]  # of features in units of the prior
        self._right = [0.0] * n
        self._scale = [1.0] * n  # coefficients in units of the prior
        self._predicted = self._measured = 0.0  # fading sums: the machine's speed
        self.steps = 0  # measured
        self._late: deque[float] = deque(maxlen=RECENT_STEPS)  # measured / predicted

    def seconds(self, work: Iterable[Work]) -> float:
        """Predicted time of a step."""
        coefficients = self._coefficients()
        return sum(c * f for c, f in zip(coefficients, self._features(work), strict=True))

    def prefill_seconds(self, begin: int, end: int, sparse: bool = False) -> float:
        """Predicted time of the tokens [begin, end) of a prompt, steps' fixed costs left out."""
        return self.seconds([Work(begin, end, sparse=sparse)]) - self._coefficients()[0]

    def chunk(self, begin: int, seconds: float, sparse: bool = False) -> int:
        """Largest number of tokens from `begin` on whose cost fits in `seconds`; perhaps 0."""
        low, high = 0, MAX_CHUNK_TOKENS  # the cost grows with the end
        if math.isinf(seconds):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.prefill_seconds(begin, begin + middle, sparse) <= seconds
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @property
    def lateness(self) -> float:
        """Factor on a prediction that all but one in twenty of the recent prefill steps kept to.

        At least 1. Steps scatter around what is predicted, long prompts come a few percent late
        while the fit follows, and another process may take a core away: a cap on time is divided by
        this. Windows of sparse prefill do not count, as no cap cuts them.
        """
        late = sorted(self._late)
        which = min(len(late) - 1, int(WITHIN_CAP * (len(late) + 1)))
        return max(1.0, late[which]) if late else 1.0

    def observe(self, work: Iterable[Work], seconds: float) -> None:
        """Learn from a measured step."""
        raw = self._features(work)
        features = [f * p for f, p in zip(raw, self._prior, strict=True)]
        prior = sum(features)
        if not (seconds > 0 and prior > 0):
            return
        if self.steps >= _YOUNG and features[1] and not features[3]:
            expected = sum(c * f for c, f in zip(self._coefficients(), raw, strict=True))
            if expected > 0:
                self._late.append(seconds / expected)
        self._predicted = FADING * self._predicted + 1
        self._measured = FADING * self._measured + math.log(seconds / prior)
        row = [f / seconds for f in features]
        for i, x in enumerate(row):
            self._right[i] = FADING * self._right[i] + x
            target = self._normal[i]
            for j, y in enumerate(row):
                target[j] = FADING * target[j] + x * y
        self.steps += 1
        prefills = features[1] or features[3]
        if prefills or self.steps % 16 == 0:  # a fit costs some 0.3 ms: not after every token
            self._fit()

    def _features(self, work: Iterable[Work]) -> tuple[float, ...]:
        dense_tokens = dense_pairs = sparse_tokens = sparse_pairs = sparse_keys = 0.0
        decodes = decode_keys = 0.0
        for piece in work:
            if piece.decode:
                decodes += 1
                decode_keys += piece.end
            elif piece.sparse:
                sparse_tokens += piece.end - piece.begin
                sparse_pairs += self._sparse.far_pairs(piece.begin, piece.end)
                sparse_keys += _estimated_keys(piece.begin, piece.end)
            else:
                dense_tokens += piece.end - piece.begin
                dense_pairs += (piece.end**2 - piece.begin**2) / 2
        dense, sparse = (dense_tokens, dense_pairs), (sparse_tokens, sparse_pairs, sparse_keys)
        return 1.0, *dense, *sparse, decodes, decode_keys

    def _coefficients(self) -> list[float]:
        return [s * p for s, p in zip(self._scale, self._prior, strict=True)]

    def _fit(self) -> None:
        """Coordinate descent of |row . scale - 1|^2 + prior (scale / speed - 1)^2, scale >= 0."""
        speed = math.exp(self._measured / self._predicted)
        weights = (*[PRIOR_WEIGHT] * 3, *[SPARSE_PRIOR_WEIGHT] * 3, *[PRIOR_WEIGHT] * 2)
        pulls = [weight / (speed * speed) for weight in weights]
        young = self.steps < _YOUNG
        scale = [speed] * len(self._scale) if young else list(self._scale)
        for _ in range(_SWEEPS):
            for i, row in enumerate(self._normal):
                rest, pull = -row[i] * scale[i], pulls[i]
                rest += sum(r * s for r, s in zip(row, scale, strict=True))
                scale[i] = max(0.0, (self._right[i] - rest + pull * speed) / (row[i] + pull))
        self._scale = scale


def _estimated_keys(begin: int, end: int) -> float:
    """Keys that the estimates of a sparse prefill read: at the end of each window all before it."""
    windows, keys = range(begin // WINDOW_TOKENS + 1, -(-end // WINDOW_TOKENS)), float(end)
    return keys + WINDOW_TOKENS * sum(windows) if end > begin else 0.0
