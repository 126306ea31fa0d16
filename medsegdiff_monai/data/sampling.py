"""The order in which training and evaluation see their cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
import torch.distributed as dist
from monai.data import DistributedSampler
from torch.utils.data import RandomSampler, WeightedRandomSampler

from ..errors import InputError

__all__ = ["DistributedEvaluationSampler", "DistributedTrainingSampler", "training_sampler"]


def training_sampler(
    items: Sequence[Mapping[str, Any]], foreground_share: float = 0.5
) -> RandomSampler | WeightedRandomSampler:
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


class DistributedTrainingSampler(DistributedSampler):
    """One process's share of what a sampler draws for all of them.

    All processes draw the same, by (seed, epoch), and take turns, so that together they see what one process would.
    (MONAI's ``DistributedWeightedRandomSampler`` draws from a share of the cases, which rare foreground may be missing
    from.) Where the turns do not come out even, the first draws are repeated: all take equally many steps.

    Args:
        sampler: draws for all; its ``generator`` is set.
        seed: of the whole training.
        **kwargs: ``num_replicas`` and ``rank``; by default those of the process group.
    """

    def __init__(self, sampler: RandomSampler | WeightedRandomSampler, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(sampler, shuffle=False, seed=seed, **kwargs)  # type: ignore[arg-type]  # its length matters
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        """Draw an epoch."""
        # of its own: the global generator differs between processes, and so must noise and timesteps
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = list(self.sampler)
        return (drawn[turn] for turn in super().__iter__())


class DistributedEvaluationSampler(DistributedSampler):
    """One process's share of the cases to evaluate: each case is in exactly one share.

    Args:
        cases: data list or data set.
        **kwargs: ``num_replicas`` and ``rank``; by default those of the process group.

    Raises:
        InputError: where there are fewer cases than processes.
    """

    def __init__(self, cases: Sized, **kwargs: Any) -> None:
        processes = kwargs.get("num_replicas") or dist.get_world_size()
        if len(cases) < processes:
            raise InputError(
                f"{len(cases)} cases to evaluate for {processes} processes: each needs one, set --nproc_per_node lower."
            )
        super().__init__(cases, even_divisible=False, shuffle=False, **kwargs)  # type: ignore[arg-type]
