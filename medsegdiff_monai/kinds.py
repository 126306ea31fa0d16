"""Kinds of values that a config variable may hold: each says what it allows and reads a value, also from text.

Text is what command lines and MONAI Label send. It is read as the literal that it is and never evaluated.
"""

from __future__ import annotations

import ast
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = [
    "Boolean", "Choice", "Device", "Each", "Kind", "ListOf", "Nullable", "Number", "Place", "Regions", "Schedule",
    "Several", "Transforms", "Whole", "is_place", "literal",
]  # fmt: skip

MANY = 1_000_000
CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


class _BareWords(ast.NodeTransformer):
    """Names as the text that they are, but for JSON's constants."""

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace a name, or what is in another node."""
        if isinstance(node, ast.Name):
            return ast.Constant(CONSTANTS.get(node.id, node.id))
        return self.generic_visit(node)


def literal(value: Any) -> Any:
    """Read text as a JSON or Python literal, in which words need no quotes; anything else stays as it is."""
    if not isinstance(value, str) or "#" in re.sub(r"'[^']*'|\"[^\"]*\"", "", value):  # Python drops what follows a #
        return value
    try:
        return ast.literal_eval(_BareWords().visit(ast.parse(value.strip(), mode="eval")))
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return value


def is_place(kind: Any) -> bool:
    """Whether a kind holds paths: one, a list, or none."""
    while isinstance(kind, (Nullable, ListOf, Several)):
        kind = kind.kind
    return isinstance(kind, Place)


class Kind(ABC):
    """What a variable may hold."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What is allowed, in a few words."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Return the value that is meant.

        Raises:
            ValueError: where it is not allowed, with the reason if ``allowed`` does not say all.
        """


def _number(value: Any) -> Any:
    number = literal(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError
    return number


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number, both limits included."""

    low: int = 1
    high: int = MANY

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return f"a whole number {f'from {self.low} to {self.high}' if self.high != MANY else f'of at least {self.low}'}"

    def read(self, value: Any) -> int:
        """Return a whole number."""
        number = _number(value)
        if not self.low <= number <= self.high or number % 1:
            raise ValueError
        return int(number)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, ``high`` and ``low`` included, ``above`` not."""

    low: float = float("-inf")
    high: float = float("inf")
    above: float = float("-inf")

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        limits = [("above", self.above), ("at least", self.low), ("at most", self.high)]
        return "a number" + ",".join(f" {word} {limit:g}" for word, limit in limits if abs(limit) != float("inf"))

    def read(self, value: Any) -> float:
        """Return a number, whole ones as they are."""
        number = _number(value)
        if not (self.low <= number <= self.high and self.above < number < float("inf")):
            raise ValueError
        return number if isinstance(number, int) else float(number)


@dataclass(frozen=True)
class Boolean(Kind):
    """True or false."""

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return "true or false"

    def read(self, value: Any) -> bool:
        """Return a boolean, also from text in any case."""
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value.lower() not in ("true", "false"):
            raise ValueError
        return value.lower() == "true"


class Choice(Kind):
    """One of several words or numbers.

    Args:
        *options: all of them; booleans are also read from text in any case.
    """

    def __init__(self, *options: Any) -> None:
        self.options = options

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        words = [str(option).lower() if isinstance(option, bool) else str(option) for option in self.options]
        return ", ".join(words[:-1]) + f" or {words[-1]}"

    def read(self, value: Any) -> Any:
        """Return the option that is meant."""
        for option in self.options:
            for meant in (value, CONSTANTS.get(value.lower()) if isinstance(value, str) else value, literal(value)):
                if type(meant) is type(option) and meant == option:
                    return option
        raise ValueError


@dataclass(frozen=True)
class Schedule(Kind):
    """The name of a noise schedule in MONAI's registry, to which anyone may add."""

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return "cosine, linear_beta, scaled_linear_beta, sigmoid_beta, or another of MONAI's NoiseSchedules"

    def read(self, value: Any) -> str:
        """Return the name."""
        from monai.networks.schedulers import NoiseSchedules

        if value not in list(NoiseSchedules.names):
            raise ValueError
        return value


