# SPDX-License-Identifier: Apache-2.0
"""Pipeline schedules as data: what every rank does, in which order, and nothing about how.

A model is cut into P * V *stages*; each of P ranks holds V of them. A step's batch is cut into M *micro-batches*. For
every stage and micro-batch there are three tasks: F (forward), B (gradient of the stage's input) and W (gradients of
its weights). B waits for the B of the stage behind, F for the F of the stage before, W only for its own B: that
freedom is what fills a pipeline's bubbles. A full backward pass is a B with its W right behind.

ZeroPP [1]_ adds the *unit*: U micro-batches run through F, B and W of all stages together. Weights that FSDP keeps
sharded are then gathered for a *phase* (the same-kind tasks of one stage in one unit) instead of for every
micro-batch, and gradients are reduced once a unit. Everything is explicit in a rank's list: GATHER, RELEASE, REDUCE
and, once ``add_transfers`` has run, sends and receives.

Choices: lists are plain tuples made by pure functions, so that the same object is executed, simulated, drawn and
compared; the alternatives (a schedule as a loop over ranks' state, as Megatron-LM has it, or one class a schedule) can
only be run.

References:
    .. [1] Tang et al., *ZeroPP: Adaptive Blockwise Task-interleaved Pipeline Parallelism*, arXiv 2402.03791.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["Kind", "Placement", "Schedule", "Task", "parse_tasks", "units_of"]


class Kind(StrEnum):
    """What a task does; the value is how it is written, as in ``F1.0`` (stage 1, micro-batch 0) or ``AG1``."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradient of the stage's input; gradients of weights that cannot be deferred are made here too."""
    WEIGHT = "W"
    GATHER = "AG"
    RELEASE = "RSH"
    REDUCE = "RS"
    SEND_F = "SF"
    """Stage ``s`` sends its output to stage ``s + 1``."""
    RECV_F = "RF"
    """Stage ``s`` receives its input from stage ``s - 1``."""
    SEND_B = "SB"
    """Stage ``s`` sends the gradient of its input to stage ``s - 1``."""
    RECV_B = "RB"
    """Stage ``s`` receives the gradient of its output from stage ``s + 1``."""


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT})
COLLECTIVE = frozenset({Kind.GATHER, Kind.RELEASE, Kind.REDUCE})
TRANSFER = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One entry of a rank's list.

    Attributes:
        kind: What is done.
        stage: The stage that it is done for, counted over the whole pipeline from 0.
        micro_batch: The micro-batch, from 0; -1 for gathers, releases and reductions, which concern a stage.
    """

    kind: Kind
    stage: int
    micro_batch: int = -1

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}" + (f".{self.micro_batch}" if self.micro_batch >= 0 else "")


def parse_tasks(text: str) -> tuple[Task, ...]:
    """Read tasks from how they are written.

    Args:
        text: Tasks between white space, such as ``"AG0 F0.0 F0.1 RSH0"``.

    Raises:
        ValueError: If a word is no task.

    >>> parse_tasks("AG0 F0.1")
    (Task(kind=<Kind.GATHER: 'AG'>, stage=0, micro_batch=-1), Task(kind=<Kind.FORWARD: 'F'>, stage=0, micro_batch=1))
    """
    tasks = []
    for word in text.split():
        letters = word.rstrip("0123456789.")
        stage, _, micro_batch = word[len(letters) :].partition(".")
        try:
            task = Task(Kind(letters), int(stage), int(micro_batch) if micro_batch else -1)
        except ValueError:
            raise ValueError(f"{word!r} is no task; tasks are written like F1.0, B1.0, W1.0, AG1, RSH1, RS1") from None
        if (task.kind in COLLECTIVE) != (task.micro_batch < 0):
            raise ValueError(f"{word!r} is no task; {task.kind} {'has no' if micro_batch else 'needs a'} micro-batch")
        tasks.append(task)
    return tuple(tasks)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rank holds which stages.

    Attributes:
        ranks: P, pipeline ranks.
        stages_per_rank: V.
        vshape: Stages run down the ranks and up again (so that neighbours meet on one rank) instead of starting over
            at rank 0.

    >>> [Placement(2, 2).rank_of(s) for s in range(4)], [Placement(2, 2, vshape=True).rank_of(s) for s in range(4)]
    ([0, 1, 0, 1], [0, 1, 1, 0])
    """

    ranks: int
    stages_per_rank: int
    vshape: bool = False

    def __post_init__(self) -> None:
        for name, value in (("ranks", self.ranks), ("stages_per_rank", self.stages_per_rank)):
            if value < 1:
                raise ValueError(f"{name}={value}: a pipeline needs at least 1")

    @property
    def stages(self) -> int:
        """P * V."""
        return self.ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        turn, position = divmod(stage, self.ranks)
        return self.ranks - 1 - position if self.vshape and turn % 2 else position

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The V stages of a rank, ascending."""
        return tuple(
            turn * self.ranks + (self.ranks - 1 - rank if self.vshape and turn % 2 else rank)
            for turn in range(self.stages_per_rank)
        )

    def crosses(self, stage: int) -> bool:
        """Whether the output of ``stage`` goes to another rank."""
        return stage + 1 < self.stages and self.rank_of(stage) != self.rank_of(stage + 1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank does in one training step.

    Attributes:
        name: As ``build_schedule`` knows it.
        placement: Stages to ranks.
        micro_batches: M.
        unit: U; gradients are reduced once a unit.
        resident: K, the number of a rank's stages whose weights are gathered at any time.
        tasks: For each rank its tasks, in order.
    """

    name: str
    placement: Placement
    micro_batches: int
    unit: int
    resident: int
    tasks: tuple[tuple[Task, ...], ...]

    @property
    def ranks(self) -> int:
        """P."""
        return self.placement.ranks

    @property
    def stages(self) -> int:
        """P * V."""
        return self.placement.stages

    def with_tasks(self, tasks: Iterable[Iterable[Task]]) -> Schedule:
        """The same schedule with other lists."""
        return replace(self, tasks=tuple(tuple(list_) for list_ in tasks))

    def only(self, kinds: Iterable[Kind]) -> Schedule:
        """The same schedule with the tasks of some kinds alone."""
        kept = frozenset(kinds)
        return self.with_tasks([task for task in tasks if task.kind in kept] for tasks in self.tasks)

    def count(self, kind: Kind, rank: int) -> int:
        """How often ``kind`` stands in the list of ``rank``."""
        return sum(task.kind is kind for task in self.tasks[rank])

    def __str__(self) -> str:
        return "\n".join(f"{rank}: " + " ".join(map(str, tasks)) for rank, tasks in enumerate(self.tasks))


def units_of(micro_batches: int, unit: int) -> Iterator[range]:
    """The units of a step; the last one is short where U does not divide M.

    >>> list(units_of(5, 2))
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    for start in range(0, micro_batches, unit):
        yield range(start, min(start + unit, micro_batches))
