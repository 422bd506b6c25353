"""When a run has to stop early: its time limit has passed, or a scheduler has sent SIGTERM."""

import signal
import threading
import time
from types import FrameType, TracebackType


class Stopping:
    """A context in which `reason` is None until the run has to stop, and then says why.

    time_limit: minutes from the creation of the object; 0: none.
    """

    def __init__(self, time_limit: float = 0):
        self.time_limit, self.start, self.terminated = time_limit, time.monotonic(), False

    @property
    def reason(self) -> str | None:
        if self.terminated:
            return "by SIGTERM"
        if self.time_limit and time.monotonic() - self.start >= 60 * self.time_limit:
            return f"by its time limit of {self.time_limit:g} minutes"
        return None

    def __enter__(self) -> "Stopping":
        # Handlers can be set in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)