@dataclass(frozen=True)
class Place(Kind):
    """A file or folder, as it is written, of ``least`` characters: no name at all would be the working directory."""

    least: int = 0

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return "a path"

    def read(self, value: Any) -> str:
        """Return the path as text."""
        if isinstance(value, Real) and not isinstance(value, bool):
            raise ValueError(f"must be text: where the name is {value}, write ./{value}")
        if not isinstance(value, (str, os.PathLike)) or len(os.fspath(value).strip()) < self.least:
            raise ValueError
        return os.fspath(value)


@dataclass(frozen=True)
class Device(Kind):
    """Where the network runs."""

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return "cpu, cuda, cuda:N or mps"

    def read(self, value: Any) -> Any:
        """Return the device as it was given, if it is there."""
        import torch

        if not isinstance(value, (str, torch.device)):
            raise ValueError
        try:
            device = torch.device(value)
        except RuntimeError:
            raise ValueError from None
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if device.type not in there:
            raise ValueError
        if (device.index or 0) >= there[device.type]:
            names = [kind if number == 1 else f"{kind}:{i}" for kind, number in there.items() for i in range(number)]
            raise ValueError(f"is not there: take {' or '.join(names)}")
        return value


@dataclass(frozen=True)
class Nullable(Kind):
    """Null, or something else."""

    kind: Kind

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return f"null, or {self.kind.allowed}"

    def read(self, value: Any) -> Any:
        """Return None for null and none in any case."""
        if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none")):
            return None
        return self.kind.read(value)


@dataclass(frozen=True)
class ListOf(Kind):
    """A list."""

    kind: Kind
    least: int = 0
    most: int = 1000

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        number = ""
        if 0 < self.least and self.most - self.least < 2:
            number = f" of {self.least}" if self.least == self.most else f" of {self.least} or {self.most}"
        return f"a list{number}, each {self.kind.allowed}"

    def read(self, value: Any) -> list[Any]:
        """Return a list; words with commas between them are one, too, and so is one of the words that may be chosen."""
        values = literal(value)
        values = [values] if isinstance(self.kind, Choice) and isinstance(values, str) else values
        if not isinstance(values, (list, tuple)) or not self.least <= len(values) <= self.most:
            raise ValueError
        return [self.kind.read(v) for v in values]


@dataclass(frozen=True)
class Several(Kind):
    """One value, or a list with at least one."""

    kind: Kind

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return f"{self.kind.allowed}, or a list, each {self.kind.allowed}"

    def read(self, value: Any) -> Any:
        """Return a value or a list; text in brackets is one, unless a file has that name."""
        bracketed = isinstance(value, str) and value.strip().startswith("[") and not os.path.exists(value)
        values = literal(value) if bracketed else value
        return ListOf(self.kind, 1).read(values) if isinstance(values, (list, tuple)) else self.kind.read(value)


@dataclass(frozen=True)
class Each(Kind):
    """One value for all levels of the network, or a list with one for each."""

    kind: Kind

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return f"{self.kind.allowed}, or a list with one for each level"

    def read(self, value: Any) -> Any:
        """Return a value or a list."""
        values = literal(value)
        return ListOf(self.kind, 1).read(values) if isinstance(values, (list, tuple)) else self.kind.read(values)


@dataclass(frozen=True)
class Regions(Kind):
    """What each channel of the mask holds."""

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return 'names with lists of label values, such as {"disc": [1, 2], "cup": [2]}'

    def read(self, value: Any) -> dict[str, list[int]]:
        """Return names with their label values."""
        regions, labels = literal(value), ListOf(Whole(1, 65535), 1)
        if not isinstance(regions, Mapping) or not regions or not all(isinstance(n, str) and n for n in regions):
            raise ValueError
        return {name: labels.read(values) for name, values in regions.items()}


@dataclass(frozen=True)
class Transforms(Kind):
    """MONAI's transforms, as a config has them."""

    @property
    def allowed(self) -> str:
        """What is allowed, in a few words."""
        return "a list of MONAI's dictionary transforms"

    def read(self, value: Any) -> list[Any]:
        """Return the list; the transforms themselves are made later."""
        transforms = literal(value)
        if not isinstance(transforms, (list, tuple)) or not all(map(self._is_transform, transforms)):
            raise ValueError
        return list(transforms)

    @staticmethod
    def _is_transform(value: Any) -> bool:
        if isinstance(value, Mapping):
            return "_target_" in value
        return callable(value) or (isinstance(value, str) and value.startswith(("@", "$")))
