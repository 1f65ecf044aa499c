# SPDX-License-Identifier: Apache-2.0
"""Schedules against what is published of them: lists, bubbles, peaks, counts. Exact.

A schedule is judged by running its lists here, in simulated time, and never by the code that made them.
"""

import dataclasses
import itertools
import pickle
from collections.abc import Iterator

import pytest
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from walking import COMPUTE, EQUAL, makespan

from lightning_zeroprompt.pipeline import SCHEDULES, Kind, Placement, Schedule, Task, build_schedule, parse_tasks
from lightning_zeroprompt.pipeline.lowering import add_collectives, add_transfers
from lightning_zeroprompt.pipeline.orders import ListCosts, list_schedule
from lightning_zeroprompt.pipeline.schedule import units_of


def bubble(schedule: Schedule, times: tuple[float, float, float] = EQUAL) -> float:
    """The makespan less the work of a rank."""
    work = schedule.micro_batches * schedule.placement.stages_per_rank * sum(times)
    return round(makespan(schedule, times) - work, 9)


def peaks(schedule: Schedule, held_after_backward: float = 0.5) -> list[float]:
    """For each rank the most activations of a stage that it holds."""
    change = {Kind.FORWARD: 1.0, Kind.BACKWARD: held_after_backward - 1, Kind.WEIGHT: -held_after_backward}
    return [max(itertools.accumulate(change.get(task.kind, 0.0) for task in tasks)) for tasks in schedule.tasks]


def zeropp(ranks: int, per_rank: int, unit: int, micro_batches: int, *, overlap: bool = False, **more: int) -> Schedule:
    name = "zeropp_overlap" if overlap else "zeropp"
    return build_schedule(name, ranks=ranks, stages_per_rank=per_rank, unit=unit, micro_batches=micro_batches, **more)


# Records


def test_tasks_are_read_as_they_are_written() -> None:
    every = [Task(kind, 12, -1 if kind in ("AG", "RSH", "RS") else 30) for kind in Kind]
    text = " ".join(map(str, every))
    assert text == "F12.30 B12.30 W12.30 AG12 RSH12 RS12 SF12.30 RF12.30 SB12.30 RB12.30"
    assert parse_tasks(text) == tuple(every)
    assert parse_tasks("  F0.0\n\tAG3 ") == (Task(Kind.FORWARD, 0, 0), Task(Kind.GATHER, 3))
    assert parse_tasks("") == ()


@pytest.mark.parametrize("word", ["X0.0", "F0", "AG0.1", "F.1", "Fa.1", "F-1.0", "F0.0.0", "0.0", "f0.0", "F0,1"])
def test_what_is_no_task_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="is no task"):
        parse_tasks(f"F0.0 {word}")


@pytest.mark.parametrize("vshape", [False, True])
@pytest.mark.parametrize(("ranks", "per_rank"), list(itertools.product((1, 2, 3, 5), (1, 2, 3, 4))))
def test_placement_is_torchs(ranks: int, per_rank: int, vshape: bool) -> None:
    placement = Placement(ranks, per_rank, vshape)
    expected = generate_stage_to_rank_mapping(ranks, ranks * per_rank, style="v" if vshape else "loop")
    assert placement.stages == ranks * per_rank
    assert {stage: placement.rank_of(stage) for stage in range(placement.stages)} == expected
    for rank in range(ranks):
        assert placement.stages_of(rank) == tuple(stage for stage, holder in expected.items() if holder == rank)
    assert [placement.crosses(stage) for stage in range(placement.stages)] == [
        expected[stage] != expected[stage + 1] for stage in range(placement.stages - 1)
    ] + [False]


def test_units_cover_the_step_in_order() -> None:
    for micro_batches, unit in itertools.product(range(1, 14), range(1, 14)):
        units = list(units_of(micro_batches, unit))
        assert [m for part in units for m in part] == list(range(micro_batches))
        assert {len(part) for part in units[:-1]} <= {unit}
        assert 1 <= len(units[-1]) <= unit


