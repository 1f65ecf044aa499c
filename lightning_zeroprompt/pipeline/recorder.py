# SPDX-License-Identifier: Apache-2.0
"""Measures one step of one rank: when tasks start and end, and what the rank waits for between them.

On a GPU a mark is a CUDA event on the stream that computes, so that times are those at which the work ran, not those
at which the host launched it: the stream's wait for a message starts when the task before has ended and ends when the
message is there. On a CPU marks are the host's clock, which is the same thing there.

Off by default: the executor asks ``if recorder is not None`` around tasks. A recorded step starts with a barrier and
ends with a synchronisation; a mark takes some microseconds.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_zeroprompt.pipeline.schedule import Task
from lightning_zeroprompt.pipeline.timeline import Cause, Lane, TaskSpan, WaitSpan

__all__ = ["StepRecorder", "peak_bytes"]

Mark = float | torch.cuda.Event


class StepRecorder:
    """Records one step; see the module's text.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._host_start = 0.0
        self._start: Mark = 0.0
        self._tasks: list[tuple[Task, Mark, Mark]] = []
        self._waits: list[tuple[Cause, Mark, Mark]] = []
        self._task: tuple[Task, Mark] | None = None
        self._lane: Lane | None = None

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def start(self) -> None:
        """Wait for all ranks, and set this rank's time to 0; all ranks of the world call this together."""
        dist.all_reduce(torch.zeros(1, device=self._device))
        self._synchronize()
        self._start = self._mark()
        self._host_start = time.perf_counter()

    def begin(self, task: Task) -> None:
        """A task begins; waits until ``end`` come before its computation."""
        self._task = task, self._mark()

    def end(self) -> None:
        """The task ends."""
        if self._task is not None:
            self._tasks.append((*self._task, self._mark()))
            self._task = None

    @contextmanager
    def waiting(self, cause: Cause) -> Iterator[None]:
        """The rank waits, at the start of a task or between two."""
        begun = self._mark()
        yield
        ended = self._mark()
        self._waits.append((cause, begun, ended))
        if self._task is not None:
            self._task = self._task[0], ended

    def stop(self) -> None:
        """End the step, and wait for the device to have done it."""
        self._synchronize()
        self._lane = Lane(
            tuple(TaskSpan(task, self._seconds(first), self._seconds(last)) for task, first, last in self._tasks),
            tuple(WaitSpan(cause, self._seconds(first), self._seconds(last)) for cause, first, last in self._waits),
            peak_bytes(self._device),
        )

    def result(self) -> tuple[str, float, Lane] | None:
        """This machine's name, its clock at the lane's 0, and the lane (see ``align``); None where no step ended."""
        return None if self._lane is None else (socket.gethostname(), self._host_start, self._lane)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark - float(self._start)  # type: ignore[arg-type]
        return float(self._start.elapsed_time(mark)) / 1e3  # type: ignore[union-attr]


def peak_bytes(device: torch.device) -> int | None:
    """Most memory so far: what torch allocated on a GPU, what this process had resident on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
