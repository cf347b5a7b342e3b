"""Being told to stop: the first signal is noted and acted upon at the next good moment, the second interrupts."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Note SIGTERM and SIGINT while the block runs, and put back the handlers of before afterwards.

    Only the main thread can watch signals; in another thread nothing is noted. A signal that was ignored stays ignored.
    One that came and was not acted upon, since the block came to its end, goes on to the handler of before.

        with StopSignals() as signals:
            while not signals.received:
                ...  # one step

    Attributes:
        received: the number of the first signal that came, or 0.
        watching: whether the block is running.
    """

    def __init__(self) -> None:
        self.received, self.watching = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received, self.watching = 0, True
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self.watching = False
        if self.received and kind is None:
            signal.raise_signal(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt("a second signal interrupts at once; nothing has been saved since the last save")
        self.received = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing the step, then saving; a second signal interrupts at once\n".encode())


class Told(BaseException):
    """What a run leaves with when a signal has told it to; also KeyboardInterrupt or SystemExit, by the signal."""


class Interrupted(KeyboardInterrupt, Told):
    """SIGINT: a notebook goes on with the model as it is, a script ends as after any Ctrl-C."""


class Terminated(SystemExit, Told):
    """SIGTERM: the program ends with 143, which is 128 + the signal's number."""


def told_by(number: int, step: int, folder: object) -> Told:
    """Print in one line where the run has got to, and return what to raise.

    Args:
        number: of the signal.
        step: optimizer steps done.
        folder: where the run is saved, or None.
    """
    kept = "nothing is saved without a folder" if folder is None else f"go on from {folder} by fit(resume=True)"
    sentence = f"stopped by {signal.Signals(number).name} after step {step}; {kept}"
    print(sentence, flush=True)
    return Interrupted(sentence) if number == signal.SIGINT else Terminated(128 + number)


def ignore_in_worker(_: int) -> None:
    """Give a data worker the usual handlers: its parent decides when it ends, and a Ctrl-C reaches both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
