"""Files that are whole or not there, and folders that one run has to itself."""

from __future__ import annotations

import atexit
import errno
import glob
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["append", "lock_folder", "remove_leftovers", "replacing", "unlock_folder", "write_atomically", "writing"]

LOCK = ".lock"


def _cannot_write(path: Path, error: OSError) -> InputError:
    """What the user reads of a full disk, a folder that is read-only, or a file in the place of a folder."""
    other = None if error.filename is None else Path(error.filename)
    near = other is None or other.is_relative_to(path.parent) or path.is_relative_to(other)
    reason = error.strerror if near and error.strerror else str(error)
    return InputError(
        f"{path}: cannot be written ({reason}): make room for it, or choose another folder. Existing files are kept."
    )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path ``.<name>.<process>.tmp`` to write to; it takes the place of ``path`` in the end.

    Raises:
        InputError: where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader never sees half of it.

    Raises:
        InputError: where it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def append(path: str | Path, content: bytes) -> None:
    """Add all of a text to a file, or nothing.

    Raises:
        InputError: where it cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise _cannot_write(Path(path), error) from error


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Say plainly where an output that the user has named cannot be written, and clear away what a killed run left.

    Raises:
        InputError: in place of an ``OSError``.
    """
    try:
        remove_leftovers(Path(output).parent, glob.escape(Path(output).name))
        yield
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error}): make room for it, or choose another --output."
        ) from error


def remove_leftovers(folder: str | Path, pattern: str = "*") -> None:
    """Remove temporary files of a run that was killed while it wrote, in a folder and two levels below.

    Args:
        folder: folder in which no other process writes such files.
        pattern: of the names of the files that were written.
    """
    for below in ("", "*/", "*/*/"):
        for path in Path(folder).glob(f"{below}.{pattern}.*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


_held: dict[Path, list[int]] = {}  # descriptor of the lock, times that it was taken, and process that did


def lock_folder(folder: str | Path) -> None:
    """Take a folder for this process, which may do so again, until :func:`unlock_folder` or its end, however it ends.

    The operating system keeps the lock, so that none outlives its process. The file ``.lock`` says who has it.

    Raises:
        InputError: where another process has the folder, or nothing can be written there.
    """
    file = Path(folder).resolve() / LOCK
    if file in _held and _held[file][2] == os.getpid():
        _held[file][1] += 1
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file)
        os.truncate(descriptor, 0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
    except OSError as error:
        raise _cannot_write(file.parent, error) from error
    _held[file] = [descriptor, 1, os.getpid()]


def _locked(file: Path) -> int:
    """Open and lock a file; returns its descriptor."""
    while True:
        # no other part of this process may open the file: to close it would give the lock away
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(descriptor, 300).decode("utf-8", "replace") or "another process"
                os.close(descriptor)
                raise InputError(
                    f"{file.parent}: {holder}, is writing there: wait until it ends, or choose another folder."
                ) from error
            # else this file system knows no locks, and nothing keeps two runs apart
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        os.close(descriptor)  # its last holder has just removed it


def unlock_folder(folder: str | Path) -> None:
    """Give a folder free that :func:`lock_folder` took, once for each time that it was taken."""
    file = Path(folder).resolve() / LOCK
    if file in _held and _held[file][2] == os.getpid():
        _held[file][1] -= 1
        if _held[file][1] == 0:
            _release(file)


def _release(file: Path) -> None:
    descriptor = _held.pop(file)[0]
    with suppress(OSError):
        file.unlink()
    os.close(descriptor)


@atexit.register
def _release_all() -> None:
    for file in [file for file, (_, _, process) in _held.items() if process == os.getpid()]:
        _release(file)
