# SPDX-License-Identifier: Apache-2.0
"""From an order of computations to a list that can be executed: gathers, releases, reductions, sends and receives.

Both passes are pure and independent of how the order came to be, so every schedule gets blockwise gathering and a
valid order of messages in one way.

* **Weights.** A rank keeps K of its stages gathered. Which stage leaves is decided by Belady's rule (the one used
  again last); it is released right behind its last use, and where K > 1 the next phase's stage is gathered while this
  phase computes. W needs no weights, so it never keeps a stage gathered.
* **Gradients.** A stage's gradients are reduced once a unit, right behind its last W of that unit.
* **Messages.** NCCL matches sends and receives by order alone, and on one stream. All transfers therefore get one
  global order, that of the simulated times at which their tensors exist; each rank's list holds its transfers in that
  order, so whatever the times really are, two ranks never wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from lightning_zeroprompt.pipeline.orders import TYPICAL_COSTS, ListCosts, of_stages
from lightning_zeroprompt.pipeline.schedule import COMPUTE, TRANSFER, Kind, Placement, Schedule, Task

__all__ = ["add_collectives", "add_transfers", "has_transfers", "phases"]

_USES_WEIGHTS = (Kind.FORWARD, Kind.BACKWARD)


def phases(tasks: Sequence[Task]) -> list[tuple[int, int, int]]:
    """Runs of a rank's F and B that use one stage.

    Returns:
        For each run its stage and the positions of its first and last task.

    >>> from lightning_zeroprompt.pipeline.schedule import parse_tasks
    >>> phases(parse_tasks("F0.0 F0.1 F2.0 B2.0 W2.0 B0.0"))
    [(0, 0, 1), (2, 2, 3), (0, 5, 5)]
    """
    runs: list[tuple[int, int, int]] = []
    for position, task in enumerate(tasks):
        if task.kind not in _USES_WEIGHTS:
            continue
        if runs and runs[-1][0] == task.stage:
            runs[-1] = (task.stage, runs[-1][1], position)
        else:
            runs.append((task.stage, position, position))
    return runs


def add_collectives(tasks: Sequence[Task], unit: int, resident: int, prefetch: bool) -> list[Task]:
    """Insert gathers, releases and reductions into one rank's F, B and W.

    Args:
        tasks: The rank's computations, in order.
        unit: U.
        resident: K, the number of stages that may be gathered at once.
        prefetch: Gather the next phase's stage at the start of a phase instead of at its own; needs K of at least 2.

    Returns:
        The computations with AG, RSH and RS between them; as many AG as RSH for every stage.
    """
    runs = phases(tasks)
    before: dict[int, list[Task]] = {}
    after: dict[int, list[Task]] = {}
    gathered: dict[int, int] = {}  # stage -> position of its last use so far

    def next_use(stage: int, run: int) -> int:
        return next((i for i in range(run, len(runs)) if runs[i][0] == stage), len(runs))

    def gather(stage: int, run: int, position: int, keep: tuple[int, ...]) -> None:
        if len(gathered) == resident:
            leaving = max((s for s in gathered if s not in keep), key=lambda s: next_use(s, run))
            after.setdefault(gathered.pop(leaving), []).append(Task(Kind.RELEASE, leaving))
        gathered[stage] = position
        before.setdefault(position, []).append(Task(Kind.GATHER, stage))

    for i, (stage, first, last_) in enumerate(runs):
        if stage not in gathered:
            gather(stage, i, first, keep=(stage,))
        following = runs[i + 1][0] if i + 1 < len(runs) else stage
        if prefetch and resident > 1 and following not in gathered:
            gather(following, i, first, keep=(stage, following))
        gathered[stage] = last_
    for stage, position in gathered.items():
        after.setdefault(position, []).append(Task(Kind.RELEASE, stage))

    left: dict[tuple[int, int], int] = {}
    for task in tasks:
        if task.kind is Kind.WEIGHT:
            left[task.stage, task.micro_batch // unit] = left.get((task.stage, task.micro_batch // unit), 0) + 1
    lowered: list[Task] = []
    for position, task in enumerate(tasks):
        lowered += [*before.get(position, ()), task, *after.get(position, ())]
        if task.kind is Kind.WEIGHT:
            key = task.stage, task.micro_batch // unit
            left[key] -= 1
            if not left[key]:
                lowered.append(Task(Kind.REDUCE, task.stage))
    return lowered


def _message(placement: Placement, task: Task) -> tuple[Task, Task] | None:
    """The send and the receive that carry a task's result to another rank; None where it stays."""
    if task.kind is Kind.FORWARD and placement.crosses(task.stage):
        return Task(Kind.SEND_F, task.stage, task.micro_batch), Task(Kind.RECV_F, task.stage + 1, task.micro_batch)
    if task.kind is Kind.BACKWARD and task.stage > 0 and placement.crosses(task.stage - 1):
        return Task(Kind.SEND_B, task.stage, task.micro_batch), Task(Kind.RECV_B, task.stage - 1, task.micro_batch)
    return None


