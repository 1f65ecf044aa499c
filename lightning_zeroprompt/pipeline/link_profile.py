# SPDX-License-Identifier: Apache-2.0
"""How long messages and collectives take on a machine, alone and beside computations.

Transfers of two sizes give latency and bandwidth. On a GPU they are then run beside matrix products on a stream of
their own, which last longer: how many times as long the larger one takes now is its ``slowdown``, and how many times as
long products take while it runs its ``contention``. Differences between the two sizes count, since ranks and hosts are
never quite together. Copy engines leave products alone; NCCL's kernels take multiprocessors from them.

Alternatives: a collective's own benchmark (nccl-tests) knows nothing of computations; fitting all four numbers to
recorded steps mixes them with the schedule's waits.

Cost: some 30 transfers, a few tens of milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zeroprompt.pipeline.costs import Link
from lightning_zeroprompt.pipeline.torch_compat import keep_busy

__all__ = ["measure_link", "slowest_link"]

_SIDE = 4096
"""Rows and columns of the matrices multiplied beside transfers."""
_LAUNCH = 2e-3
"""Seconds that a GPU is kept busy, in which its host launches what is timed."""
_MOST = 0.9
"""Of its time that a computation can lose to a transfer: more than that is noise."""


def measure_link(
    transfer: Callable[[Tensor], Any], device: torch.device, sizes: tuple[int, int] = (2**16, 2**26), repeats: int = 9
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
    least, most = (
        _beside(transfer, torch.zeros(size, dtype=torch.uint8, device=device), large, repeats) for size in sizes
    )
    moved = max(most[0] - least[0], 1e-9)
    return Link(
        latency,
        bandwidth,
        slowdown=max(1.0, moved / max(large - small, 1e-9)),
        contention=1 / (1 - min(max(0.0, most[1] - least[1]) / moved, _MOST)),
    )


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
            first, last = _events()
            keep_busy(_LAUNCH)
            first.record()
            transfer(tensor)
            last.record()
            times.append(_seconds(first, last))
        else:
            begin = time.perf_counter()
            transfer(tensor)
            times.append(time.perf_counter() - begin)
        if not run:
            times.clear()
    return times


def _beside(transfer: Callable[[Tensor], Any], tensor: Tensor, seconds: float, repeats: int) -> tuple[float, float]:
    """Seconds of a transfer beside products, and how much longer these take for it."""
    device = tensor.device
    factor = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(factor)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(times: int, *, beside: bool) -> tuple[float, float]:
        """Seconds of the transfer and of products."""
        begun, ended = _events()
        first, last = _events()
        _together(device)
        keep_busy(_LAUNCH)
        stream.wait_stream(torch.cuda.current_stream(device))
        first.record()
        if beside:
            transfer(tensor)
        last.record()
        with torch.cuda.stream(stream):
            begun.record()
            for _ in range(times):
                torch.mm(factor, factor, out=product)
            ended.record()
        return _seconds(first, last), _seconds(begun, ended)

    run(3, beside=False)
    # Long enough for a transfer that is three times as slow, and not so long that the loss is lost in their noise.
    count = 10 + int(3 * seconds / (run(10, beside=False)[1] / 10))
    alone = [run(count, beside=False)[1] for _ in range(repeats)]
    moved, products = zip(*(run(count, beside=True) for _ in range(repeats)), strict=True)
    return statistics.median(moved), statistics.median(products) - statistics.median(alone)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return first, last


def _seconds(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
