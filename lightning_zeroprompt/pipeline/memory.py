# SPDX-License-Identifier: Apache-2.0
"""What a rank will hold: known from its parameters and its list, before anything has run.

An estimate of what is kept on purpose. What blocks use while they run, an allocator's rounding and buffers of
collectives come on top; the size of activations is not known, only how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_zeroprompt.pipeline.schedule import Kind, Schedule

__all__ = ["Held", "most_held"]


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