def test_schedules_are_values() -> None:
    first, second = zeropp(2, 2, 2, 4), zeropp(2, 2, 2, 4)
    assert first == second
    assert hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) == first
    assert first != zeropp(2, 2, 2, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.unit = 3  # type: ignore[misc]
    only = first.only([Kind.GATHER])
    assert [[str(task) for task in tasks] for tasks in only.tasks] == [["AG0", "AG2", "AG0", "AG2", "AG0"],
                                                                      ["AG1", "AG3", "AG1", "AG3", "AG1"]]  # fmt: skip
    assert only.count(Kind.GATHER, 1) == first.count(Kind.GATHER, 1) == 5
    assert [parse_tasks(line.partition(": ")[2]) for line in str(first).splitlines()] == list(first.tasks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_builds_with_little_said(name: str) -> None:
    schedule = build_schedule(name, ranks=3, stages_per_rank=2 if name == "zbv" else 1, micro_batches=4)
    assert (schedule.name, schedule.ranks, schedule.micro_batches, schedule.unit) == (name, 3, 4, 4)
    assert schedule.placement.vshape == (name == "zbv")
    assert makespan(schedule) >= 12


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gpipe", {}, ["'gpipe'", "zeropp", "1f1b", "zbv"]),
        ("zeropp", {"ranks": 0}, ["ranks=0"]),
        ("zeropp", {"stages_per_rank": 0}, ["stages_per_rank=0"]),
        ("zeropp", {"micro_batches": 0}, ["micro_batches=0"]),
        ("zeropp", {"unit": 0}, ["unit=0", "1 to 8"]),
        ("zeropp", {"unit": -2}, ["unit=-2", "1 to 8"]),
        ("zeropp_overlap", {"unit": 9}, ["unit=9", "1 to 8"]),
        ("breadth_first", {"unit": 4}, ["unit=4", "breadth_first", "leave it out"]),
        ("1f1b", {"stages_per_rank": 2}, ["one stage a rank", "interleaved_1f1b"]),
        ("zb_h1", {"stages_per_rank": 2}, ["one stage a rank", "zbv"]),
        ("zbv", {"stages_per_rank": 1}, ["two stages a rank", "stages_per_rank=2"]),
        ("zbv", {"stages_per_rank": 3}, ["two stages a rank", "not 3"]),
        ("zbv", {"stages_per_rank": 2, "vshape": False}, ["vshape=False", "zbv"]),
        ("interleaved_1f1b", {"vshape": True}, ["vshape=True", "interleaved_1f1b"]),
        ("1f1b", {"cap": 8}, ["cap=8", "1f1b"]),
        ("zeropp", {"cap": 8}, ["cap=8", "zeropp"]),
        ("zeropp_overlap", {"cap": 8, "stages_per_rank": 3, "unit": 4}, ["cap=8", "(3 - 1) * 4 + 1 = 9"]),
        ("zeropp", {"resident": 0}, ["resident=0"]),
        ("zeropp", {"resident": 2}, ["resident=2", "1 stages a rank"]),
        ("zeropp", {"prefetch": True, "stages_per_rank": 2}, ["prefetch=True", "resident=2"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the words are checked below
        build_schedule(name, **{"ranks": 4, "micro_batches": 8, **settings})
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_cap_that_just_suffices_is_taken() -> None:
    schedule = zeropp(4, 3, 4, 8, overlap=True, cap=9)
    assert max(peaks(schedule)) <= 9
    assert makespan(schedule) >= 72


def test_a_list_that_waits_for_itself_is_named() -> None:
    # The deadlock of two ranks that each first want what the other makes last.
    wrong = dataclasses.replace(
        build_schedule("1f1b", ranks=2, micro_batches=1), tasks=(parse_tasks("B0.0 F0.0 W0.0"), parse_tasks("F1.0"))
    )
    with pytest.raises(ValueError, match=r"waits for itself: rank 0 at B0.0 \(entry 1 of 3\); rank 1 at F1.0"):
        add_transfers(wrong)


# ZeroPP's own lists, of two and four ranks. Stages are written as ranks count them: stage v of rank r is v * P + r.

STRICT = {
    (2, 2, 2, 4): """
        AG0 F0.0 F0.1 RSH0 AG1 F1.0 F1.1 B1.0 W1.0 B1.1 RSH1 W1.1 RS1 AG0 B0.0 W0.0 B0.1 W0.1 RS0 F0.2 F0.3 RSH0 AG1
        F1.2 F1.3 B1.2 W1.2 B1.3 RSH1 W1.3 RS1 AG0 B0.2 W0.2 B0.3 RSH0 W0.3 RS0
        |
        AG0 F0.0 F0.1 RSH0 AG1 F1.0 B1.0 F1.1 B1.1 RSH1 AG0 B0.0 W1.0 B0.1 W1.1 RS1 W0.0 W0.1 RS0 F0.2 F0.3 RSH0 AG1
        F1.2 B1.2 F1.3 B1.3 RSH1 AG0 B0.2 W1.2 B0.3 RSH0 W1.3 RS1 W0.2 W0.3 RS0
    """,
    (4, 2, 4, 8): """
        AG0 F0.0 F0.1 F0.2 F0.3 RSH0 AG1 F1.0 F1.1 F1.2 F1.3 B1.0 W1.0 B1.1 W1.1 B1.2 W1.2 B1.3 RSH1 W1.3 RS1 AG0 B0.0
        W0.0 B0.1 W0.1 B0.2 W0.2 B0.3 W0.3 RS0 F0.4 F0.5 F0.6 F0.7 RSH0 AG1 F1.4 F1.5 F1.6 F1.7 B1.4 W1.4 B1.5 W1.5
        B1.6 W1.6 B1.7 RSH1 W1.7 RS1 AG0 B0.4 W0.4 B0.5 W0.5 B0.6 W0.6 B0.7 RSH0 W0.7 RS0
        |
        AG0 F0.0 F0.1 F0.2 F0.3 RSH0 AG1 F1.0 F1.1 F1.2 F1.3 B1.0 W1.0 B1.1 W1.1 B1.2 W1.2 B1.3 RSH1 W1.3 RS1 AG0 B0.0
        W0.0 B0.1 W0.1 B0.2 W0.2 B0.3 W0.3 RS0 F0.4 F0.5 F0.6 F0.7 RSH0 AG1 F1.4 F1.5 F1.6 F1.7 B1.4 W1.4 B1.5 W1.5
        B1.6 W1.6 B1.7 RSH1 W1.7 RS1 AG0 B0.4 W0.4 B0.5 W0.5 B0.6 W0.6 B0.7 RSH0 W0.7 RS0
        |
        AG0 F0.0 F0.1 F0.2 F0.3 RSH0 AG1 F1.0 F1.1 F1.2 B1.0 F1.3 B1.1 B1.2 W1.0 B1.3 RSH1 W1.1 AG0 B0.0 W1.2 B0.1
        W1.3 RS1 B0.2 W0.0 B0.3 W0.1 W0.2 W0.3 RS0 F0.4 F0.5 F0.6 F0.7 RSH0 AG1 F1.4 F1.5 F1.6 B1.4 F1.7 B1.5 B1.6
        W1.4 B1.7 RSH1 W1.5 AG0 B0.4 W1.6 B0.5 W1.7 RS1 B0.6 W0.4 B0.7 RSH0 W0.5 W0.6 W0.7 RS0
        |
        AG0 F0.0 F0.1 F0.2 F0.3 RSH0 AG1 F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3 RSH1 AG0 B0.0 W1.0 B0.1 W1.1 B0.2
        W1.2 B0.3 W1.3 RS1 W0.0 W0.1 W0.2 W0.3 RS0 F0.4 F0.5 F0.6 F0.7 RSH0 AG1 F1.4 B1.4 F1.5 B1.5 F1.6 B1.6 F1.7
        B1.7 RSH1 AG0 B0.4 W1.4 B0.5 W1.5 B0.6 W1.6 B0.7 RSH0 W1.7 RS1 W0.4 W0.5 W0.6 W0.7 RS0
    """,
}


@pytest.mark.parametrize(
    ("sizes", "expected_makespan", "expected_peaks"),
    [((2, 2, 2, 4), 26, [4.0, 3.5]), ((4, 2, 4, 8), 54, [8.0, 8.0, 7.5, 6.5])],
)
def test_strict_lists(sizes: tuple[int, int, int, int], expected_makespan: int, expected_peaks: list[float]) -> None:
    ranks, schedule = sizes[0], zeropp(*sizes)
    assert schedule.tasks == tuple(
        tuple(dataclasses.replace(task, stage=task.stage * ranks + rank) for task in parse_tasks(text))
        for rank, text in enumerate(STRICT[sizes].split("|"))
    )
    assert makespan(schedule) == expected_makespan
    assert peaks(schedule) == expected_peaks


@pytest.mark.parametrize(
    ("sizes", "most", "most_held"),
    [((2, 2, 2, 4), 26, [4.0, 3.5]), ((4, 2, 4, 8), 52, [8.0, 8.0, 7.5, 6.5]), ((8, 2, 8, 32), 192 + 7, [16.0] * 8)],
)
def test_overlapping_units_are_as_fast_and_as_small_as_the_examples(
    sizes: tuple[int, int, int, int], most: int, most_held: list[float]
) -> None:
    schedule = zeropp(*sizes, overlap=True)
    assert makespan(schedule) <= most
    assert all(held <= limit for held, limit in zip(peaks(schedule), most_held, strict=True))


def test_unit_overlap_at_its_best_takes_a_quarter_of_the_strict_bubble() -> None:
    assert bubble(zeropp(8, 2, 8, 32)) == 28
    assert bubble(zeropp(8, 2, 8, 32, overlap=True)) == 7


@pytest.mark.parametrize(
    ("sizes", "cap", "efficiency", "gathers", "gathers_with_two"),
    [
        ((4, 2, 4, 16), 8, 0.931, 25, 2),
        ((4, 2, 4, 16), 12, 0.968, 31, 2),
        ((4, 4, 8, 32), 32, 0.992, 45, 24),
        ((8, 2, 16, 64), 32, 0.982, 57, 2),
    ],
)
def test_list_scheduling_with_real_times_is_as_good_as_the_design_says(
    sizes: tuple[int, int, int, int], cap: int, efficiency: float, gathers: int, gathers_with_two: int
) -> None:
    ranks, per_rank, unit, micro_batches = sizes
    placement, times, transfer = Placement(ranks, per_rank), (1.0, 1.3, 0.9), 0.05
    order = list_schedule(
        placement, micro_batches, unit, held=(float(cap),) * ranks, costs=ListCosts(*times, transfer=transfer)
    )
    schedule = Schedule("listed", placement, micro_batches, unit, 1, tuple(map(tuple, order)))
    work = micro_batches * per_rank * sum(times)
    assert work / makespan(schedule, times, transfer) >= efficiency - 5e-4, "efficiencies are given to three digits"
    assert max(peaks(schedule)) <= cap
    for resident, most in ((1, gathers), (2, gathers_with_two)):
        lists = [add_collectives(tasks, unit, resident, prefetch=resident > 1) for tasks in order]
        assert max(sum(task.kind is Kind.GATHER for task in tasks) for tasks in lists) <= most


# Formulas of strict ZeroPP


def strict_sizes() -> Iterator[tuple[int, int, int, int]]:
    """(P, V, U, n) with units of one size, from the smallest sensible one to beyond the largest."""
    for ranks, per_rank, units in itertools.product(range(1, 6), (1, 2, 3, 4), (1, 2, 3)):
        for unit in sorted({ranks, ranks + 1, 2 * ranks - 2, 2 * ranks - 1, 2 * ranks, 2 * ranks + 3}):
            if unit >= ranks:
                yield ranks, per_rank, unit, units


@pytest.mark.parametrize("ranks", range(1, 6))
def test_strict_bubble_with_equal_times(ranks: int) -> None:
    for _, per_rank, unit, units in (sizes for sizes in strict_sizes() if sizes[0] == ranks):
        between = 2 * ranks - 1 - unit if unit <= 2 * ranks - 2 else int(unit == 2 * ranks - 1)
        expected = ranks - 1 + (units - 1) * between
        if unit == 2 * ranks - 1 and ranks == 1:
            expected = 0  # one rank has no bubble; the formula's U = 2P - 1 means P > 1
        assert bubble(zeropp(ranks, per_rank, unit, units * unit)) == expected, (ranks, per_rank, unit, units)


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.0, 0.6), (1.0, 1.3, 0.9), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0)])
def test_strict_bubble_with_unequal_times_and_wide_units(times: tuple[float, float, float]) -> None:
    forward, backward, weight = times
    leak = forward + backward - 2 * weight
    for ranks, per_rank, units, more in itertools.product(range(1, 6), (1, 2, 3), (1, 2, 3), (0, 3)):
        unit = 2 * ranks + more
        expected = (ranks - 1) * (max(forward, leak) + (units - 1) * max(0.0, leak))
        assert bubble(zeropp(ranks, per_rank, unit, units * unit), times) == pytest.approx(expected, abs=1e-6)


