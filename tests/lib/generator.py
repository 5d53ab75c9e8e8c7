"""Test inputs from a counter: the same numbers in Python, C++ and any other language.

splitmix64 in counter mode (golden/README.md): element i (C order) of the tensor with seed S is
mix(S + (i + 1) * 0x9E3779B97F4A7C15), its upper 24 bits mapped to [-sqrt(3), sqrt(3)), which has
variance 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the given shape filled from the counter; unit variance, bounded."""
    count = math.prod(shape)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the definition
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    values = (np.float32(2) * unit - np.float32(1)) * np.float32(1.7320508)
    return torch.from_numpy(values.reshape(shape)).to(dtype)


def shuffled(seed: int, count: int) -> list[int]:
    """A permutation of range(count), the same everywhere: indices sorted by their counter value."""
    return sorted(range(count), key=tensor(seed, count).tolist().__getitem__)
