# SPDX-License-Identifier: Apache-2.0
"""In which order each rank computes: one pure function a schedule, each giving F, B and W alone.

Two ways lead to an order. Schedules whose papers give a closed form are written as that form. The others come from
*list scheduling*: ranks run in simulated time, each starting the most urgent task that it can start at once: B, else F
while the memory cap allows, else W. Greedy list scheduling keeps exact caps and cannot deadlock: it only ever starts a
task whose inputs are there. It is only as good as the times that it assumes.

Facts about the orders, with all times equal to T (``tests/unit/test_schedule.py`` checks them):

* ZeroPP, strict, U >= 2P: bubble (P - 1) T a step; at U = P it is n (P - 1) T for n units.
* ZeroPP with overlapping units: the next unit's forwards fill the drain of this one. With a cap of U * V held
  activations a rank the bubble falls to (P - 1) T in many more cases; the price is two resident stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_zeroprompt.pipeline.schedule import Kind, Placement, Task, units_of

__all__ = [
    "TYPICAL_COSTS",
    "ListCosts",
    "breadth_first",
    "interleaved_1f1b",
    "list_schedule",
    "of_stages",
    "one_f_one_b",
    "zb_h1",
    "zbv",
    "zeropp_strict",
]

Order = list[list[Task]]


def _forwards(stages: Sequence[int], micro_batches: int, unit: int) -> list[Task]:
    """A rank's forwards: unit by unit, stage by stage, micro-batch by micro-batch."""
    return [Task(Kind.FORWARD, s, m) for part in units_of(micro_batches, unit) for s in stages for m in part]


def _backwards(stages: Sequence[int], micro_batches: int, unit: int) -> list[Task]:
    """A rank's backwards: the last stage first, micro-batches ascending as in the forwards."""
    return [Task(Kind.BACKWARD, s, m) for part in units_of(micro_batches, unit) for s in reversed(stages) for m in part]


def _weight(backward: Task) -> Task:
    return Task(Kind.WEIGHT, backward.stage, backward.micro_batch)


def zeropp_strict(placement: Placement, micro_batches: int, unit: int) -> Order:
    """ZeroPP as its author's code runs it, unit after unit, on the looped placement.

    A rank runs ahead by ``2 (P - 1 - r) + (V - 1) u`` forwards, then alternates F and B, then drains. W are taken
    first-in-first-out and held back by ``2 r + 1``: rank r's gap between its last B of a unit and its first F of the
    next is that long. Last-in-first-out, as in the author's code, is as fast, but keeps two stages' gradients open
    instead of one.
    """
    order: Order = []
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        tasks: list[Task] = []
        for part in units_of(micro_batches, unit):
            size = len(part)
            steps = size * len(stages)
            forwards = [Task(Kind.FORWARD, s, m) for s in stages for m in part]
            backwards = [Task(Kind.BACKWARD, s, m) for s in reversed(stages) for m in part]
            warm = min(2 * (placement.ranks - 1 - rank) + (len(stages) - 1) * size, steps)
            tasks += forwards[:warm]
            waiting: deque[Task] = deque()
            for k, backward in enumerate(backwards):
                alternating = k < steps - warm
                if alternating:
                    tasks.append(forwards[warm + k])
                tasks.append(backward)
                waiting.append(_weight(backward))
                if not alternating or k > 2 * rank:
                    tasks.append(waiting.popleft())
            tasks += waiting
        order.append(tasks)
    return order


def one_f_one_b(placement: Placement, micro_batches: int) -> Order:
    """1F1B: rank r runs P - 1 - r forwards ahead, then a forward and a full backward in turn (V = 1)."""
    return _alternate(placement, micro_batches, micro_batches, ahead=lambda rank: placement.ranks - 1 - rank)


def interleaved_1f1b(placement: Placement, micro_batches: int) -> Order:
    """Interleaved 1F1B: rounds of P micro-batches go through a rank's V stages in turn, with full backward passes.

    Where P does not divide M there are as many rounds, of more micro-batches each. Where these do not divide M either,
    the closed form of Megatron-LM would wait for itself; the caps that it implies, under list scheduling, give a valid
    order there.
    """
    ranks, per_rank = placement.ranks, placement.stages_per_rank
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds:
        caps = tuple(2 * (ranks - 1 - rank) + (per_rank - 1) * ranks + 1 for rank in range(ranks))
        return list_schedule(placement, micro_batches, ranks, in_flight=caps, defer=False)
    size = micro_batches // rounds
    return _alternate(placement, micro_batches, size, ahead=lambda rank: 2 * (ranks - 1 - rank) + (per_rank - 1) * size)


def breadth_first(placement: Placement, micro_batches: int) -> Order:
    """Looped breadth-first: every forward of a rank, then every full backward."""
    every = placement.stages_per_rank * micro_batches
    return _alternate(placement, micro_batches, micro_batches, ahead=lambda rank: every)


