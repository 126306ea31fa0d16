"""The order in which training sees its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import RandomSampler, Sampler, WeightedRandomSampler

__all__ = ["training_sampler"]


def training_sampler(items: Sequence[Mapping[str, Any]], foreground_share: float = 0.5) -> Sampler[int]:
    """Return a sampler that shows foreground often enough, as slices of a volume do not by themselves.

    Where at least ``foreground_share`` of the cases have foreground, each is drawn once per epoch, in random order.
    Else cases are drawn with replacement, so that foreground is seen in that share of them on average.

    Args:
        items: data list, with ``foreground`` where a case was checked.
        foreground_share: least share of cases with foreground.
    """
    has = [bool(item.get("foreground", True)) for item in items]
    share = sum(has) / len(has)
    if share == 0 or share >= foreground_share:
        return RandomSampler(has)
    weights = [foreground_share / share if h else (1 - foreground_share) / (1 - share) for h in has]
    return WeightedRandomSampler(weights, len(items))
