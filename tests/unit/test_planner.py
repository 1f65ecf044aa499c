# SPDX-License-Identifier: Apache-2.0
"""Plans against every published schedule, against an exact solver, and against their own memory limit.

What is compared is simulated; that simulations are right is another file's matter. Plans are run by the strict
interpreter, so what is chosen can be executed.
"""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from interpreter import run

from lightning_zeroprompt.pipeline import SCHEDULES, Kind, Placement, build_schedule
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link
from lightning_zeroprompt.pipeline.drafts import settings_of
from lightning_zeroprompt.pipeline.local_search import Orders, improve
from lightning_zeroprompt.pipeline.orders import ListCosts, list_schedule
from lightning_zeroprompt.pipeline.partition import measured_cuts
from lightning_zeroprompt.pipeline.planner import plan
from lightning_zeroprompt.pipeline.recut import recut
from lightning_zeroprompt.pipeline.schedule import COMPUTE
from lightning_zeroprompt.pipeline.simulator import Simulator, simulate

LAYER = {"forward": 1.0, "backward": 1.4, "weight": 0.8}
BYTES = {"parameters": 100, "gradients": 100, "state": 600, "activations": 50, "weight_inputs": 30, "output": 10}


def random_costs(rng, blocks):
    link = {"contention": rng.choice([1.0, 1.1])}
    return Costs.uniform(
        blocks,
        forward=1.0,
        backward=rng.uniform(0.9, 2.2),
        weight=rng.uniform(0.3, 1.1),
        host_forward=rng.choice([0.0, 0.5]),
        host_backward=rng.choice([0.0, 0.5]),
        **BYTES,
        message=Link(rng.choice([0.0, 0.02, 0.1]), rng.choice([100.0, 1000.0]), **link),
        gather=Link(0.05, rng.choice([100.0, 1000.0]), **link),
        reduce=Link(0.05, rng.choice([100.0, 1000.0])),
        behind=BlockCosts(*(rng.uniform(0, 2) for _ in range(3))),
        host_action=rng.choice([0.0, 0.02]),
        transport=rng.choice(["copy_engine", "nccl"]),
    )


