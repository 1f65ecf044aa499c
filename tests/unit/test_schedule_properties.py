# SPDX-License-Identifier: Apache-2.0
"""What must hold of every schedule: nothing missing or twice, no rank ever waits for ever, bounds kept, counts right.

Lists are run by the strict interpreter of ``interpreter.py``.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from interpreter import OTHER_END, run

from lightning_zeroprompt.pipeline import Kind, Placement, Schedule, Task, add_transfers, build_schedule
from lightning_zeroprompt.pipeline.lowering import add_collectives

F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT
AG, RSH, RS = Kind.GATHER, Kind.RELEASE, Kind.REDUCE

Settings = dict[str, Any]


def check(settings: Settings) -> Schedule:
    """Build and lower a schedule, and check everything that holds for all of them."""
    schedule = build_schedule(**settings)
    placement, units = schedule.placement, -(-schedule.micro_batches // schedule.unit)
    for rank, tasks in enumerate(schedule.tasks):
        stages = placement.stages_of(rank)
        expected = {(kind, s, m) for kind in (F, B, W) for s in stages for m in range(schedule.micro_batches)}
        computed = [(t.kind, t.stage, t.micro_batch) for t in tasks if t.kind in (F, B, W)]
        assert len(computed) == len(expected)
        assert set(computed) == expected
        if schedule.name == "zeropp":
            of_units = [micro_batch // schedule.unit for _, _, micro_batch in computed]
            assert of_units == sorted(of_units), f"rank {rank}: a unit starts before the last one is done"
        gathered: set[int] = set()
        counts: Counter[tuple[Kind, int]] = Counter()
        open_units: dict[int, Counter[int]] = {stage: Counter() for stage in stages}
        activations = highest = 0.0
        for task in tasks:
            kind, stage = task.kind, task.stage
            counts[kind, stage] += 1
            if kind is F or kind is B:
                assert stage in gathered, f"rank {rank}: {task} on a stage that is not gathered"
                activations += 1.0 if kind is F else -0.5
                highest = max(highest, activations)
            elif kind is W:
                activations -= 0.5
                open_units[stage][task.micro_batch // schedule.unit] += 1
            elif kind is AG:
                assert stage not in gathered, f"rank {rank}: {task} twice"
                gathered.add(stage)
                assert len(gathered) <= schedule.resident, f"rank {rank}: {gathered} gathered"
            elif kind is RSH:
                gathered.remove(stage)
            else:
                assert kind is RS, f"rank {rank}: {task} in a schedule without transfers"
                # Exactly one unit's gradients, whole.
                ((unit, count),) = open_units[stage].items()
                first = unit * schedule.unit
                assert count == min(schedule.unit, schedule.micro_batches - first)
                open_units[stage].clear()
        assert not gathered, f"rank {rank}: {gathered} never released"
        assert not any(open_units.values()), f"rank {rank}: gradients never reduced"
        for stage in stages:
            assert counts[RS, stage] == units
            assert counts[AG, stage] == counts[RSH, stage] >= 1
        assert highest <= most_held(schedule, rank, settings.get("cap")), f"rank {rank} holds {highest}"
        gathers = sum(counts[AG, stage] for stage in stages)
        if schedule.resident == len(stages):
            assert gathers == len(stages)
        elif schedule.resident == 1:
            used = [t.stage for t in tasks if t.kind in (F, B)]
            assert gathers == len(list(itertools.groupby(used)))
            if schedule.name == "zeropp" and not placement.vshape:
                assert gathers == units * (2 * len(stages) - 2) + 1
            if schedule.name == "breadth_first":
                assert gathers == 2 * len(stages) - 1
    lowered = add_transfers(schedule)
    assert lowered.only([F, B, W, AG, RSH, RS]) == schedule
    run(lowered)
    crossing = sum(placement.crosses(stage) for stage in range(schedule.stages)) * schedule.micro_batches
    sent = Counter(task.kind for tasks in lowered.tasks for task in tasks)
    assert {sent[kind] for kind in OTHER_END} == {crossing}
    return schedule


def most_held(schedule: Schedule, rank: int, cap: int | None) -> float:
    """How many activations of a stage a rank may hold, those that wait for W counted half."""
    ranks, per_rank, micro_batches = schedule.ranks, schedule.placement.stages_per_rank, schedule.micro_batches
    if schedule.name in ("zeropp", "zeropp_overlap"):
        return cap or schedule.unit * per_rank
    size = micro_batches // max(1, micro_batches // ranks)  # interleaved 1F1B's rounds
    return {
        "1f1b": ranks - rank,
        "interleaved_1f1b": (per_rank - 1) * size + 2 * (ranks - 1 - rank) + 1,
        "breadth_first": per_rank * micro_batches,
        "zb_h1": ranks,
        "zbv": 2 * ranks,
    }[schedule.name]


def grid(ranks: int, micro_batches: range) -> Iterator[Settings]:
    """Every name, size and placement up to 3 stages a rank."""
    for per_rank, m in itertools.product((1, 2, 3), micro_batches):
        sizes = {"ranks": ranks, "stages_per_rank": per_rank, "micro_batches": m}
        for name, unit, vshape in itertools.product(("zeropp", "zeropp_overlap"), range(1, m + 1), (False, True)):
            yield {"name": name, "unit": unit, "vshape": vshape, **sizes}
        others = ("interleaved_1f1b", "breadth_first", *{1: ("1f1b", "zb_h1"), 2: ("zbv",)}.get(per_rank, ()))
        yield from ({"name": name, **sizes} for name in others)


def drawn(seed: int) -> Settings:
    """One case up to P=8, V=4, M=32, with options."""
    draw = random.Random(seed)
    name = draw.choice(
        ("zeropp", "zeropp_overlap", "zeropp_overlap", "1f1b", "interleaved_1f1b", "breadth_first", "zb_h1", "zbv")
    )
    per_rank = {"1f1b": 1, "zb_h1": 1, "zbv": 2}.get(name) or draw.randint(1, 4)
    m = draw.randint(1, 32)
    settings: Settings = {"name": name, "ranks": draw.randint(1, 8), "stages_per_rank": per_rank, "micro_batches": m}
    if name.startswith("zeropp"):
        unit = settings["unit"] = draw.randint(1, m)
        settings["vshape"] = draw.random() < 0.3
        if (name == "zeropp_overlap" or settings["vshape"]) and draw.random() < 0.6:
            settings["cap"] = draw.randint((per_rank - 1) * unit + 1, 2 * per_rank * unit)
    if draw.random() < 0.7:
        resident = settings["resident"] = draw.randint(1, per_rank)
        settings["prefetch"] = resident > 1 and draw.random() < 0.5
    return settings


# The first eight micro-batches of the grid and 400 seeded cases take about 15 seconds; the rest is slow.


@pytest.mark.parametrize("micro_batches", [range(1, 9), pytest.param(range(9, 13), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_small_schedule(ranks: int, micro_batches: range) -> None:
    for settings in grid(ranks, micro_batches):
        check_and_say(settings)


@pytest.mark.parametrize(
    "seeds", [range(400), *(pytest.param(range(s, s + 400), marks=pytest.mark.slow) for s in (400, 800, 1200, 1600))]
)
def test_drawn_schedules(seeds: range) -> None:
    for seed in seeds:
        check_and_say(drawn(seed))


def check_and_say(settings: Settings) -> None:
    try:
        check(settings)
    except Exception as error:
        error.add_note(f"with {settings}")
        raise


def fewest_gathers(used: list[int], resident: int) -> int:
    """The fewest gathers that serve a rank's F and B with room for ``resident`` stages, over all choices."""
    states = {frozenset[int](): 0}
    for stage in used:
        after: dict[frozenset[int], int] = {}
        for held, gathers in states.items():
            if stage in held:
                choices = [held]
            elif len(held) < resident:
                choices = [held | {stage}]
            else:
                choices = [held - {leaving} | {stage} for leaving in held]
            for choice in choices:
                cost = gathers + (stage not in held)
                after[choice] = min(after.get(choice, cost), cost)
        states = after
    return min(states.values())


