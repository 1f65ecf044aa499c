# SPDX-License-Identifier: Apache-2.0
"""How long messages and collectives take on a machine, alone and beside computations.

A transfer of two sizes gives latency and bandwidth. On a GPU the larger one is then run beside matrix products on a
stream of their own, which last longer than it: how many times as long it takes is its ``slowdown``, and how many times
as long they take while it runs its ``contention``. Copy engines leave products alone; NCCL's kernels
take multiprocessors from them.

Alternatives: a collective's own benchmark (nccl-tests) knows nothing of computations; fitting all four numbers to
recorded steps mixes them with the schedule's waits.

Cost: some 30 transfers, a few tens of milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zeroprompt.pipeline.costs import Link

__all__ = ["measure_link", "slowest_link"]

_SIDE = 4096
"""Rows and columns of the matrices multiplied beside transfers."""
_MOST = 0.9
"""Of its time that a computation can lose to a transfer: more than that is noise."""


def measure_link(
    transfer: Callable[[Tensor], Any], device: torch.device, sizes: tuple[int, int] = (2**16, 2**24), repeats: int = 5
) -> Link:
    """Measure a link; all ranks of the transfer call this together.

    Args:
        transfer: Moves a tensor of bytes and, on a GPU, lets the current stream wait for it.
        device: Where tensors are.
        sizes: Bytes of the two transfers.
        repeats: How often; medians count.

    Returns:
        As seen by this rank. ``slowdown`` and ``contention`` are 1 where there is no GPU.
    """
    small, large = (
        statistics.median(_alone(transfer, torch.zeros(size, dtype=torch.uint8, device=device), repeats))
        for size in sizes
    )
    bandwidth = (sizes[1] - sizes[0]) / max(large - small, 1e-9)
    latency = max(0.0, small - sizes[0] / bandwidth)
    if device.type != "cuda":
        return Link(latency, bandwidth)
    tensor = torch.zeros(sizes[1], dtype=torch.uint8, device=device)
    moved, lost = _beside(transfer, tensor, large, repeats)
    alone = large - latency
    return Link(
        latency,
        bandwidth,
        slowdown=max(1.0, (moved - latency) / alone) if alone > 0 else 1.0,
        contention=1 / (1 - min(max(0.0, lost) / moved, _MOST)),
    )


def slowest_link(links: list[Link]) -> Link:
    """Of what the ranks of a transfer have measured, the worst of each.

    Args:
        links: At least one.

    >>> slowest_link([Link(1e-5, 2e9), Link(2e-5, 3e9, slowdown=1.5)])
    Link(latency=2e-05, bandwidth=2000000000.0, slowdown=1.5, contention=1.0)
    """
    return Link(
        max(link.latency for link in links),
        min(link.bandwidth for link in links),
        max(link.slowdown for link in links),
        max(link.contention for link in links),
    )


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
        begin = time.perf_counter()
        transfer(tensor)
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
        if run:
            times.append(time.perf_counter() - begin)
    return times


def _beside(transfer: Callable[[Tensor], Any], tensor: Tensor, seconds: float, repeats: int) -> tuple[float, float]:
    """Seconds of a transfer beside products, and how much longer these take for it."""
    device = tensor.device
    factor = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(factor)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def multiply(times: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            first.record()
            for _ in range(times):
                torch.mm(factor, factor, out=product)
            last.record()
        return first, last

    def took(events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        torch.cuda.synchronize(device)
        return float(events[0].elapsed_time(events[1])) / 1e3

    took(multiply(3))
    # Long enough for a transfer that is three times as slow, and not so long that the loss is lost in their noise.
    count = 10 + int(3 * seconds / (took(multiply(10)) / 10))
    alone, moved, beside = [], [], []
    for run in range(repeats + 1):
        _together(device)
        quiet = took(multiply(count))
        _together(device)
        products = multiply(count)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        transfer(tensor)
        last.record()
        busy = took(products)
        if run:
            alone.append(quiet)
            moved.append(first.elapsed_time(last) / 1e3)
            beside.append(busy)
    return statistics.median(moved), statistics.median(beside) - statistics.median(alone)
