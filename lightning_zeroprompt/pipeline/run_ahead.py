# SPDX-License-Identifier: Apache-2.0
"""A GPU kept at work by a host that launches ahead of it: what its computations take, without gaps between launches.

Phases are launched one after another, as often as wanted, with an event on each side. A phase counts if the GPU had not
come to it when the host was through with launching it: then the GPU never waited for its host within. A host that
has fallen behind keeps the GPU busy with nothing for a moment, and is ahead again.

Alternatives: a CUDA graph has no gaps either, but not every block can be captured; matrix products that fill the time
in which the host launches draw more power than most models, so that clocks fall too low.

Cost: two events a phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_zeroprompt.pipeline.torch_compat import keep_busy

__all__ = ["LONGEST_BUSY", "Span", "mark", "reached", "run_ahead", "seconds_between"]

LONGEST_BUSY = 0.1
"""Seconds that a GPU is kept waiting for its host's launches at most."""


@dataclass(frozen=True, slots=True)
class Span:
    """One run of a phase.

    Attributes:
        phase: Its number.
        begin: Reached when the GPU begins with it.
        end: Reached when it is done.
        host: Seconds in which the host launched it; longer where it waited for the GPU, since it was far ahead.
        ahead: Whether the host was through before the GPU began.
    """

    phase: int
    begin: torch.cuda.Event
    end: torch.cuda.Event
    host: float
    ahead: bool

    @property
    def seconds(self) -> float:
        """Once it is done."""
        return seconds_between(self.begin, self.end)


def run_ahead(
    phases: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 1,
    seconds: float = 0.0,
    beside: Callable[[], Any] = lambda: None,
) -> list[Span]:
    """Run phases round after round on a GPU, and wait for it.

    Args:
        phases: Each launches something; they rely on the ones before them.
        device: The GPU.
        rounds: At least so many.
        seconds: And for at least so long.
        beside: Called before every phase, to launch something on other streams.

    Returns:
        All runs, in order.
    """
    torch.cuda.synchronize(device)
    spans = []
    begun, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begun < seconds:
        for index, phase in enumerate(phases):
            beside()
            begin, launching = mark(), time.perf_counter()
            phase()
            host = time.perf_counter() - launching
            ahead = not reached(begin)
            spans.append(Span(index, begin, mark(), host, ahead))
            if not ahead:
                keep_busy(min(2 * host, LONGEST_BUSY))
        done += 1
    torch.cuda.synchronize(device)
    return spans


def mark() -> torch.cuda.Event:
    """An event that the current stream has just been given."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def reached(event: torch.cuda.Event) -> bool:
    """Whether its stream has come to it."""
    return bool(event.query())  # type: ignore[no-untyped-call]


def seconds_between(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    """Of two events that have been reached; negative where the last came first."""
    return float(first.elapsed_time(last)) / 1e3
