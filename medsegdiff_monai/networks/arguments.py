"""The network's arguments: checked, and brought to what each level is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

from ..errors import InputError

__all__ = [
    "PREDICTION_TYPES",
    "Level",
    "check_at_least_one",
    "check_choice",
    "check_dropout",
    "check_flags",
    "default_levels",
    "one_each",
    "read_levels",
    "read_mask_level",
]

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")


class Level(NamedTuple):
    """What a level of the network is made of.

    Attributes:
        channels: channels of its feature maps.
        num_res_blocks: number of residual blocks.
        attention: whether self-attention follows them.
        num_head_channels: channels of each attention head.
        fused: whether dynamic conditional encoding joins both streams there.
    """

    channels: int
    num_res_blocks: int
    attention: bool
    num_head_channels: int
    fused: bool


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that is none of the allowed ones; a text such as ``"false"`` is not true or false.

    Raises:
        InputError: naming argument, value and what is allowed.
    """
    if value not in allowed:
        choice = " or ".join(map(str, allowed)) if len(allowed) == 2 else f"one of {tuple(allowed)}"
        raise InputError(f"{name}={value!r} must be {choice}.")


def check_flags(**flags: bool) -> None:
    """Refuse flags that are neither true nor false, such as texts.

    Raises:
        InputError: naming argument and value.
    """
    for name, flag in flags.items():
        check_choice(name, flag, (False, True))


def check_dropout(dropout: float) -> None:
    """Refuse a probability of dropout below 0, or from 1 on.

    Raises:
        InputError: naming the value.
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout} must be at least 0 and below 1.")


def check_at_least_one(**numbers: int) -> None:
    """Refuse numbers below 1.

    Raises:
        InputError: naming argument and value.
    """
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name}={number} must be at least 1.")


def one_each(name: str, value: Union[int, Sequence[int]], count: int, what: str) -> list[int]:
    """Return a positive number for each of ``count`` things, of which one number may stand for all.

    Raises:
        InputError: for another number of them, or one below 1.
    """
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count or any(v < 1 for v in values):
        raise InputError(f"{name}={value} must be a positive number, or one for each of the {count} {what}.")
    return values


def read_levels(
    channels: Sequence[int],
    num_res_blocks: Union[int, Sequence[int]],
    attention_levels: Optional[Sequence[bool]],
    num_head_channels: Union[int, Sequence[int]],
    conditioning_levels: Optional[Sequence[int]],
) -> list[Level]:
    """Return what each level is made of; for the arguments see :class:`.MedSegDiffUNet`.

    Raises:
        InputError: for values that do not fit together; the message names value and remedy.
    """
    if len(channels) < 2 or min(channels) < 1 or channels[0] % 2:
        raise InputError(
            f"channels={list(channels)} must be at least two positive numbers, the first even: it is also the width of "
            "the timestep embedding's sines and cosines."
        )
    count = len(channels)
    blocks = one_each("num_res_blocks", num_res_blocks, count, "levels")
    heads = one_each("num_head_channels", num_head_channels, count, "levels")
    attention = _attention(attention_levels, channels, heads)
    fused = _fused(conditioning_levels, count)
    return [Level(*parts, i in fused) for i, parts in enumerate(zip(channels, blocks, attention, heads))]


def _attention(levels: Optional[Sequence[bool]], channels: Sequence[int], heads: Sequence[int]) -> list[bool]:
    attention = [False] * len(channels) if levels is None else list(levels)
    if len(attention) != len(channels):
        raise InputError(f"attention_levels={attention} must have one entry for each of {len(channels)} levels.")
    for on, width, head in zip(attention, channels, heads):
        check_choice("attention_levels", on, (False, True))
        if on and width % head:
            raise InputError(f"num_head_channels={head} does not divide the {width} channels of an attention level.")
    return attention


def default_levels(count: int) -> list[int]:
    """The middle two of so many levels; the last is none of them, as it sums both streams."""
    middle = (count - 1) // 2
    return sorted({min(level, count - 2) for level in (middle, middle + 1)})


def _fused(levels: Optional[Sequence[int]], count: int) -> list[int]:
    """The levels of dynamic conditional encoding."""
    if levels is None:
        return default_levels(count)
    if len(set(levels)) != len(levels) or any(not 0 <= level < count - 1 for level in levels):
        raise InputError(
            f"conditioning_levels={sorted(levels)} must be different levels from 0 to {count - 2}: "
            "at the last level both streams are summed."
        )
    return sorted(levels)


def read_mask_level(mask_level: Optional[int], levels: Sequence[Level]) -> int:
    """Return the level at which the mask's encoder begins; for the argument see :class:`.MedSegDiffUNet`.

    Raises:
        InputError: for a level below the first fused one, which needs both encoders, or none of the encoders'.
    """
    most = next((i for i, level in enumerate(levels) if level.fused), len(levels) - 2)
    if mask_level is None:
        return min(default_levels(len(levels))[0], most)
    if isinstance(mask_level, bool) or not isinstance(mask_level, int) or not 0 <= mask_level <= most:
        why = ", the first of conditioning_levels" if levels[most].fused else ""
        raise InputError(f"mask_level={mask_level!r} must be a level from 0 to {most}{why}.")
    return mask_level
