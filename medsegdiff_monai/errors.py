"""One clear message for what users can put right themselves."""

from __future__ import annotations

import sys
from types import TracebackType

__all__ = ["InputError", "show_input_errors_plainly"]


class InputError(ValueError):
    """Bad input: names the file or key, the value and the remedy."""


def _input_error(error: BaseException | None) -> InputError | None:
    """The ``InputError`` that a config parser or an engine wrapped into other exceptions, if any."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def show_input_errors_plainly() -> None:
    """Let an uncaught :class:`InputError` end the process with its message alone, without the traceback.

    ``monai.bundle`` wraps errors several times; the reader would find the one sentence that matters in the middle of
    a long traceback. Anything else is shown as before.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        found = _input_error(error)
        if found is None:
            previous(kind, error, traceback)
        else:
            print(f"\nerror: {found}", file=sys.stderr)

    if getattr(previous, "__module__", None) != __name__:
        sys.excepthook = hook
