"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

__all__ = ["replacing", "write_atomically", "writing"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path ``.<name>.<process>.tmp`` to write to; it takes the place of ``path`` in the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Say plainly where an output that the user has named cannot be written.

    Raises:
        InputError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error}): make room for it, or choose another --output."
        ) from error
