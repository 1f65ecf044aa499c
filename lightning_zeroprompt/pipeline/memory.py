# SPDX-License-Identifier: Apache-2.0
"""What a rank will hold: known from its parameters and its list, before anything has run.

What is kept on purpose. An allocator's rounding and buffers of collectives come on top. ``most_held`` counts, for when
the size of activations is not known; ``peak_bytes`` adds up measured sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_zeroprompt.pipeline.costs import BlockCosts
from lightning_zeroprompt.pipeline.schedule import Kind, Schedule, Task

__all__ = ["Held", "most_held", "peak_bytes"]


@dataclass(frozen=True, slots=True)
class Held:
    """The most that a rank holds at once in a step; each maximum is for itself.

    Attributes:
        activations: Activations of one stage for one micro-batch, from F to B.
        weight_inputs: What weight gradients are made of, for one stage and micro-batch, from B to W.
        gathered: Stages whose weights are gathered.
        gradients: Stages with gradients that are not reduced yet.
    """

    activations: int
    weight_inputs: int
    gathered: int
    gradients: int


def most_held(schedule: Schedule, rank: int) -> Held:
    """Walk a rank's list and count.

    Args:
        schedule: One with collectives.
        rank: Position in the pipeline.

    >>> from lightning_zeroprompt.pipeline.catalogue import build_schedule
    >>> most_held(build_schedule("1f1b", ranks=4, micro_batches=8), 0)
    Held(activations=4, weight_inputs=1, gathered=1, gradients=1)
    """
    activations = weight_inputs = 0
    gathered: set[int] = set()
    gradients: set[int] = set()
    most = (0, 0, 0, 0)
    for task in schedule.tasks[rank]:
        if task.kind is Kind.FORWARD:
            activations += 1
        elif task.kind is Kind.BACKWARD:
            activations, weight_inputs = activations - 1, weight_inputs + 1
            gradients.add(task.stage)
        elif task.kind is Kind.WEIGHT:
            weight_inputs -= 1
        elif task.kind is Kind.GATHER:
            gathered.add(task.stage)
        elif task.kind is Kind.RELEASE:
            gathered.discard(task.stage)
        elif task.kind is Kind.REDUCE:
            gradients.discard(task.stage)
        now = activations, weight_inputs, len(gathered), len(gradients)
        most = tuple(map(max, most, now))  # type: ignore[assignment]
    return Held(*most)


def peak_bytes(tasks: Sequence[Task], stages: Sequence[BlockCosts], own: Sequence[int], data_parallel: int) -> int:
    """The most memory that a rank holds at once in a step.

    Allocations follow the order in which the host walks the list, so no times are needed. A step begins without
    gradients. With nothing sharded, those of a stage are made by its first W; else its whole gradients live from its
    first B of a unit to the REDUCE, and shards of them from its first REDUCE on.

    Args:
        tasks: The rank's list; with transfers, receive buffers count too.
        stages: Costs of all stages.
        own: The rank's stages.
        data_parallel: D.

    Returns:
        Bytes.
    """
    shared = data_parallel > 1
    # The state's share of gradients; costs may count none.
    late = {stage: min(stages[stage].gradients, stages[stage].state) / data_parallel for stage in own}
    held = peak = sum(stages[stage].state / data_parallel - late[stage] for stage in own)
    reducing: set[int] = set()
    received: set[tuple[Kind, int, int]] = set()
    for task in tasks:
        kind, stage = task.kind, task.stage
        block = stages[stage]
        after = held
        if kind is Kind.FORWARD:
            # The input was received into a buffer, and is one of the activations from here on.
            if (kind, stage, task.micro_batch) in received:
                held -= stages[stage - 1].output
            held += block.activations
            after, held = held, held + block.workspace
        elif kind is Kind.BACKWARD:
            if shared and stage not in reducing:
                reducing.add(stage)
                held += block.gradients
            after = held - block.activations + block.weight_inputs
            if (kind, stage, task.micro_batch) in received:
                after -= block.output
            held += block.workspace
        elif kind is Kind.WEIGHT:
            # Linear after Linear: each one's gradient comes as what it is made of goes.
            after = held - block.weight_inputs + (0 if shared else late.pop(stage, 0))
            held = max(held, after) + block.workspace
        elif kind is Kind.RECV_F:
            received.add((Kind.FORWARD, stage, task.micro_batch))
            held = after = held + stages[stage - 1].output
        elif kind is Kind.RECV_B:
            received.add((Kind.BACKWARD, stage, task.micro_batch))
            held = after = held + block.output
        elif kind is Kind.GATHER and shared:
            held = after = held + block.parameters
        elif kind is Kind.RELEASE and shared:
            after = held - block.parameters
        elif kind is Kind.REDUCE and shared:
            reducing.discard(stage)
            held += late.pop(stage, 0)
            after = held - block.gradients
        peak = max(peak, held)
        held = after
    return round(peak)
