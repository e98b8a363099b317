"""Decides whether a child that died is started again, and after how long."""

from __future__ import annotations

from collections import deque

_FIRST_S = 0.2
_LONGEST_S = 5.0


class Restarts:
    """The deaths of one child: waits double with each death inside the window, and too many of them end the
    attempts."""

    def __init__(self, *, limit: int = 5, window_s: float = 60.0) -> None:
        self._limit = limit
        self._window_s = window_s
        self._deaths: deque[float] = deque()

    def after_death(self, now: float) -> float | None:
        """Seconds to wait before the next start, or None to give up; `now` is monotonic, in seconds."""
        self._deaths.append(now)
        while self._deaths[0] <= now - self._window_s:
            self._deaths.popleft()
        if len(self._deaths) > self._limit:
            return None
        return min(_FIRST_S * 2.0 ** (len(self._deaths) - 1), _LONGEST_S)