def inputs_of(placement: Placement, task: Task) -> Task | None:
    """The task whose result a task waits for; None for the first stage's F."""
    if task.kind is Kind.FORWARD:
        return Task(Kind.FORWARD, task.stage - 1, task.micro_batch) if task.stage else None
    if task.kind is Kind.BACKWARD:
        if task.stage == placement.stages - 1:
            return Task(Kind.FORWARD, task.stage, task.micro_batch)
        return Task(Kind.BACKWARD, task.stage + 1, task.micro_batch)
    return Task(Kind.BACKWARD, task.stage, task.micro_batch)


def has_transfers(schedule: Schedule) -> bool:
    """Whether sends and receives are there already."""
    return any(task.kind in TRANSFER for tasks in schedule.tasks for task in tasks)


def add_transfers(schedule: Schedule, costs: ListCosts | Sequence[ListCosts] = TYPICAL_COSTS) -> Schedule:
    """Insert sends and receives.

    Ranks are run in simulated time. When a task ends whose result is needed elsewhere, its send goes behind it and its
    receive to where the receiving rank then is: posted before it is needed, after all that rank did before. Lists are
    right whatever the times are; but NCCL keeps multiprocessors busy while one side of a message waits for the other.

    Args:
        schedule: One with computations, with or without collectives.
        costs: Of all stages, or of each.

    Raises:
        ValueError: If a task waits for one that never comes, naming the ranks' positions.
    """
    placement = schedule.placement
    count, stages = schedule.micro_batches, schedule.stages
    each = of_stages(costs, stages)
    length = {
        Kind.FORWARD: [cost.forward for cost in each],
        Kind.BACKWARD: [cost.backward for cost in each],
        Kind.WEIGHT: [cost.weight for cost in each],
    }
    position = [0] * schedule.ranks
    clock = [0.0] * schedule.ranks
    # By number instead of by task: a task's hash costs more than all else here.
    done = [-1.0] * (2 * stages * count)
    waiting: dict[int, int] = {}
    lists: list[list[Task]] = [[] for _ in range(schedule.ranks)]
    # What has started and is not yet in its list: a result's message goes behind every task that ends earlier.
    ending: list[tuple[float, int, int, Task]] = []
    startable: list[tuple[float, int]] = []

    def offer(rank: int) -> None:
        """Queue a rank's next task by when it can start; one that waits is queued once its input is made."""
        tasks, at = schedule.tasks[rank], position[rank]
        if at == len(tasks):
            return
        task, begin = tasks[at], clock[rank]
        needed = -1
        if task.kind is Kind.FORWARD:
            needed = (task.stage - 1) * count + task.micro_batch if task.stage else -1
        elif task.kind is Kind.BACKWARD:
            last = task.stage == stages - 1
            needed = (task.stage if last else stages + task.stage + 1) * count + task.micro_batch
        elif task.kind is Kind.WEIGHT:
            needed = (stages + task.stage) * count + task.micro_batch
        if needed >= 0:
            if done[needed] < 0:
                waiting[needed] = rank
                return
            begin = max(begin, done[needed])
        heappush(startable, (begin, rank))

    def flush(now: float) -> None:
        """Send what ended by ``now``."""
        while ending and ending[0][0] <= now:
            _, rank, _, task = heappop(ending)
            message = _message(placement, task)
            if message:
                lists[rank].append(message[0])
                lists[placement.rank_of(message[1].stage)].append(message[1])

    for rank in range(schedule.ranks):
        offer(rank)
    while startable:
        begin, rank = heappop(startable)
        flush(begin)
        task = schedule.tasks[rank][position[rank]]
        lists[rank].append(task)
        position[rank] += 1
        if task.kind in COMPUTE:
            clock[rank] = begin + length[task.kind][task.stage]
            if task.kind is not Kind.WEIGHT:
                number = (task.stage + (stages if task.kind is Kind.BACKWARD else 0)) * count + task.micro_batch
                done[number] = clock[rank]
                heappush(ending, (clock[rank], rank, position[rank], task))
                if number in waiting:
                    offer(waiting.pop(number))
        offer(rank)
    flush(max(clock, default=0.0))
    stuck = [
        f"rank {rank} at {tasks[at]} (entry {at + 1} of {len(tasks)})"
        for rank, (tasks, at) in enumerate(zip(schedule.tasks, position, strict=True))
        if at < len(tasks)
    ]
    if stuck:
        raise ValueError(f"schedule {schedule.name!r} waits for itself: {'; '.join(stuck)}")
    return schedule.with_tasks(lists)
