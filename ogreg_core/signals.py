"""Stopping politely: the first signal asks, the second insists."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from ogreg_core.errors import Interrupted

__all__ = ["StopRequest"]

_ASKED_TO_STOP = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


class StopRequest:
    """While active, turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a flag; a second one a second later
    raises.

    Use as a context manager; ``number`` is the signal received, 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # Terminals and launchers may deliver the same interrupt twice.
        if self.number and time.monotonic() - self._since > 1.0:
            raise Interrupted("stopped at once; what was saved before stays", signal_number=number)
        if not self.number:
            self.number = number
            self._since = time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in _ASKED_TO_STOP:
            if signal.getsignal(number) is signal.SIG_IGN:
                # nohup wants the work to outlive its terminal.
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                # Not in the main thread: whoever runs us there handles signals.
                break
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
