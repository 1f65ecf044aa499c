# SPDX-License-Identifier: Apache-2.0
"""Better orders by small moves: a task is taken out of its rank's list and put back a few places before or behind.

What counts is the makespan with each stage's own times and a lag between ranks; ties are decided by the sum of the
ranks' ends, so that the search drifts along plateaus. Moves are drawn from the *critical path*, the chain of tasks
without a gap that ends last: only taking something out of it can make a step shorter. A move that makes the step
longer is taken with a probability that falls as the search goes on (simulated annealing), and the best order seen is
the result. Random numbers are seeded: equal input gives an equal order.

Alternatives: an exact solver (CP-SAT) proves optima for some tens of tasks in seconds and not for hundreds, so it is
what tests compare with; moves of anything but the critical path are nearly all void.

Cost: a move walks all tasks once, 0.3 microseconds each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from lightning_zeroprompt.pipeline.orders import ListCosts
from lightning_zeroprompt.pipeline.schedule import Kind, Placement, Task

__all__ = ["Orders", "improve"]

Numbers = list[list[int]]
"""For each rank its tasks as numbers: ``stage M + micro_batch``, plus ``P V M`` for a B and twice that for a W."""

_NEVER = math.inf
_REACH = 6
"""Places by which a task moves at most."""
_FIRST_HEAT = 0.01
"""Share of the step by which a worse order may be worse at first."""


class Orders:
    """Orders of one placement under one set of costs, judged.

    Args:
        placement: Stages to ranks.
        micro_batches: M.
        costs: Of each stage.
        tails: For each rank, time behind its last task.
        limits: For each rank, the most memory of activations, weight inputs and gradients; None for no limit.
        gradients: For each stage, what its first W makes and a step keeps; None is nothing.
        resident_order: Keep the order of F and B, and so the gathers, as they are: W alone move.
    """

    def __init__(
        self,
        placement: Placement,
        micro_batches: int,
        costs: Sequence[ListCosts],
        *,
        tails: Sequence[float],
        limits: Sequence[float] | None = None,
        gradients: Sequence[float] | None = None,
        resident_order: bool = False,
    ) -> None:
        stages, self._micro_batches = placement.stages, micro_batches
        self.count = stages * micro_batches
        self._ranks, self._tails, self._limits = placement.ranks, tails, limits
        self._gradients = [0.0] * stages if gradients is None else gradients
        self.resident_order = resident_order
        owner = [placement.rank_of(stage) for stage in range(stages)]
        self.duration: list[float] = []
        self._change: list[float] = []
        self._needs: list[int] = []
        self._lag: list[float] = []
        for kind in range(3):
            for stage, cost in enumerate(costs):
                time = (cost.forward, cost.backward, cost.weight)[kind]
                change = (cost.activations, cost.weight_inputs - cost.activations, -cost.weight_inputs)[kind]
                source = -1  # the stage whose F or B is needed
                if kind == 0:
                    first, source = 0, stage - 1
                elif kind == 1:
                    first, source = (0, stage) if stage == stages - 1 else (self.count, stage + 1)
                else:
                    first, source = self.count, stage
                lag = cost.transfer if source >= 0 and owner[source] != owner[stage] else 0.0
                for micro_batch in range(micro_batches):
                    self.duration.append(time)
                    self._change.append(change)
                    self._needs.append(first + source * micro_batches + micro_batch if source >= 0 else -1)
                    self._lag.append(lag)

    def numbers(self, order: Sequence[Sequence[Task]]) -> Numbers:
        """An order as numbers; what is no F, B or W is left out."""
        first = {Kind.FORWARD: 0, Kind.BACKWARD: self.count, Kind.WEIGHT: 2 * self.count}
        return [
            [first[t.kind] + t.stage * self._micro_batches + t.micro_batch for t in tasks if t.kind in first]
            for tasks in order
        ]

    def tasks(self, lists: Numbers) -> list[list[Task]]:
        """Numbers as an order."""
        kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)

        def task(number: int) -> Task:
            kind, rest = divmod(number, self.count)
            return Task(kinds[kind], *divmod(rest, self._micro_batches))

        return [[task(number) for number in numbers] for numbers in lists]

    def judge(self, lists: Numbers) -> tuple[float, float, list[float]]:
        """The makespan, the sum of the ranks' ends, and when each task ends; infinite if a rank waits for ever."""
        needs, lags, durations = self._needs, self._lag, self.duration
        ends = [-1.0] * (3 * self.count)
        position, clock = [0] * self._ranks, [0.0] * self._ranks
        blocked: dict[int, int] = {}
        todo = list(range(self._ranks))
        done = 0
        while todo:
            rank = todo.pop()
            numbers, now, at = lists[rank], clock[rank], position[rank]
            while at < len(numbers):
                number = numbers[at]
                needed = needs[number]
                if needed >= 0:
                    there = ends[needed]
                    if there < 0:
                        blocked[needed] = rank
                        break
                    there += lags[number]
                    if there > now:
                        now = there
                now += durations[number]
                ends[number] = now
                if number in blocked:
                    todo.append(blocked.pop(number))
                at += 1
            done += at - position[rank]
            position[rank], clock[rank] = at, now
        if done < 3 * self.count:
            return _NEVER, _NEVER, ends
        finished = [now + tail for now, tail in zip(clock, self._tails, strict=True)]
        return max(finished), sum(finished), ends

    def critical(self, lists: Numbers, ends: Sequence[float]) -> list[tuple[int, int]]:
        """The chain that ends last: for each of its tasks the rank and the position, the last one first."""
        place = {number: (rank, at) for rank, numbers in enumerate(lists) for at, number in enumerate(numbers)}
        finished = [ends[numbers[-1]] + tail for numbers, tail in zip(lists, self._tails, strict=True)]
        rank = max(range(self._ranks), key=finished.__getitem__)
        at = len(lists[rank]) - 1
        chain = []
        while at >= 0:
            chain.append((rank, at))
            number = lists[rank][at]
            needed = self._needs[number]
            begin = ends[number] - self.duration[number]
            before = ends[lists[rank][at - 1]] if at else 0.0
            if needed >= 0 and ends[needed] + self._lag[number] > before:
                rank, at = place[needed]
            elif begin > 0 and at:
                at -= 1
            else:
                break
        return chain

    def fits(self, rank: int, numbers: Sequence[int]) -> bool:
        """Whether a rank's list keeps its memory limit."""
        if self._limits is None:
            return True
        held, limit, change = 0.0, self._limits[rank] * (1 + 1e-9), self._change
        weights, late = 2 * self.count, list(self._gradients)
        for number in numbers:
            if number >= weights:
                stage = (number - weights) // self._micro_batches
                held += late[stage]
                late[stage] = 0.0
            held += change[number]
            if held > limit:
                return False
        return True


