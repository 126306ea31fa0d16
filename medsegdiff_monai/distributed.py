"""Several processes that train or evaluate together, started by ``torchrun``: one for each GPU, or on CPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError

__all__ = ["data_parallel", "gather", "is_main", "join", "local_device", "share"]

T = TypeVar("T")


def local_device() -> torch.device:
    """Return the device of this process: the GPU of its number on this machine, or the CPU where there is none.

    Raises:
        InputError: for more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(
            f"process {number + 1} of this machine has no GPU of its own, there are {gpus}: set --nproc_per_node={gpus}"
            ", or --device cpu."
        )
    return torch.device("cuda", number)


def join(device: torch.device | str, timeout_minutes: float = 60.0) -> None:
    """Join the other processes, by NCCL on GPUs and by gloo elsewhere; only the first one logs below warnings.

    Args:
        device: of this process; ``cuda`` means the GPU of its number.
        timeout_minutes: how long a process waits for the others, such as for their last cases, before it fails.

    Raises:
        InputError: where ``torchrun`` did not start this process.
    """
    if "WORLD_SIZE" not in os.environ:
        raise InputError(
            "the multi_gpu overlays are for several processes: start with torchrun --nproc_per_node=N -m monai.bundle "
            "run ..., or leave the overlay out."
        )
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(local_device() if device.index is None else device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    if not is_main():
        logging.disable(logging.INFO)


def is_main() -> bool:
    """Whether this process writes and logs: the only one, or the first of several."""
    return idist.get_rank() == 0


def data_parallel(network: nn.Module, device: torch.device | str) -> DistributedDataParallel:
    """Wrap a network so that backward passes average its gradients over all processes.

    Nothing else is exchanged, so that a process may call it more often than others without gradients (own guesses).

    Args:
        network: network on ``device``, of equal weights or not: those of the first process are taken.
        device: of this process.
    """
    on_gpu = torch.device(device).type == "cuda"
    ids = [torch.cuda.current_device()] if on_gpu else None
    return DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share of the first process's list, dealt out one by one; all of it where there is one."""
    if not dist.is_initialized():
        return list(items)
    dealt = [list(items)]
    dist.broadcast_object_list(dealt)
    return dealt[0][dist.get_rank() :: dist.get_world_size()]


def gather(items: Sequence[T]) -> list[T]:
    """Return the items of all processes in the order of the list that was dealt out to them one by one."""
    if not dist.is_initialized():
        return list(items)
    hands: list[Sequence[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(hands, items)
    return [item for deal in zip_longest(*hands) for item in deal if item is not None]
