"""One clear message for what users can put right themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

__all__ = ["InputError", "Interrupted", "reading", "show_input_errors_plainly"]


class InputError(ValueError):
    """Bad input: names the file or key, the value and the remedy."""


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop.

    Args:
        message: what was saved, and how to go on; empty where another process says so.
        code: exit code of the process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__("stopped by the user")
        self.message = message
        self.code = code


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a reader raises into one sentence that names the file.

    Raises:
        InputError: in place of any other exception.
    """
    try:
        yield
    except Exception as error:  # readers raise whatever they like; the file is what matters
        found = find_input_error(error)
        if found is not None:
            raise found from None
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: cannot be read ({reason[-1][:200]}): replace the file, it may be truncated."
        ) from error


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the ``InputError`` that a config parser or an engine wrapped into other exceptions, if any."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def show_input_errors_plainly() -> None:
    """Let an uncaught :class:`InputError` or Ctrl-C end the process with a message alone, without the traceback.

    ``monai.bundle`` wraps errors several times; the reader would find the one sentence that matters in the middle of
    a long traceback. Anything else is shown as before.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        found = find_input_error(error)
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{getattr(error, 'message', 'stopped.')}", file=sys.stderr)
            raise SystemExit(getattr(error, "code", 130))
        if found is None:
            previous(kind, error, traceback)
        else:
            print(f"\nerror: {found}", file=sys.stderr)

    if getattr(previous, "__module__", None) != __name__:
        sys.excepthook = hook
