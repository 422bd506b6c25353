"""When a run must stop in good order: its time limit has passed, or a scheduler sent SIGTERM."""

import signal
import threading
import time


class Stopping:
    """A context in which `reason` turns from None to words once the run has to stop.

    time_limit: minutes from the creation of the object; 0: none.
    """

    def __init__(self, time_limit=0):
        self.time_limit, self.began, self.terminated = time_limit, time.monotonic(), False

    @property
    def reason(self):
        if self.terminated:
            return "by SIGTERM"
        if self.time_limit and time.monotonic() - self.began >= 60 * self.time_limit:
            return f"by its time limit of {self.time_limit:g} minutes"
        return None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():        # elsewhere Python sets no handlers
            self.before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def _terminate(self, number, frame):
        self.terminated = True

    def __exit__(self, *error):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)