def fixed_schedules(costs, ranks, micro_batches, data_parallel):
    """Simulated seconds and bytes of all published schedules, with all units and resident stages that are usual."""
    per_rank = {"1f1b": (1,), "zb_h1": (1,), "zbv": (2,)}
    for name in SCHEDULES:
        unit_sizes = {micro_batches, max(1, micro_batches // 2), min(micro_batches, ranks)}
        for stages, vshape, unit in itertools.product(
            per_rank.get(name, (1, 2, 3)), (False, True), unit_sizes if name.startswith("zeropp") else (None,)
        ):
            if ranks * stages > len(costs.blocks) or (vshape and not name.startswith("zeropp")):
                continue
            kinds = {1, stages} if data_parallel > 1 and unit is not None else {stages}
            for resident in kinds:
                schedule = build_schedule(
                    name,
                    ranks=ranks,
                    micro_batches=micro_batches,
                    stages_per_rank=stages,
                    unit=unit,
                    vshape=vshape if unit is not None else None,
                    resident=resident,
                )
                cuts = measured_cuts(costs, schedule.placement)
                step = simulate(schedule, costs, cuts, data_parallel=data_parallel)
                yield step.seconds, max(step.peak_bytes)


@pytest.mark.parametrize("seed", range(8))
def test_no_published_schedule_is_faster(seed):
    rng = random.Random(seed)
    ranks, micro_batches, data_parallel = (1, 2, 3, 4)[seed % 4], rng.choice([2, 4, 6, 8]), rng.choice([1, 4])
    costs = random_costs(rng, rng.choice([ranks, 2 * ranks, 9]))
    found = plan(costs, ranks=ranks, micro_batches=micro_batches, data_parallel=data_parallel)
    fixed = list(fixed_schedules(costs, ranks, micro_batches, data_parallel))
    assert found.best.seconds <= 1.005 * min(seconds for seconds, _ in fixed)
    # What is promised is what a simulation of the plan says, and it can be executed.
    again = simulate(found.schedule, costs, found.cuts, data_parallel=data_parallel)
    assert (again.seconds, max(again.peak_bytes)) == (found.best.seconds, found.best.peak_bytes)
    run(found.schedule)
    # Under a limit in the middle of what they need it is no slower than those that fit.
    limit = sorted(peak for _, peak in fixed)[len(fixed) // 2]
    limited = plan(costs, ranks=ranks, micro_batches=micro_batches, data_parallel=data_parallel, memory_limit=limit)
    assert limited.best.peak_bytes <= limit
    assert limited.best.seconds <= 1.005 * min(seconds for seconds, peak in fixed if peak <= limit)


def test_candidates_run_and_none_of_the_pareto_set_is_beaten():
    costs = random_costs(random.Random(5), 9)
    found = plan(costs, ranks=3, micro_batches=4, data_parallel=2)
    for candidate in found.candidates:
        run(candidate.schedule)
        tasks = Counter(task for tasks in candidate.schedule.only(COMPUTE).tasks for task in tasks)
        assert len(tasks) == 3 * candidate.schedule.stages * 4
        assert set(tasks.values()) == {1}
    assert [each.seconds for each in found.candidates] == sorted(each.seconds for each in found.candidates)
    figures = [(each.seconds, each.peak_bytes, each.bytes_per_gpu) for each in found.candidates]
    chosen = [(each.seconds, each.peak_bytes, each.bytes_per_gpu) for each in found.pareto]
    assert len(chosen) > 2
    for one in figures:
        assert any(all(a <= b for a, b in zip(two, one, strict=True)) for two in chosen)
    for one, two in itertools.permutations(chosen, 2):
        assert not all(a <= b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_is_within_3_per_cent_of_the_optimum(seed):
    """Of all orders on its placement, as CP-SAT finds it; seconds are rounded to thousandths there."""
    cp_model = pytest.importorskip("ortools.sat.python.cp_model")
    rng = random.Random(seed)
    ranks, per_rank, micro_batches = rng.choice([(2, 1, 4), (2, 2, 4), (3, 1, 4), (3, 2, 3), (2, 2, 3)])
    costs = Costs.uniform(
        ranks * per_rank,
        forward=1.0,
        backward=rng.choice([1.0, 1.4, 1.8]),
        weight=rng.choice([0.5, 0.8, 1.0]),
        output=1,
        message=Link(rng.choice([0.0, 0.1]), 1e12),
        behind=BlockCosts(forward=0.4, backward=0.5, weight=0.4),
    )
    found = plan(costs, ranks=ranks, micro_batches=micro_batches, stages_per_rank=per_rank, jitter=0.0)
    least = min(
        optimum(cp_model, Placement(ranks, per_rank, vshape), micro_batches, costs)
        for vshape in ((False, True) if per_rank > 1 else (False,))
    )
    assert 0.999 * least <= found.best.seconds <= 1.03 * least


def optimum(cp_model, placement, micro_batches, costs):
    """The shortest makespan of any order on a placement of one block a stage."""
    model, scale, last = cp_model.CpModel(), 1000, placement.stages - 1
    blocks = list(costs.blocks)
    end = costs.behind
    blocks[last] = replace(
        blocks[last],
        forward=blocks[last].forward + end.forward,
        backward=blocks[last].backward + end.backward,
        weight=blocks[last].weight + end.weight,
    )
    length = {
        (kind, stage): round(scale * seconds)
        for stage, block in enumerate(blocks)
        for kind, seconds in (("F", block.forward), ("B", block.backward), ("W", block.weight))
    }
    horizon = micro_batches * sum(length.values())
    lanes = [[] for _ in range(placement.ranks)]
    ends = {}
    for (kind, stage), seconds in length.items():
        for m in range(micro_batches):
            start, ends[kind, stage, m] = (model.new_int_var(0, horizon, f"{kind}{stage}.{m}{x}") for x in "se")
            lanes[placement.rank_of(stage)].append(
                model.new_interval_var(start, seconds, ends[kind, stage, m], f"{kind}{stage}.{m}")
            )
    for (kind, stage, m), done in ends.items():
        needed = {"F": ("F", stage - 1), "B": ("B", stage + 1) if stage < last else ("F", stage), "W": ("B", stage)}[
            kind
        ]
        if needed[1] >= 0:
            crosses = placement.rank_of(needed[1]) != placement.rank_of(stage)
            lag = round(scale * costs.message.seconds(1)) if crosses else 0
            model.add(done - length[kind, stage] >= ends[*needed, m] + lag)
        if kind == "F" and stage == 0 and m:
            model.add(done >= ends[kind, stage, m - 1])  # micro-batches are alike
    for lane in lanes:
        model.add_no_overlap(lane)
    makespan = model.new_int_var(0, horizon, "makespan")
    for done in ends.values():
        model.add(makespan >= done)
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = 20
    solver.parameters.num_workers = 2
    solver.solve(model)
    return solver.best_objective_bound / scale


def test_local_search_keeps_memory_and_never_loses():
    placement, costs = Placement(3, 2, vshape=True), [ListCosts(1.0, 1.4, 0.8, 0.05)] * 6
    start = list_schedule(placement, 6, 3, held=(6.0,) * 3, costs=costs)
    orders = Orders(placement, 6, costs, tails=[0.0] * 3, limits=[6.0] * 3)
    first = orders.judge(orders.numbers(start))[0]
    seconds, lists = improve(orders, orders.numbers(start), moves=2000)
    assert seconds < 0.97 * first
    assert seconds == orders.judge(lists)[0]
    assert improve(orders, orders.numbers(start), moves=2000) == (seconds, lists)
    change = {Kind.FORWARD: 1.0, Kind.BACKWARD: -0.5, Kind.WEIGHT: -0.5}
    for tasks, before in zip(orders.tasks(lists), start, strict=True):
        assert max(itertools.accumulate(change[task.kind] for task in tasks)) <= 6
        assert set(tasks) == set(before)
    kept = Orders(placement, 6, costs, tails=[0.0] * 3, resident_order=True)
    moved = kept.tasks(improve(kept, kept.numbers(start), moves=2000)[1])
    for tasks, before in zip(moved, start, strict=True):
        fixed = [task for task in before if task.kind is not Kind.WEIGHT]
        assert [task for task in tasks if task.kind is not Kind.WEIGHT] == fixed


HEAD = BlockCosts(1.45, 2.03, 1.16)


def test_smaller_first_stages_start_everybody_sooner():
    setting = settings_of(Costs.uniform(32, **LAYER, behind=HEAD), 2, 2, 1, None, [2], [False])[0]
    order = list_schedule(setting.placement, 2, 2, costs=setting.list_costs)
    orders = setting.orders(keep=False, resident=2)
    numbers = orders.numbers(order)
    before = orders.judge(numbers)[0]
    moved = recut(setting, numbers, resident=2, tries=3000)
    assert moved.orders(keep=False, resident=2).judge(numbers)[0] < 0.97 * before
    assert moved.cuts[0][1] < setting.cuts[0][1]
    assert (moved.cuts[0][0], moved.cuts[-1][1]) == (0, 32)
    assert moved == recut(setting, numbers, resident=2, tries=3000)
    # A single block a stage leaves nothing to move.
    fixed = settings_of(Costs.uniform(4, **LAYER), 2, 2, 1, None, [2], [False])[0]
    assert recut(fixed, numbers, resident=2, tries=100) is fixed


def test_cuts_move_within_the_memory_limit():
    """A head of 6 layers wants 19 of 32 blocks on the other rank; there is memory for 17."""
    head = BlockCosts(6.0, 8.4, 4.8)
    costs = Costs.uniform(32, **LAYER, activations=10, weight_inputs=5, state=100, behind=head)
    even = ((0, 8), (8, 16), (16, 24), (24, 32))
    free = replace(settings_of(costs, 2, 2, 1, None, [2], [False])[0], cuts=even)
    orders = free.orders(keep=False, resident=2)
    numbers = orders.numbers(list_schedule(free.placement, 2, 2, costs=free.list_costs))
    # All activations are held at once, so ranks need as much as they have blocks.
    limited = replace(free, memory_limit=17 * (2 * 10 + 100))
    before = limited.orders(keep=False, resident=2).judge(numbers)[0]

    def most_blocks(setting):
        return max(
            sum(setting.cuts[stage][1] - setting.cuts[stage][0] for stage in setting.placement.stages_of(rank))
            for rank in range(2)
        )

    moved = recut(limited, numbers, resident=2, tries=3000)
    assert moved.orders(keep=False, resident=2).judge(numbers)[0] < before
    assert most_blocks(moved) <= 17 < most_blocks(recut(free, numbers, resident=2, tries=3000))


def test_equal_input_gives_equal_plans():
    costs = random_costs(random.Random(1), 8)
    one, two = (plan(costs, ranks=2, micro_batches=6) for _ in range(2))
    assert one == two


def test_v_shaped_orders_are_found_that_nobody_published():
    """At P=3, M=4, with a head of 0.3 layers and dear messages, in 4 % less time than any published schedule."""
    head = BlockCosts(forward=0.3, backward=0.34, weight=0.1)
    costs = Costs.uniform(6, forward=1.0, backward=1.7, weight=0.5, output=1, message=Link(0.1, 1e9), behind=head)
    found = plan(costs, ranks=3, micro_batches=4)
    assert found.best.seconds < 0.96 * min(seconds for seconds, _ in fixed_schedules(costs, 3, 4, 1))
    assert found.strategy_arguments()["schedule"] == "auto"


def test_all_layouts_do_the_same_work():
    costs = Costs.uniform(8, **LAYER, **BYTES, gather=Link(5.0, 10.0), reduce=Link(5.0, 10.0))
    found = plan(costs, gpus=4, micro_batches=16)
    assert {candidate.gpus for candidate in found.candidates} == {4}
    layouts = {(each.schedule.ranks, each.data_parallel, each.schedule.micro_batches) for each in found.candidates}
    assert layouts == {(1, 4, 4), (2, 2, 8), (4, 1, 16)}
    assert found.ideal_seconds == pytest.approx(16 * 8 * 3.2 / 4)
    # With gathers that dear a pipeline without any wins, with free ones data parallelism alone does.
    assert found.best.data_parallel == 1
    free = replace(costs, gather=Link(0.0, 1e9), reduce=Link(0.0, 1e9))
    assert plan(free, gpus=4, micro_batches=16).best.schedule.ranks == 1


def test_arguments_to_paste_build_the_schedule():
    costs = Costs.uniform(4, **LAYER)
    found = plan(costs, ranks=2, micro_batches=3, stages_per_rank=1)
    arguments = found.strategy_arguments()
    assert arguments["pipeline_parallel_size"] == 2
    assert (arguments["data_parallel_size"], arguments["stages_per_rank"], arguments["num_microbatches"]) == (1, 1, 3)
    for candidate in found.candidates:
        if candidate.arguments is not None and not candidate.arguments["name"].startswith("zeropp_overlap"):
            built = build_schedule(ranks=2, micro_batches=3, **candidate.arguments)
            assert built.only(COMPUTE).tasks == candidate.schedule.only(COMPUTE).tasks


def smallest_limit(costs, **settings):
    """What the error about a limit that nothing fits names as enough."""
    with pytest.raises(ValueError, match="nothing fits") as caught:
        plan(costs, memory_limit=1, **settings)
    return int(str(caught.value).split(" bytes)")[0].split("(")[-1])


def test_recomputation_is_used_where_memory_needs_it():
    costs = Costs.uniform(8, **LAYER, **BYTES)
    free = plan(costs, ranks=2, micro_batches=8, memory_limit=10**6)
    assert not free.best.recompute
    tight = smallest_limit(costs, ranks=2, micro_batches=8, recompute=False) - 1
    saving = plan(costs, ranks=2, micro_batches=8, memory_limit=tight)
    assert saving.best.recompute
    assert saving.best.peak_bytes <= tight
    assert saving.best.seconds > free.best.seconds
    assert saving.strategy_arguments()["activation_checkpointing"]
    with pytest.raises(ValueError, match=r"nothing fits.*recomputation \(recompute=None or True\): \d"):
        plan(costs, ranks=2, micro_batches=8, memory_limit=tight, recompute=False)


def test_a_limit_that_nothing_fits_says_the_smallest_that_something_does():
    costs = Costs.uniform(4, **LAYER, **BYTES)
    with pytest.raises(ValueError, match="nothing fits") as caught:
        plan(costs, ranks=2, micro_batches=4, memory_limit=1000)
    message = str(caught.value)
    assert "memory_limit=0.000 GiB a GPU" in message
    for words in ("twice the pipeline ranks (4)", "twice the data-parallel ranks (2)", "half the rows", "cpu_offload"):
        assert words in message
    smallest = smallest_limit(costs, ranks=2, micro_batches=4)
    assert plan(costs, ranks=2, micro_batches=4, memory_limit=smallest).best.peak_bytes <= smallest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "ranks=None, gpus=None: give one of them"),
        ({"ranks": 2, "gpus": 2}, "ranks=2, gpus=2: give one of them"),
        ({"ranks": 0}, "ranks=0: give at least 1"),
        ({"ranks": 2, "micro_batches": 0}, "micro_batches=0: give at least 1"),
        ({"ranks": 2, "data_parallel": -1}, "data_parallel=-1: give at least 1"),
        ({"ranks": 5}, "5 ranks need a block each, there are 4"),
        (
            {"ranks": 2, "stages_per_rank": 3},
            "stages_per_rank=3 on 2 ranks are 6 stages, there are 4 blocks.*use 1 to 2",
        ),
        ({"gpus": 16, "micro_batches": 3}, "16 GPUs, 3 micro-batches, 4 blocks: no pipeline"),
        ({"gpus": 2, "stages_per_rank": 9}, "stages_per_rank=9: no layout of 2 GPUs"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(Costs.uniform(4, **LAYER), **{"micro_batches": 4, **settings})


def test_a_plan_bears_slower_hosts():
    """With hosts as measured V=3 is 1 % faster than V=1; with slow ones it takes a fifth longer, and V=1 does not."""
    link = Link(2e-5, 3e11)
    times = dict.fromkeys(("host_forward", "host_backward"), 0.2e-3) | {"host_weight": 0.08e-3}
    block = BlockCosts(
        forward=0.3e-3, backward=0.4e-3, weight=0.3e-3, activations=10**8, weight_inputs=10**8, output=10**7, **times
    )
    costs = Costs((block,) * 32, link, link, link, host_action=0.12e-3)
    found = plan(costs, ranks=2, micro_batches=16)
    simulator = Simulator(found.schedule, costs, found.cuts)
    assert simulator.run(slower_hosts=1.75).seconds < 1.05 * found.best.seconds
    assert found.best.seconds < 1.025 * found.candidates[0].seconds
    fastest = found.candidates[0]
    slow = Simulator(fastest.schedule, costs, fastest.cuts).run(slower_hosts=1.75)
    assert slow.seconds > 1.15 * fastest.seconds