def test_strict_bubbles_outside_the_formula() -> None:
    assert bubble(zeropp(4, 2, 2, 8)) == 28, "units smaller than P"
    assert (bubble(zeropp(4, 2, 7, 16)), bubble(zeropp(4, 2, 8, 16))) == (9, 3), "a short last unit"


def test_strict_peaks() -> None:
    for ranks, per_rank, unit, units in strict_sizes():
        expected = []
        for rank in range(ranks):
            pairs = max(0, unit - 2 * (ranks - 1 - rank))
            ahead = 2 * (ranks - 1 - rank) + (per_rank - 1) * unit + 1
            expected.append(ahead + 0.5 * min(2 * rank + 1, pairs - 1) if pairs else unit * per_rank)
        assert peaks(zeropp(ranks, per_rank, unit, units * unit)) == expected, (ranks, per_rank, unit, units)


def test_strict_gathers_and_reductions() -> None:
    for ranks, per_rank, unit, units in strict_sizes():
        for resident in range(1, min(2, per_rank) + 1):
            schedule = zeropp(ranks, per_rank, unit, units * unit, resident=resident)
            gathers = units * (2 * per_rank - 2 * resident) + resident
            for rank in range(ranks):
                assert schedule.count(Kind.GATHER, rank) == schedule.count(Kind.RELEASE, rank) == gathers
                assert schedule.count(Kind.REDUCE, rank) == units * per_rank


