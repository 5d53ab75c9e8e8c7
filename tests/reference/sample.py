"""The distribution of the next token in float64: penalties, temperature, min_p, top_k, top_p."""

from __future__ import annotations

import torch
from torch import Tensor


def adjust(
    logits: Tensor, history: Tensor, repetition: float, presence: float, frequency: float
) -> Tensor:
    """Logits with penalties, [vocab] float64.

    Args:
        logits: [vocab].
        history: [vocab] 2 * (times in the output) + (1 if in the prompt).
        repetition: divides positive and multiplies other logits of tokens in prompt or output.
        presence: subtracted from tokens in the output.
        frequency: subtracted as often as a token is in the output.
    """
    a, count = logits.double(), (history // 2).double()
    a = torch.where(history > 0, torch.where(a > 0, a / repetition, a * repetition), a)
    return a - (frequency * count + presence * (count > 0))


def distribution(
    adjusted: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """[vocab] float64 probabilities.

    Args:
        adjusted: [vocab] float64.
        temperature: 0 is greedy, the lowest id of several.
        top_k: how many stay of the descending order; <= 0: all.
        top_p: the fewest stay whose sum reaches this share of what top_k left.
        min_p: tokens of less than this times the largest probability are out.
    """
    values, order = adjusted.sort(descending=True, stable=True)
    result = torch.zeros(len(adjusted), dtype=torch.float64)
    if temperature == 0:
        result[order[0]] = 1
        return result
    p = torch.softmax(values / temperature, -1)  # from the likeliest on
    p[p < min_p * p[0]] = 0
    if top_k > 0:
        p[top_k:] = 0
    p /= p.sum()
    reached = 0.0
    for i, share in enumerate(p.tolist()):  # one after the other: the definition
        if reached >= top_p or share == 0:
            p[i:] = 0
            break
        reached += share
    result[order] = p / p.sum()
    return result
