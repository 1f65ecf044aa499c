# SPDX-License-Identifier: Apache-2.0
"""What rank 0 says when a run starts: ranks, cut, schedule, and an estimate of the memory, in a few lines."""

from __future__ import annotations

from lightning_zeroprompt.pipeline.catalogue import SCHEDULES
from lightning_zeroprompt.pipeline.memory import most_held
from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.schedule import Schedule

__all__ = ["describe_cut", "describe_schedule"]


def describe_cut(pipeline: Pipeline) -> list[str]:
    """Ranks, and which blocks went where; known when the model has been cut."""
    layout, placement = pipeline.groups.layout, pipeline.placement
    work = sum(pipeline.stage_costs) or 1.0
    stages = ", ".join(
        (f"{first}-{end - 1}" if end - first > 1 else f"{first}") + f" ({cost / work:.0%})"
        for (first, end), cost in zip(pipeline.cuts, pipeline.stage_costs, strict=True)
    )
    total = sum(p.numel() for p in pipeline.chain.root.parameters())
    replicas = f" ({layout.replicas} replicas)" if layout.replicas > 1 else ""
    copies = f"; rank 0 holds {len(pipeline.copies)} parameters that other ranks hold too" if pipeline.copies else ""
    return [
        f"mesh: {layout.pipeline} pipeline ranks x {layout.data} data-parallel ranks{replicas}",
        f"model: {total:,} parameters, weights {'sharded' if pipeline.sharded else 'whole on their stage'}{copies}",
        f"cut: {len(pipeline.chain)} blocks of {pipeline.chain.name} into {placement.stages} stages, "
        f"{placement.stages_per_rank} a rank, {'V-shaped' if placement.vshape else 'looped'}; "
        f"blocks (share of the estimated work): {stages}",
    ]


def describe_schedule(
    schedule: Schedule, rows: int, pipeline: Pipeline, *, offloaded: bool = False, planned: str = ""
) -> list[str]:
    """The schedule and the memory that it will take; known with the first batch.

    Args:
        schedule: What will run.
        rows: Of this rank's batch.
        pipeline: The model.
        offloaded: Whether shards live in the host's memory.
        planned: What the planner calls it, if it chose it.
    """
    by_rank = [pipeline.state_bytes(rank) for rank in range(schedule.ranks)]
    rank = max(range(schedule.ranks), key=lambda index: sum(by_rank[index]))
    parameters, gradients = by_rank[rank]
    held = most_held(schedule, rank)
    parts = [
        f"parameters {_bytes(parameters)}",
        f"gradients {_bytes(gradients)}",
        f"optimizer {_bytes(2 * gradients)} (Adam's two moments assumed)",
    ]
    where = " in the host's memory" if offloaded else ""
    sharded = ""
    if pipeline.sharded:
        largest = max(pipeline.stage_bytes(stage) for stage in schedule.placement.stages_of(rank))
        sharded = (
            f"; gathered weights of {held.gathered} and whole gradients of {held.gradients} of its stages, "
            f"up to {_bytes(largest)} each"
        )
    most = max(most_held(schedule, each).activations for each in range(schedule.ranks))
    name = f"planned: {planned}" if planned else f"{schedule.name} ({SCHEDULES[schedule.name]})"
    return [
        f"schedule: {name}, {rows} rows in {schedule.micro_batches} micro-batches, units of {schedule.unit}, "
        f"{schedule.resident} of {schedule.placement.stages_per_rank} stages gathered at once",
        f"memory, estimated, pipeline rank {rank}: {', '.join(parts)}{where}{sharded}",
        f"activations: up to {most} on a rank, each of one stage for one micro-batch, of a size not known yet",
    ]


def _bytes(count: float) -> str:
    """As people read it.

    >>> _bytes(5 * 2**30), _bytes(3 * 2**20), _bytes(100)
    ('5.0 GiB', '3.0 MiB', '0.1 KiB')
    """
    for exponent, name in ((30, "GiB"), (20, "MiB")):
        if count >= 2**exponent:
            return f"{count / 2**exponent:.1f} {name}"
    return f"{count / 2**10:.1f} KiB"