def test_gradients_of_one_stage_at_a_time_are_open() -> None:
    # What first-in-first-out W are for: full gradients of at most one stage wait for their reduction.
    for ranks, per_rank, unit, units in strict_sizes():
        for tasks in zeropp(ranks, per_rank, unit, units * unit).tasks:
            open_stages: set[int] = set()
            for task in tasks:
                if task.kind is Kind.WEIGHT:
                    open_stages.add(task.stage)
                elif task.kind is Kind.REDUCE:
                    open_stages.remove(task.stage)
                assert len(open_stages) <= 1, (ranks, per_rank, unit, units)
            assert not open_stages


# The others' formulas


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.3, 0.9), (1.0, 2.0, 1.0)])
def test_bubbles_of_the_others(times: tuple[float, float, float]) -> None:
    forward, backward, weight = times
    # A full backward pass is one task: its result is there when its W is done.
    whole = (forward, backward + weight, 0.0)
    for ranks, rounds in itertools.product(range(1, 7), (1, 2, 3)):
        fixed = {"ranks": ranks, "micro_batches": ranks * rounds}
        full = (ranks - 1) * sum(times)
        for name, per_rank in [("1f1b", 1), *itertools.product(("interleaved_1f1b", "breadth_first"), (1, 2, 3))]:
            schedule = build_schedule(name, stages_per_rank=per_rank, **fixed)
            assert bubble(schedule, whole) == pytest.approx(full, abs=1e-6), (name, ranks, per_rank, rounds)
            for tasks in schedule.only(COMPUTE).tasks:
                for task, next_ in itertools.pairwise(tasks):
                    if task.kind is Kind.BACKWARD:
                        assert next_ == dataclasses.replace(task, kind=Kind.WEIGHT)
        split = (ranks - 1) * (forward + backward - weight)
        assert bubble(build_schedule("zb_h1", **fixed), times) == pytest.approx(split, abs=1e-6), (ranks, rounds)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bubbles_where_the_input_gradient_is_sent_before_the_weight_gradient_is_made(ranks: int) -> None:
    """The table of docs/pipeline.md: four rounds, all times equal."""
    two = {"stages_per_rank": 2}
    per_step = {"1f1b": 2, "zb_h1": 1, "zbv": 1, "interleaved_1f1b": 2, "breadth_first": 2}
    for name, times in per_step.items():
        more = two if name in ("zbv", "interleaved_1f1b", "breadth_first") else {}
        schedule = build_schedule(name, ranks=ranks, micro_batches=4 * ranks, **more)
        assert bubble(schedule) == times * (ranks - 1), name
    assert bubble(zeropp(ranks, 2, 2 * ranks, 4 * ranks)) == ranks - 1
    assert bubble(zeropp(ranks, 2, ranks, 4 * ranks)) == 4 * (ranks - 1)