def improve(orders: Orders, start: Numbers, *, moves: int, seed: int = 0) -> tuple[float, Numbers]:
    """Search for a shorter step.

    Args:
        orders: What judges.
        start: A valid order.
        moves: How many to try.
        seed: Of the random numbers.

    Returns:
        The makespan and the order; no worse than the start.
    """
    draw = random.Random(seed)
    now = [list(numbers) for numbers in start]
    length, total, ends = orders.judge(now)
    best, found = (length, total), [list(numbers) for numbers in now]
    # No rank ends before its own work is done: nothing better than that is to be found.
    least = max(sum(orders.duration[number] for number in numbers) for numbers in start)
    chain = orders.critical(now, ends)
    for move in range(moves):
        if best[0] <= least * (1 + 1e-9):
            break
        rank, at = chain[draw.randrange(len(chain))]
        numbers = now[rank]
        at = min(len(numbers) - 1, max(0, at + draw.choice((-1, 0, 0, 1))))
        to = at + draw.choice((-1, 1)) * draw.randint(1, _REACH)
        if not 0 <= to < len(numbers) or (orders.resident_order and numbers[at] < 2 * orders.count):
            continue
        changed = numbers[:at] + numbers[at + 1 :]
        changed.insert(to, numbers[at])
        if not orders.fits(rank, changed):
            continue
        now[rank] = changed
        new_length, new_total, new_ends = orders.judge(now)
        heat = _FIRST_HEAT * (1 - move / moves) * length / 4
        worse = new_length - length
        if new_length < _NEVER and (
            (new_length, new_total) <= (length, total)
            or (heat > 0 and draw.random() < math.exp(-max(worse, heat / 9) / heat))
        ):
            length, total, ends = new_length, new_total, new_ends
            chain = orders.critical(now, ends)
            if (length, total) < best:
                best, found = (length, total), [list(numbers) for numbers in now]
        else:
            now[rank] = numbers
    return best[0], found