def test_no_stage_is_gathered_more_often_than_it_must_be() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        settings = {**drawn(seed), "name": draw.choice(("zeropp", "zeropp_overlap")), "stages_per_rank": 4}
        settings |= {"unit": draw.randint(1, settings["micro_batches"]), "resident": draw.randint(1, 4)}
        schedule = build_schedule(**{**settings, "cap": None, "prefetch": False})
        for rank, tasks in enumerate(schedule.tasks):
            used = [task.stage for task in tasks if task.kind in (F, B)]
            assert schedule.count(AG, rank) == fewest_gathers(used, schedule.resident), settings


def test_prefetching_gathers_a_phase_ahead() -> None:
    # With room for two, a stage's gather stands before the phase in front of its own, not at its edge.
    for seed in range(30):
        schedule = build_schedule(**{**drawn(seed), "name": "breadth_first", "stages_per_rank": 3, "resident": 2,
                                     "prefetch": True, "unit": None, "vshape": None, "cap": None})  # fmt: skip
        for rank, tasks in enumerate(schedule.tasks):
            compute_since: dict[int, int] = {}
            for position, task in enumerate(tasks):
                if task.kind is AG:
                    compute_since[task.stage] = position
                elif task.kind in (F, B) and task.stage in compute_since:
                    between = tasks[compute_since.pop(task.stage) : position]
                    first = task.stage == min(schedule.placement.stages_of(rank)) and position < 3
                    assert first or sum(t.kind in (F, B) for t in between) == schedule.micro_batches


def test_gathers_do_not_depend_on_where_weight_gradients_stand() -> None:
    # W needs no weights: pushing all of them to the end changes no gather and no release.
    for seed in range(100):
        schedule = build_schedule(**drawn(seed))
        for tasks in schedule.tasks:
            compute = [task for task in tasks if task.kind in (F, B, W)]
            late = sorted(compute, key=lambda task: task.kind is W)
            lists = (
                add_collectives(order, schedule.unit, schedule.resident, prefetch=False) for order in (compute, late)
            )
            first, second = ([task for task in list_ if task.kind in (F, B, AG, RSH)] for list_ in lists)
            assert first == second


def test_messages_get_one_order_whatever_the_lists_are() -> None:
    # Any order of F, B and W that respects dependencies, not only those of our schedules.
    for seed in range(200):
        draw = random.Random(seed)
        placement = Placement(draw.randint(1, 4), draw.randint(1, 3), draw.random() < 0.5)
        micro_batches = draw.randint(1, 5)
        lists: list[list[Task]] = [[] for _ in range(placement.ranks)]
        ready = [Task(F, 0, m) for m in range(micro_batches)]
        while ready:
            task = ready.pop(draw.randrange(len(ready)))
            stage, m = task.stage, task.micro_batch
            lists[placement.rank_of(stage)].append(task)
            last = stage == placement.stages - 1
            if task.kind is F:
                ready.append(Task(B, stage, m) if last else Task(F, stage + 1, m))
            elif task.kind is B:
                ready.append(Task(W, stage, m))
                if stage:
                    ready.append(Task(B, stage - 1, m))
        schedule = Schedule("drawn", placement, micro_batches, micro_batches, 1, tuple(map(tuple, lists)))
        lowered = add_transfers(schedule)
        assert lowered.only([F, B, W]) == schedule
        run(lowered)
