# SPDX-License-Identifier: Apache-2.0
"""A schedule's lists in simulated time, for tests: never by the code that made them."""

import dataclasses

from lightning_zeroprompt.pipeline import Kind, Schedule

COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)
EQUAL = (1.0, 1.0, 1.0)


def makespan(schedule: Schedule, times: tuple[float, float, float] = EQUAL, transfer: float = 0.0) -> float:
    """When the last task ends, every rank starting each task as soon as the one before it and its input are there."""
    duration = dict(zip(COMPUTE, times, strict=True))
    placement, last = schedule.placement, schedule.stages - 1
    lists = schedule.only(COMPUTE).tasks
    ended: dict[tuple[Kind, int, int], float] = {}
    clock, position = [0.0] * schedule.ranks, [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, tasks in enumerate(lists):
            while position[rank] < len(tasks):
                kind, stage, m = dataclasses.astuple(tasks[position[rank]])
                if kind is Kind.FORWARD:
                    needed = (kind, stage - 1, m)
                elif kind is Kind.BACKWARD:
                    needed = (kind, stage + 1, m) if stage < last else (Kind.FORWARD, stage, m)
                else:
                    needed = (Kind.BACKWARD, stage, m)
                if needed[1] >= 0 and needed not in ended:
                    break
                way = transfer if needed[1] >= 0 and placement.rank_of(needed[1]) != rank else 0.0
                clock[rank] = max(clock[rank], ended.get(needed, 0.0) + way) + duration[kind]
                ended[kind, stage, m] = clock[rank]
                position[rank] += 1
                moved = True
    assert all(at == len(tasks) for at, tasks in zip(position, lists, strict=True)), "waits for itself"
    return max(clock)
