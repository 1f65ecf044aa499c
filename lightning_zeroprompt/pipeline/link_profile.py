# SPDX-License-Identifier: Apache-2.0
"""How long messages and collectives take on a machine, alone and beside computations.

Transfers of two sizes give latency and bandwidth. On a GPU they then run beside the model's own computations, which
the host launches ahead: how many times as long a transfer takes now is the link's ``slowdown``, and how many
times as long computations take while it runs its ``contention``. Copy engines leave computations alone; NCCL's kernels
take multiprocessors from them.

Alternatives: a collective's own benchmark (nccl-tests) knows nothing of computations; fitting all four numbers to
recorded steps mixes them with the schedule's waits. What computations lose depends on how many waves of tiles their
kernels are: products of 4096 x 4096 lost 1.64 x to gathers through the host's memory, and a step was predicted 21 %
too long (benchmarks/RESULTS.md). One transfer beside one layer is over within a slow host's gaps between launches.

Cost: some 20 transfers alone, and 24 rounds of computations, half of them beside transfers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zeroprompt.pipeline.costs import Link
from lightning_zeroprompt.pipeline.meters import medians
from lightning_zeroprompt.pipeline.run_ahead import mark, run_ahead, seconds_between
from lightning_zeroprompt.pipeline.torch_compat import keep_busy

__all__ = ["contention", "measure_link", "slowest_link"]

_LAUNCH = 2e-3
"""Seconds that a GPU is kept busy, in which its host launches what is timed."""
_ROUNDS = 12
"""Of computations alone, and beside transfers."""
_WITH_EACH = 4
"""Transfers that are launched with a computation at most, so that the host keeps ahead."""


def measure_link(
    transfer: Callable[[Tensor], Any],
    device: torch.device,
    sizes: tuple[int, int] = (2**16, 2**26),
    repeats: int = 9,
    work: Sequence[Callable[[], Any]] = (),
) -> Link:
    """Measure a link; all ranks of the default group call this together.

    Args:
        transfer: Moves a tensor of bytes and, on a GPU, lets the current stream wait for it.
        device: Where tensors are.
        sizes: Bytes of the two transfers.
        repeats: How often; medians count.
        work: Each launches computations that transfers are measured beside, about a millisecond long; as many on every
            rank. Without any that is left out.

    Returns:
        As seen by this rank. ``slowdown`` and ``contention`` are 1 where there is no GPU or no work.
    """
    small, large = (
        statistics.median(_alone(transfer, torch.zeros(size, dtype=torch.uint8, device=device), repeats))
        for size in sizes
    )
    bandwidth = (sizes[1] - sizes[0]) / max(large - small, 1e-9)
    latency = max(0.0, small - sizes[0] / bandwidth)
    if device.type != "cuda" or not work:
        return Link(latency, bandwidth)
    beside, lost = _beside(transfer, torch.zeros(sizes[1], dtype=torch.uint8, device=device), large, work)
    return Link(latency, bandwidth, max(1.0, (beside - latency) / max(large - latency, 1e-9)), lost)


def slowest_link(links: list[Link]) -> Link:
    """Of what the ranks of a transfer have measured, the worst of each.

    Args:
        links: At least one.

    >>> slowest_link([Link(1e-5, 2e9), Link(2e-5, 3e9, slowdown=1.5)])
    Link(latency=2e-05, bandwidth=2000000000.0, slowdown=1.5, contention=1.0, host=0.0, host_tensor=0.0, copy=0.0)
    """
    names = [entry.name for entry in fields(Link)]
    worst = {name: (min if name == "bandwidth" else max)(getattr(link, name) for link in links) for name in names}
    return Link(**worst)


def _together(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _alone(transfer: Callable[[Tensor], Any], tensor: Tensor, repeats: int) -> list[float]:
    times = []
    for run in range(repeats + 1):
        _together(tensor.device)
        if tensor.device.type == "cuda":
            keep_busy(_LAUNCH)
            begin = mark()
            transfer(tensor)
            end = mark()
            end.synchronize()
            times.append(seconds_between(begin, end))
        else:
            launching = time.perf_counter()
            transfer(tensor)
            times.append(time.perf_counter() - launching)
        if not run:
            times.clear()
    return times


def _beside(
    transfer: Callable[[Tensor], Any], tensor: Tensor, seconds: float, work: Sequence[Callable[[], Any]]
) -> tuple[float, float]:
    """Seconds of a transfer beside work, and how many times as long that takes for it."""
    device = tensor.device
    _together(device)
    alone = medians(run_ahead(work, device, rounds=_ROUNDS), len(work))
    known = [each.seconds for each in alone if each is not None]
    each = statistics.median(known) if known else seconds
    share = _most(min(_WITH_EACH, math.ceil(each / seconds)), device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    transfers: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def launch() -> None:
        # Transfers begin no sooner than the computation that they are launched with, however far ahead the host is.
        # There are always some that wait, so that none waits for the other ranks.
        stream.wait_event(mark())
        with torch.cuda.stream(stream):
            for _ in range(share):
                begin = mark()
                transfer(tensor)
                transfers.append((begin, mark()))

    _together(device)
    spans = run_ahead(work, device, rounds=_ROUNDS, beside=launch)
    origin = transfers[0][0]
    moved = [(seconds_between(origin, begin), seconds_between(origin, end)) for begin, end in transfers]
    worked = seconds_between(origin, spans[-1].end)
    rested = together = occupied = 0.0
    for span in spans:
        rest = alone[span.phase]
        if span.ahead and rest is not None:
            first, last = seconds_between(origin, span.begin), seconds_between(origin, span.end)
            rested, together = rested + rest.seconds, together + last - first
            occupied += sum(max(0.0, min(stop, last) - max(start, first)) for start, stop in moved)
    beside = [stop - start for start, stop in moved if stop < worked] or [seconds]
    return statistics.median(beside), contention(rested, together, occupied)


def contention(alone: float, together: float, occupied: float) -> float:
    """How many times as long work takes while transfers run, from work beside which they ran a part of the time.

    Args:
        alone: Seconds of the work without transfers.
        together: Of the same work with transfers.
        occupied: Seconds of these in which transfers ran.

    Returns:
        At least 1, and at most 10: more than that is noise.

    >>> contention(alone=2.0, together=2.5, occupied=1.5)
    1.5
    """
    progress = alone - (together - occupied)
    return max(1.0, occupied / max(progress, 0.1 * occupied, 1e-9))


def _most(count: int, device: torch.device) -> int:
    """Of all ranks' numbers."""
    if not dist.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
