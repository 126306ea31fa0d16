"""The command line: values are what was typed, and help is there at once, since nothing heavy is imported for it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import InputError
from .kinds import Boolean, literal
from .variables import VARIABLES, suggest

__all__ = ["UNSET", "Command", "Parser", "config_files", "main"]

UNSET = argparse.SUPPRESS  # default of an option that is left out of the values where it is not given

PART = re.compile(r"--(\w+(?:(?:#|::)\w+)+)(?:=.*)?", re.DOTALL)  # such as --inferer#overlap


class Command(NamedTuple):
    """A command: what it does, its options, and the function that is called with their values."""

    summary: str
    options: Callable[[Parser], None]
    run: Callable[..., None]


class Parser(argparse.ArgumentParser):
    """Parser of a command, whose errors are one line.

    Args:
        name: of the command.
        summary: what it does.
    """

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(f"{_program()} {name}", description=summary, allow_abbrev=False)
        self.has_variables = False

    def error(self, message: str) -> NoReturn:
        """Say what is wrong.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}: see {self.prog} --help")

    def add_switch(self, name: str, help: str) -> None:
        """Add an option that is true where it has no value."""
        self.add_argument(name, nargs="?", const=True, default=False, type=_switch, help=help, metavar="true|false")

    def add_variables(self, config: str, but: Sequence[str]) -> None:
        """Add an option for each variable of a config, and allow parts of it, such as ``--inferer#overlap``.

        Args:
            config: ``train``, ``evaluate`` or ``inference``.
            but: variables that are options already.
        """
        self.has_variables = True
        group = self.add_argument_group("variables of the config", "and parts of it, such as --inferer#overlap 0.25")
        for name in VARIABLES:
            variable = VARIABLES[name]
            if config in variable.configs and name not in but:
                optional: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(variable.kind, Boolean) else {}
                text = f"{variable.help}; {variable.kind.allowed}".replace("%", "%%")
                group.add_argument(f"--{name}", metavar="VALUE", default=UNSET, help=text, **optional)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the values of the options by their names; those that were not given and have no default are left out.

        Args:
            words: as they were typed; those after ``--`` are no options, whatever they begin with.

        Raises:
            InputError: for options that are unknown, missing, or of the wrong type.
        """
        end = words.index("--") if "--" in words else len(words)
        options, after = words[:end], list(words[end + 1 :])
        for part in dict.fromkeys(match[1] for match in map(PART.fullmatch, options) if match and self.has_variables):
            self.add_argument(f"--{part}", dest=part, type=literal)
        for word in options:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                hint = suggest(name, self._option_string_actions)
                raise InputError(f"{name}: {self.prog} has no such option{hint or f': see {self.prog} --help'}")
        values = vars(self.parse_intermixed_args(options))
        if after and "images" not in values:
            self.error(f"unrecognized arguments: {' '.join(after)}")
        return {**values, **({"images": [*values["images"], *after]} if after else {})}


def _program() -> str:
    return "medsegdiff" if Path(sys.argv[0]).stem == "medsegdiff" else "python -m medsegdiff_monai"


def _switch(text: str) -> bool:
    try:
        return Boolean().read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false") from None


def config_files(text: str) -> list[str]:
    """Read ``FILE``, ``FILE,FILE`` or ``['FILE','FILE']``."""
    if Path(text).is_file():
        return [text]
    files = literal(text) if text.startswith("[") else text.split(",")
    return [str(file) for file in files] if isinstance(files, list) else [text]


def main(commands: Mapping[str, Command], words: Sequence[str]) -> None:
    """Run a command.

    Args:
        commands: by name.
        words: name of the command, and what follows it.

    Raises:
        InputError: for a command or options that are not there.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, commands)) + 2
        print(f"usage: {_program()} COMMAND ...\n")
        print(*(f"  {name:{width}}{command.summary}" for name, command in commands.items()), sep="\n")
        print(f"\nOptions of a command: {_program()} COMMAND --help")
        return
    name, *rest = words
    if name not in commands:
        hint = suggest(name, commands) or f": it has {', '.join(commands)}."
        raise InputError(f"{name}: {_program()} has no such command{hint}")
    parser = Parser(name, commands[name].summary)
    commands[name].options(parser)
    commands[name].run(**parser.read(rest))
