"""What a client reads instead of a result: one line, and the HTTP status that goes with it."""

from __future__ import annotations

from medsegdiff_monai.errors import InputError

__all__ = ["Busy", "Conflict", "NotThere", "Stopped"]


class NotThere(InputError):
    """There is no study, label, model or method of that name."""

    status = 404


class Conflict(InputError):
    """It contradicts what is there."""

    status = 409


class Busy(InputError):
    """It cannot be done now; the same request may succeed later."""

    status = 503


class Stopped(Exception):
    """Whoever asked has gone: nobody needs the result."""
