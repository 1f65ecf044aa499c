# SPDX-License-Identifier: Apache-2.0
"""What FSDP takes around its collectives: the host's time, and copies on the stream that computes.

A gather packs a stage's shards into one buffer and copies every weight out of another; a reduction packs all gradients.
Both walk over the stage's tensors in Python. Stages of one small tensor and of many give the host's time of a call and
of a tensor; what packing one large tensor takes on the computing stream gives the seconds a byte that is copied.

Alternatives: a recorded step has the copies in its waits and the host in its gaps, where nothing tells them apart from
a slow link or a slow block. Without these times the simulator took a step of FSDP on two ranks for 17 to 26 % shorter
than it was (benchmarks/RESULTS.md).

Cost: some 40 gathers and reductions, a few tens of milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import UnshardHandle, fully_shard

from lightning_zeroprompt.pipeline.costs import Link
from lightning_zeroprompt.pipeline.torch_compat import finish_reductions, gather_stage, keep_busy, reduce_gradients

__all__ = ["measure_sharding"]

_MANY = 32
"""Tensors of the stage that has many."""
_SMALL, _LARGE = 64, 8192
"""Rows and columns of its tensors, and of the large one."""
_BUSY = 2e-2
"""Seconds that a GPU is kept busy, in which its host launches what is timed."""


def measure_sharding(
    gather: Link, reduce: Link, device: torch.device, mesh: DeviceMesh, dtype: torch.dtype, repeats: int = 7
) -> tuple[Link, Link]:
    """Add FSDP's own times to what its collectives take; all ranks of the mesh call this together.

    Args:
        gather: Of bare gathers; see :mod:`link_profile`.
        reduce: Of bare reductions.
        device: Where tensors are.
        mesh: Ranks that share weights.
        dtype: Of weights and gradients.
        repeats: How often; medians count.

    Returns:
        Both links with ``host``, ``host_tensor`` and, on a GPU, ``copy``, as seen by this rank.
    """
    one, many = (_times(device, mesh, dtype, count, _SMALL, repeats) for count in (1, _MANY))
    large = _times(device, mesh, dtype, 1, _LARGE, repeats) if device.type == "cuda" else one
    packed = (_LARGE**2 - _SMALL**2) * dtype.itemsize
    links = []
    for index, (link, size) in enumerate(((gather, packed / mesh.size()), (reduce, packed))):
        each = max(0.0, (many[index][0] - one[index][0]) / (_MANY - 1))
        copy = max(0.0, large[index][1] - one[index][1]) / size
        links.append(replace(link, host=max(0.0, one[index][0] - each), host_tensor=each, copy=copy))
    return links[0], links[1]


_Times = tuple[float, float]
"""Seconds of the host, and of the computing stream up to where the collective begins."""


def _times(
    device: torch.device, mesh: DeviceMesh, dtype: torch.dtype, count: int, side: int, repeats: int
) -> tuple[_Times, _Times]:
    """Of a gather, its release included, and of a reduction."""
    layers = [nn.Linear(side, side, bias=False, device=device, dtype=dtype) for _ in range(count)]
    row = nn.Sequential(*layers)
    stage = fully_shard(row, mesh=mesh, reshard_after_forward=False)
    stage.set_reshard_after_backward(False)
    gather_stage(stage)
    stage.reshard()
    gathers, reductions = [], []
    handles: list[UnshardHandle | None] = []
    for _ in range(repeats):
        launch, packed = _once(lambda: handles.append(stage.unshard(async_op=True)), device)
        begin = time.perf_counter()
        handle = handles.pop()
        if handle is not None:
            handle.wait()
        waited = time.perf_counter() - begin
        for parameter in row.parameters():
            parameter.grad = torch.zeros_like(parameter)
        reductions.append(_once(lambda: reduce_gradients(stage), device))
        finish_reductions(stage)
        begin = time.perf_counter()
        stage.reshard()
        gathers.append((launch + waited + time.perf_counter() - begin, packed))
        for parameter in row.parameters():
            parameter.grad = None
    return _medians(gathers), _medians(reductions)


def _once(run: Callable[[], object], device: torch.device) -> _Times:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin, 0.0
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    keep_busy(_BUSY)
    first.record()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    last.record()
    last.synchronize()
    return host, first.elapsed_time(last) / 1e3


def _medians(times: list[_Times]) -> _Times:
    hosts, streams = zip(*times, strict=True)
    return statistics.median(hosts), statistics.median(streams)
