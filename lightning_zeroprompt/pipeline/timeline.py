# SPDX-License-Identifier: Apache-2.0
"""When every rank did what in one step, measured or simulated, and what can be said from it.

Times are seconds from the step's start, on one clock for all ranks. A rank computes one task at a time; between tasks
it is idle, and waits say why as far as that is known. What is left over is *end* (behind the rank's last task, until
the last rank is done) and *other* (the host was late with launching work, or the reason was not recorded).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from lightning_zeroprompt.pipeline.schedule import Task

__all__ = ["Cause", "Lane", "TaskSpan", "Timeline", "WaitSpan", "align"]

_ROUNDING = 1e-6
"""Seconds by which measured spans may seem to overlap: the resolution of GPU events is 0.5 microseconds."""


class Cause(StrEnum):
    """What an idle rank waits for."""

    RECEIVE = "receive"
    """The input of a task, from when the task could have started until it arrived."""
    GATHER = "gather"
    """A stage's weights."""
    REDUCE = "reduce"
    """A reduction of gradients."""


@dataclass(frozen=True, slots=True)
class TaskSpan:
    """A task that was computed.

    Attributes:
        task: An F, B or W.
        start: Seconds.
        end: Seconds.
    """

    task: Task
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class WaitSpan:
    """A wait whose cause is known.

    Attributes:
        cause: What was waited for.
        start: Seconds.
        end: Seconds.
    """

    cause: Cause
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Lane:
    """One rank's part of a timeline.

    Attributes:
        tasks: In the order in which they ran.
        waits: Likewise; none overlaps a task.
        peak_bytes: Most memory that the rank held, where it is known.
    """

    tasks: tuple[TaskSpan, ...]
    waits: tuple[WaitSpan, ...] = ()
    peak_bytes: int | None = None

    @property
    def busy(self) -> float:
        """Seconds in tasks."""
        return sum(span.end - span.start for span in self.tasks)

    @property
    def spans(self) -> list[TaskSpan | WaitSpan]:
        """Tasks and waits in the order of their starts."""
        spans: list[TaskSpan | WaitSpan] = [*self.tasks, *self.waits]
        return sorted(spans, key=lambda span: (span.start, span.end))

    @property
    def end(self) -> float:
        """When the last task or wait ended."""
        return max((span.end for span in self.spans), default=0.0)

    def waited(self, cause: Cause) -> float:
        """Seconds in waits of one cause."""
        return sum(span.end - span.start for span in self.waits if span.cause is cause)

    def shifted(self, seconds: float) -> Lane:
        """The same lane, later."""
        return replace(
            self,
            tasks=tuple(replace(s, start=s.start + seconds, end=s.end + seconds) for s in self.tasks),
            waits=tuple(replace(s, start=s.start + seconds, end=s.end + seconds) for s in self.waits),
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """What all ranks did in one step.

    Attributes:
        lanes: One a rank.

    Raises:
        ValueError: If a span ends before it starts, or two spans of a rank overlap.

    >>> from lightning_zeroprompt.pipeline.schedule import parse_tasks
    >>> f, b = parse_tasks("F0.0 B0.0")
    >>> line = Timeline((Lane((TaskSpan(f, 0, 1), TaskSpan(b, 3, 4)), (WaitSpan(Cause.RECEIVE, 1, 3),)),))
    >>> line.bubble_share, line.idle_shares()["receive"]
    (0.5, 0.5)
    """

    lanes: tuple[Lane, ...]

    def __post_init__(self) -> None:
        for rank, lane in enumerate(self.lanes):
            previous = 0.0
            for span in lane.spans:
                if span.end < span.start or span.start < previous - _ROUNDING:
                    raise ValueError(
                        f"rank {rank}: {span} ends before it starts, or starts before the span ahead of it ended "
                        f"({previous}); a rank does one thing at a time"
                    )
                previous = span.end

    @property
    def duration(self) -> float:
        """Seconds from the step's start to the end of the last rank's last task or wait."""
        return max((lane.end for lane in self.lanes), default=0.0)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time in which they did not compute, from 0 to 1."""
        total = self.duration * len(self.lanes)
        return max(0.0, 1.0 - sum(lane.busy for lane in self.lanes) / total) if total else 0.0

    def idle(self, rank: int) -> dict[str, float]:
        """Seconds in which a rank did not compute, by cause.

        Returns:
            ``receive``, ``gather`` and ``reduce`` (see ``Cause``), ``end`` and ``other``; in sum, all that is not busy.
        """
        lane = self.lanes[rank]
        known = {str(cause): lane.waited(cause) for cause in Cause}
        known["end"] = self.duration - lane.end
        known["other"] = max(0.0, self.duration - lane.busy - sum(known.values()))
        return known

    def idle_shares(self) -> dict[str, float]:
        """The parts of ``bubble_share``, by cause; see ``idle``."""
        total = self.duration * len(self.lanes)
        by_rank = [self.idle(rank) for rank in range(len(self.lanes))]
        names = (*map(str, Cause), "end", "other")
        return {name: sum(idle[name] for idle in by_rank) / total if total else 0.0 for name in names}


def align(lanes: Iterable[tuple[str, float, Lane]]) -> Timeline:
    """Put measured lanes on one clock.

    Ranks of one machine share its clock, so their starts are compared exactly. Between machines only the barrier in
    front of a recorded step is known: the first rank of each machine to leave it is taken to start at 0.

    Args:
        lanes: For each rank the machine's name, the machine's clock at the lane's 0, and the lane.

    >>> from lightning_zeroprompt.pipeline.schedule import Kind
    >>> early, late = (Lane((TaskSpan(Task(Kind.FORWARD, 0, 0), 0.0, 1.0),)) for _ in range(2))
    >>> [lane.end for lane in align([("a", 7.0, early), ("a", 7.5, late), ("b", 90.0, late)]).lanes]
    [1.0, 1.5, 1.0]
    """
    given = list(lanes)
    first: dict[str, float] = {}
    for host, clock, _ in given:
        first[host] = min(clock, first.get(host, clock))
    return Timeline(tuple(lane.shifted(clock - first[host]) for host, clock, lane in given))