def test_peaks_of_the_others() -> None:
    for ranks, micro_batches in itertools.product(range(1, 7), (1, 3, 6, 12, 18)):
        fixed = {"ranks": ranks, "micro_batches": micro_batches}
        ahead = [min(ranks - rank, micro_batches) for rank in range(ranks)]
        assert peaks(build_schedule("1f1b", **fixed)) == ahead
        # ZB-H1 spends the memory that 1F1B uses on rank 0 on every rank, and what waits for W counts whole.
        assert max(peaks(build_schedule("zb_h1", **fixed), held_after_backward=1.0)) == min(ranks, micro_batches)
        assert max(peaks(build_schedule("zbv", stages_per_rank=2, **fixed), held_after_backward=0.5)) <= 2 * ranks
        for per_rank in (1, 2, 3):
            schedule = build_schedule("breadth_first", stages_per_rank=per_rank, **fixed)
            assert peaks(schedule) == [per_rank * micro_batches] * ranks
            if micro_batches % ranks == 0:
                held = peaks(build_schedule("interleaved_1f1b", stages_per_rank=per_rank, **fixed))
                assert held == [
                    min((per_rank - 1) * ranks + 2 * (ranks - 1 - rank) + 1, per_rank * micro_batches)
                    for rank in range(ranks)
                ]


def test_messages_of_a_step() -> None:
    for ranks, per_rank, vshape in itertools.product((1, 2, 3, 5), (1, 2, 3), (False, True)):
        schedule = build_schedule(
            "zeropp", ranks=ranks, stages_per_rank=per_rank, micro_batches=5, unit=2, vshape=vshape
        )
        sent = add_transfers(schedule)
        # Of the VP - 1 boundaries, looped placement crosses all where P > 1, a V stays on its rank at its V - 1 turns.
        crossed = per_rank * ranks - 1 - (per_rank - 1) * (vshape or ranks == 1)
        for kind in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B):
            assert sum(sent.count(kind, rank) for rank in range(ranks)) == 5 * crossed
        assert sent.only([*COMPUTE, Kind.GATHER, Kind.RELEASE, Kind.REDUCE]) == schedule
