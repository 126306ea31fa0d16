"""How a run begins and ends: with its folder to itself, and plainly where it is stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ignite.engine import Engine, Events

from .distributed import is_main
from .errors import Interrupted
from .files import lock_folder, remove_leftovers, unlock_folder

__all__ = ["RunGuard"]

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class RunGuard:
    """Keep the folder that a run writes to for itself, and say where it is stopped what was saved and how to go on.

    Attach to an engine, before what writes. Of several processes the first one takes the folder for all. Temporary
    files that a killed run has left there are removed.

    Args:
        folder: folder that the run writes to.
        advice: says what to do after Ctrl-C or SIGTERM; without it, these are left to others.
    """

    def __init__(self, folder: str | Path, advice: Callable[[], str] | None = None) -> None:
        self.folder = Path(folder)
        self.advice = advice
        self._previous: dict[signal.Signals, Any] = {}
        self._holds = False

    def attach(self, engine: Engine) -> None:
        """Attach to an engine."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._end)

    def _begin(self, engine: Engine) -> None:
        if is_main():
            lock_folder(self.folder)
            self._holds = True
            remove_leftovers(self.folder)
        if self.advice is not None and threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):  # else a program has its own ways
                    self._previous[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped." if is_main() else "", EXIT_CODES[signal.Signals(number)])

    def _end(self, engine: Engine, *error: BaseException) -> None:
        if error and not engine.has_event_handler(_raise, Events.EXCEPTION_RAISED):
            # after all others; without it, Ignite would take the error for handled
            engine.add_event_handler(Events.EXCEPTION_RAISED, _raise)
        for stop in error:
            if isinstance(stop, Interrupted) and stop.message and self.advice is not None:
                stop.message = f"stopped. {self.advice()}"  # now that what was being written is there
        while self._previous:
            signal.signal(*self._previous.popitem())
        if self._holds:
            self._holds = False
            unlock_folder(self.folder)


def _raise(engine: Engine, error: BaseException) -> None:
    raise error
