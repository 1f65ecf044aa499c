# SPDX-License-Identifier: Apache-2.0
"""How long a host takes to walk one entry of a rank's list, besides launching what blocks compute.

The executor runs the same row of small blocks as one stage and as a stage a block. The work is the same; what the host
takes longer is due to the entries that were added. Times are the host's own: it waits for no device.

Alternatives: a profile of the interpreter slows down what it measures; what recorded steps say is the larger of host
and device, task by task.

Cost: some 30 steps of a few milliseconds.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_zeroprompt.pipeline.catalogue import build_schedule
from lightning_zeroprompt.pipeline.executor import MicroBatch, PipelineExecutor
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.schedule import COMPUTE
from lightning_zeroprompt.pipeline.stage import StageModule
from lightning_zeroprompt.pipeline.weight_grad import defer_linears

__all__ = ["measure_host_action"]

_BLOCKS, _MICRO_BATCHES, _WIDTH = 16, 4, 8


def measure_host_action(device: torch.device, group: dist.ProcessGroup, repeats: int = 12) -> float:
    """Measure.

    Args:
        device: Where blocks run.
        group: This rank alone.
        repeats: Steps of each kind; the medians count.

    Returns:
        Seconds an entry, for ``Costs.host_action``; at least 0.

    Raises:
        ValueError: If the group has other ranks.
    """
    if dist.get_world_size(group) != 1:
        raise ValueError(f"a group of {dist.get_world_size(group)} ranks: give one with this rank alone")
    (few, seconds), (many, more) = (_host_seconds(device, group, stages, repeats) for stages in (1, _BLOCKS))
    return max(0.0, (more - seconds) / (many - few))


def _host_seconds(device: torch.device, group: dist.ProcessGroup, stages: int, repeats: int) -> tuple[int, float]:
    """Computations in a step of so many stages, and the seconds in which the host is through with it."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(_WIDTH, _WIDTH)) for _ in range(_BLOCKS)))
    model = nn.Sequential(blocks).to(device)
    chain = find_chain(model)
    defer_linears(model)
    size = _BLOCKS // stages
    modules = {stage: StageModule(chain, stage, (stage * size, (stage + 1) * size), ()) for stage in range(stages)}
    schedule = build_schedule("zeropp", ranks=1, micro_batches=_MICRO_BATCHES, stages_per_rank=stages)
    executor = PipelineExecutor(modules, schedule.placement, group, device)
    batch = torch.zeros(1, _WIDTH, device=device)
    given = [MicroBatch((1, _WIDTH), lambda: chain.capture(lambda: model(batch))) for _ in range(_MICRO_BATCHES)]

    def loss(output: Tensor, index: int) -> Tensor:
        return output.sum()

    times = []
    for run in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        executor.train_step(schedule, given, loss)
        if run > 1:
            times.append(time.perf_counter() - begin)
    return sum(task.kind in COMPUTE for task in schedule.tasks[0]), statistics.median(times)