def zb_h1(placement: Placement, micro_batches: int) -> Order:
    """ZB-H1 (Qi et al. 2024): 1F1B's order with W held back by r on rank r, so that no rank holds more than P (V = 1).

    Greedy list scheduling under the same caps is slower: a W that it starts in a gap delays the B behind it, and every
    round adds to the bubble.
    """
    ranks = placement.ranks
    return _alternate(
        placement, micro_batches, micro_batches, ahead=lambda rank: ranks - 1 - rank, behind=lambda rank: rank
    )


def _alternate(
    placement: Placement,
    micro_batches: int,
    unit: int,
    ahead: Callable[[int], int],
    behind: Callable[[int], int] = lambda rank: 0,
) -> Order:
    """A forward, a B and a W in turn, after ``ahead(rank)`` forwards; the W is that of ``behind(rank)`` B ago."""
    order: Order = []
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        forwards = _forwards(stages, micro_batches, unit)
        warm = min(ahead(rank), len(forwards))
        tasks = forwards[:warm]
        waiting: deque[Task] = deque()
        for k, backward in enumerate(_backwards(stages, micro_batches, unit)):
            tasks += [*forwards[warm + k : warm + k + 1], backward]
            waiting.append(_weight(backward))
            if k >= behind(rank):
                tasks.append(waiting.popleft())
        order.append([*tasks, *waiting])
    return order


def zbv(placement: Placement, micro_batches: int) -> Order:
    """ZBV (Qi et al. 2024): two stages a rank placed as a V, at most 2P activations of a stage in flight.

    The four stretches of the paper: run down (stage ``r`` ahead), turn (its partner ``2P - 1 - r`` joins), steady
    state with full backward passes, and a tail in which W fill what would be bubbles.
    """
    order: Order = []
    for rank in range(placement.ranks):
        first, second = placement.stages_of(rank)
        done: dict[tuple[Kind, int], int] = {}
        tasks: list[Task] = []
        waiting: deque[Task] = deque()

        def run(kind: Kind, stage: int, *, split: bool = False) -> None:
            """The next ``kind`` of ``stage``, where one is left."""
            micro_batch = done.get((kind, stage), 0)  # noqa: B023 - called within this iteration alone
            if micro_batch == micro_batches:
                return
            task = Task(kind, stage, micro_batch)
            done[kind, stage] = micro_batch + 1  # noqa: B023
            tasks.append(task)  # noqa: B023
            if kind is Kind.BACKWARD:
                (waiting if split else tasks).append(_weight(task))  # noqa: B023

        for _ in range(2 * (placement.ranks - rank) - 1):
            run(Kind.FORWARD, first)
        for _ in range(rank):
            run(Kind.FORWARD, second)
            run(Kind.FORWARD, first)
        for _ in range(placement.ranks - rank):
            run(Kind.FORWARD, second)
            run(Kind.BACKWARD, second)
        while done.get((Kind.FORWARD, second), 0) < micro_batches:
            run(Kind.FORWARD, first)
            run(Kind.BACKWARD, first)
            run(Kind.FORWARD, second)
            run(Kind.BACKWARD, second)
        for _ in range(rank):
            run(Kind.BACKWARD, first, split=True)
            run(Kind.BACKWARD, second, split=True)
        for _ in range(placement.ranks - rank):
            run(Kind.BACKWARD, first, split=True)
            if waiting:
                tasks.append(waiting.popleft())
        order.append([*tasks, *waiting])
    return order


@dataclass(frozen=True, slots=True)
class ListCosts:
    """What list scheduling assumes of a stage's tasks; the units of time and of memory are free.

    Attributes:
        forward: Time of an F.
        backward: Time of a B.
        weight: Time of a W.
        transfer: Time from the end of a task to its result being on another rank.
        activations: Memory from F to B.
        weight_inputs: Memory from B to W.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    transfer: float = 0.0
    activations: float = 1.0
    weight_inputs: float = 0.5


TYPICAL_COSTS = ListCosts(1.0, 1.4, 0.85)
"""Of a transformer's layers on a GPU: the whole backward pass of attention is in B."""


def of_stages(costs: ListCosts | Sequence[ListCosts], stages: int) -> Sequence[ListCosts]:
    """Costs of each stage, from those that are the same for all or given one by one."""
    return [costs] * stages if isinstance(costs, ListCosts) else costs


