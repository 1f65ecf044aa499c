# SPDX-License-Identifier: Apache-2.0
"""Orders of F, B and W: torch's own beside ours, exactly, and list scheduling with each stage's own costs."""

import dataclasses
import itertools

import pytest
import torch.distributed.pipelining.schedules as torch_schedules
from walking import COMPUTE, makespan

from lightning_zeroprompt.pipeline import Kind, Placement, Schedule, Task, build_schedule
from lightning_zeroprompt.pipeline.lowering import add_transfers
from lightning_zeroprompt.pipeline.orders import ListCosts, list_schedule

# torch's own orders

TORCH = {
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "breadth_first": torch_schedules.ScheduleLoopedBFS,
    "zb_h1": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
}
LETTERS = {"FORWARD": "F", "BACKWARD_INPUT": "B", "FULL_BACKWARD": "B", "BACKWARD_WEIGHT": "W"}


def torch_order(name: str, ranks: int, per_rank: int, micro_batches: int) -> list[list[Task]]:
    """What torch's schedule class would run; its constructor wants stages on devices, its arithmetic does not."""
    schedule = object.__new__(TORCH[name])
    rounds = max(1, micro_batches // ranks)
    vars(schedule).update(
        pp_group_size=ranks,
        num_stages=ranks * per_rank,
        _num_stages=ranks * per_rank,
        _stages=[None] * per_rank,
        n_local_stages=per_rank,
        _n_microbatches=micro_batches,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
    )
    if name == "1f1b":
        lists = [schedule._get_pipeline_order()[rank] for rank in range(ranks)]
    else:
        lists = [schedule._calculate_single_rank_operations(rank) for rank in range(ranks)]
    return [
        [
            Task(Kind(LETTERS[action.computation_type.name]), action.stage_index, action.microbatch_index)
            for action in actions
            if action is not None and action.computation_type.name in LETTERS
        ]
        for actions in lists
    ]


def without_weights(lists: list[list[Task]]) -> list[list[Task]]:
    return [[task for task in tasks if task.kind is not Kind.WEIGHT] for tasks in lists]


@pytest.mark.parametrize("name", TORCH)
def test_orders_are_torchs(name: str) -> None:
    compared = 0
    for ranks, micro_batches, per_rank in itertools.product(range(1, 7), range(1, 20), (1, 2, 3)):
        if name == "zbv" and per_rank != 2:
            continue
        if name in ("1f1b", "zb_h1") and per_rank != 1:
            continue
        if name == "1f1b" and micro_batches < ranks:
            continue  # torch refuses these
        if name in ("interleaved_1f1b", "zb_h1") and micro_batches % max(1, micro_batches // ranks):
            continue  # and these
        theirs = torch_order(name, ranks, per_rank, micro_batches)
        schedule = build_schedule(name, ranks=ranks, stages_per_rank=per_rank, micro_batches=micro_batches)
        ours = [list(tasks) for tasks in schedule.only(COMPUTE).tasks]
        if name == "1f1b":
            # torch's list, which it makes for people to look at, numbers the last rank's forwards from 1.
            theirs[-1] = [
                dataclasses.replace(task, micro_batch=task.micro_batch - (task.kind is Kind.FORWARD))
                for task in theirs[-1]
            ]
        elif name == "breadth_first":
            # torch takes a stage's backwards from the last micro-batch on; ascending, as everywhere else here, takes as
            # long and keeps one order of micro-batches for all schedules.
            theirs = [
                [t for t in tasks if t.kind is Kind.FORWARD]
                + sorted((t for t in tasks if t.kind is Kind.BACKWARD), key=lambda t: (-t.stage, t.micro_batch))
                for tasks in theirs
            ]
        if name == "zb_h1":
            assert ours == theirs, (ranks, micro_batches)
        # ZBV's W of the tail may stand in any order: torch does the second stage's first, we the oldest first.
        assert without_weights(ours) == without_weights(theirs), (ranks, per_rank, micro_batches)
        compared += 1
    assert compared > 80


# Costs of each stage


def test_equal_stages_are_listed_alike_however_their_costs_are_given() -> None:
    placement, costs = Placement(3, 2, vshape=True), ListCosts(1.0, 1.4, 0.8, 0.1)
    one, each = (list_schedule(placement, 5, 2, held=(5.0,) * 3, costs=given) for given in (costs, [costs] * 6))
    assert one == each
    schedule = build_schedule("zbv", ranks=3, stages_per_rank=2, micro_batches=5)
    assert add_transfers(schedule, costs) == add_transfers(schedule, [costs] * 6)


def test_a_stage_that_takes_longer_or_holds_more_is_seen() -> None:
    placement = Placement(2, 1)
    # A dear last stage: rank 0 runs ahead by what its memory holds, in the costs' unit.
    costs = [ListCosts(1.0, 1.0, 1.0, 0.0, 10.0, 5.0), ListCosts(4.0, 4.0, 4.0, 0.0, 1.0, 1.0)]
    ahead = list_schedule(placement, 6, 6, held=(40.0, 100.0), costs=costs)[0]
    assert list(itertools.takewhile(lambda task: task.kind is Kind.FORWARD, ahead)) == ahead[:4]
    # A slow stage 2 of rank 1 sends so late that rank 0 has run W3.0 before it posts the receive.
    schedule = build_schedule("zbv", ranks=2, stages_per_rank=2, micro_batches=3)
    costs = [ListCosts(), ListCosts(), ListCosts(forward=5.0), ListCosts()]
    assert "SB3.0 RF3.1 W3.0" in str(add_transfers(schedule, ListCosts()))
    assert "SB3.0 W3.0 RF3.1" in str(add_transfers(schedule, costs))


def test_patience_pays_where_little_may_be_held() -> None:
    placement, costs = Placement(4, 1), ListCosts(1.0, 1.4, 0.85, 0.2)

    def seconds(patience: float) -> float:
        order = list_schedule(placement, 8, 8, held=(3.0,) * 4, costs=costs, patience=patience)
        schedule = Schedule("listed", placement, 8, 8, 1, tuple(map(tuple, order)))
        return makespan(schedule, (1.0, 1.4, 0.85), transfer=0.2)

    assert seconds(1.0) < 0.95 * seconds(0.0)
