# SPDX-License-Identifier: Apache-2.0
"""TimeBudget: whether the next block of scorings still fits into the time.

Stopping when time is up overshoots by a whole block. So the seconds a scoring that the blocks took so far are used to
say what the next one will take, and a block that would not end in time is not begun. One rank decides for all: clocks
differ, and ranks that stop at different blocks would wait for each other for ever.
"""

import time
from collections.abc import Callable

__all__ = ["TimeBudget"]


class TimeBudget:
    """Seconds for a search; the clock starts when it is made.

    Args:
        seconds: How many.
        reserve: Scorings that are still to be done when the search is over.
        decide: Turns this rank's answer into that of all ranks, such as a broadcast from rank 0.
        now: The clock, in seconds.

    Raises:
        ValueError: No time.
    """

    def __init__(
        self,
        seconds: float,
        *,
        reserve: int = 0,
        decide: Callable[[bool], bool] = bool,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"time_budget={seconds}: give more than 0 seconds, or None for no limit")
        self._reserve, self._decide, self._now = reserve, decide, now
        self._end = now() + seconds
        self._rate = self._seconds = 0.0
        self._scorings = 0

    def allows(self, scorings: int, seconds: float = 0.0) -> bool:
        """Whether so many scorings, and so many seconds of other work, still fit; the same answer on every rank."""
        needed = (scorings + self._reserve) * self._rate + seconds
        return self._decide(self._now() + needed <= self._end)

    def took(self, scorings: int, seconds: float) -> None:
        """Say what a block has taken; the larger of its rate and the mean of all is what the next one is to cost."""
        if scorings:
            self._scorings, self._seconds = self._scorings + scorings, self._seconds + seconds
            self._rate = max(seconds / scorings, self._seconds / self._scorings)

    @property
    def left(self) -> float:
        """Seconds that are left, by this rank's clock; below 0 when time is over."""
        return self._end - self._now()