def list_schedule(
    placement: Placement,
    micro_batches: int,
    unit: int,
    *,
    held: Sequence[float] | None = None,
    in_flight: Sequence[int] | None = None,
    defer: bool = True,
    overlap: bool = True,
    patience: float = 0.0,
    costs: ListCosts | Sequence[ListCosts] = ListCosts(),
) -> Order:
    """Order tasks by simulated time: B first, then F while the caps allow, then W, oldest first.

    F and B of a rank keep the order unit, stage (B: from the last), micro-batch. A rank's choice is looked at again
    only when the rank has started something or the input of its next F or B is made: P=16, V=2, M=64 take 30 ms.

    Args:
        placement: Stages to ranks.
        micro_batches: M.
        unit: U.
        held: For each rank, how much it may hold, in the costs' unit of memory (1 is a stage's activations if they say
            nothing else); None for no limit. It must allow ``(V - 1) U + 1`` activations.
        in_flight: For each rank, how many micro-batches of a stage may be between F and B.
        defer: False runs each W right after its B.
        overlap: False keeps a rank from starting a unit before all its W of the last one are done.
        patience: A W that would hold up an F or B which comes soon does not start: one that comes within this share
            of the W's time. 0 starts every W in every gap, 1 only those that fit.
        costs: Of all stages, or of each.

    Raises:
        ValueError: If a cap is so low that no order exists.
    """
    ranks, stages, last = placement.ranks, placement.stages, placement.stages - 1
    each = of_stages(costs, stages)
    owner = [placement.rank_of(stage) for stage in range(stages)]
    forwards = [_forwards(placement.stages_of(rank), micro_batches, unit) for rank in range(ranks)]
    backwards = [_backwards(placement.stages_of(rank), micro_batches, unit) for rank in range(ranks)]
    started = [[0, 0, 0] for _ in range(ranks)]  # how many F, B and W of each rank
    waiting: list[list[Task]] = [[] for _ in range(ranks)]  # W in the order of their B
    memory, clock = [0.0] * ranks, [0.0] * ranks
    never = float("inf")
    # When the inputs of each F and B are on its rank.
    ready_f = [[0.0 if stage == 0 else never] * micro_batches for stage in range(stages)]
    ready_b = [[never] * micro_batches for _ in range(stages)]
    order: Order = [[] for _ in range(ranks)]

    def allowed(rank: int, task: Task) -> bool:
        """Whether the caps let the rank start its next F."""
        if held is not None and memory[rank] + each[task.stage].activations > held[rank] * (1 + 1e-9):
            return False
        if in_flight is not None and started[rank][0] - started[rank][1] + 1 > in_flight[rank]:
            return False
        if overlap:
            return True
        _, done_b, done_w = started[rank]
        unfinished = waiting[rank][done_w:] or backwards[rank][done_b:]
        return not unfinished or unfinished[0].micro_batch // unit >= task.micro_batch // unit

    def choice(rank: int) -> tuple[float, Task | None]:
        """What the rank would start next, and when."""
        now, (done_f, done_b, done_w) = clock[rank], started[rank]
        soonest, task = never, None
        if done_b < len(backwards[rank]):
            task = backwards[rank][done_b]
            soonest = ready_b[task.stage][task.micro_batch]
            if soonest <= now:
                return now, task
        if done_f < len(forwards[rank]):
            forward = forwards[rank][done_f]
            ready = ready_f[forward.stage][forward.micro_batch]
            if (ready < soonest or ready <= now) and allowed(rank, forward):
                if ready <= now:
                    return now, forward
                soonest, task = ready, forward
        if done_w < len(waiting[rank]):
            weight = waiting[rank][done_w]
            if soonest - now >= patience * each[weight.stage].weight:
                return now, weight
        return soonest, task

    def start(rank: int, task: Task, begin: float) -> int:
        """Run a task; returns the rank whose next task may have got its input."""
        order[rank].append(task)
        stage, micro_batch, cost = task.stage, task.micro_batch, each[task.stage]
        if task.kind is Kind.WEIGHT:
            started[rank][2] += 1
            memory[rank] -= cost.weight_inputs
            clock[rank] = begin + cost.weight
            return rank
        if task.kind is Kind.FORWARD:
            started[rank][0] += 1
            memory[rank] += cost.activations
            clock[rank] = end = begin + cost.forward
            following, ready = (stage, ready_b) if stage == last else (stage + 1, ready_f)
        else:
            started[rank][1] += 1
            memory[rank] += cost.weight_inputs - cost.activations
            waiting[rank].append(_weight(task))
            clock[rank] = end = begin + cost.backward
            if not defer:
                start(rank, waiting[rank][-1], end)
            if stage == 0:
                return rank
            following, ready = stage - 1, ready_b
        ready[following][micro_batch] = end + (cost.transfer if owner[following] != rank else 0.0)
        return owner[following]

    begins: list[float] = [0.0] * ranks
    choices: list[Task | None] = [None] * ranks

    def look(rank: int) -> None:
        begins[rank], choices[rank] = choice(rank)

    for rank in range(ranks):
        look(rank)
    for _ in range(3 * stages * micro_batches if defer else 2 * stages * micro_batches):
        begin = min(begins)
        rank = begins.index(begin)
        task = choices[rank]
        if task is None or begin == never:
            raise ValueError(
                f"no order exists: held={held}, in_flight={in_flight} are below what V={placement.stages_per_rank} "
                f"stages and U={unit} need ((V - 1) U + 1 = {(placement.stages_per_rank - 1) * unit + 1}); raise "
                "the cap or lower the unit"
            )
        touched = start(rank, task, begin)
        look(rank)
        if touched != rank:
            look(touched)
    return order
