# SPDX-License-Identifier: Apache-2.0
"""``schedule="auto"``: plans before and behind the recorded step train as one process does, on every rank alike."""

import pytest
import torch

from lightning_zeroprompt.pipeline.catalogue import build_schedule
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link, stage_costs
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.schedule import COMPUTE, Kind
from lightning_zeroprompt.pipeline.simulator import simulate
from lightning_zeroprompt.pipeline.timeline import Lane, TaskSpan
from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.strategies.auto import AutoSchedule, estimated_costs, measured_costs
from tests.dist.contract import LM, loader, trainer


def fit(strategy, optimizer="sgd"):
    torch.set_default_dtype(torch.float64)
    module = LM(optimizer)
    fitting = trainer(strategy, max_epochs=2)
    fitting.fit(module, loader(strategy, rows=44))
    return module, fitting


def planned(strategy):
    (alone, _), (module, fitting) = fit("auto"), fit(strategy)
    own = fitting.strategy
    schedules = {count: [list(map(str, tasks)) for tasks in one.tasks] for count, one in own._schedules.items()}
    return alone.losses, module.losses, own._auto.measured, schedules


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, {"num_microbatches": 4}),
        (2, {"num_microbatches": 4, "stages_per_rank": 1}),
        (4, {"data_parallel_size": 2, "num_microbatches": 2}),
    ],
    ids=str,
)
def test_losses_are_those_of_one_process(run_ranks, ranks, strategy):
    found = run_ranks(planned, ranks, {"schedule": "auto", **strategy})
    parts = strategy.get("data_parallel_size", 1)
    for rank, (alone, losses, measured, schedules) in enumerate(found):
        # The order is planned anew behind the third of 12 batches; the last of each epoch has fewer rows.
        assert measured
        assert len(losses) == len(alone) == 12
        # Losses are those of a rank's rows.
        pipeline = [found[rank - rank % parts + part][1] for part in range(parts)]
        assert torch.tensor(pipeline, dtype=torch.float64).mean(0).tolist() == pytest.approx(alone, abs=1e-9)
        assert schedules == found[0][3]


def chain():
    torch.manual_seed(0)
    return find_chain(LM().net)


def test_estimates_go_with_the_parameters():
    found = chain()
    costs = estimated_costs(found)
    assert len(costs.blocks) == 6
    assert len(set(costs.blocks)) == 1
    block = costs.blocks[0]
    assert (block.backward / block.forward, block.weight / block.forward) == pytest.approx((1.4, 0.85))
    assert block.parameters == sum(p.numel() * p.element_size() for p in found.blocks[0].parameters())


def recorded(seconds):
    """Lanes of a schedule of two ranks whose tasks take given times, one after another."""
    schedule = build_schedule("zeropp", ranks=2, micro_batches=4, stages_per_rank=2)
    lanes = []
    for tasks in schedule.tasks:
        clock, spans = 0.0, []
        for task in tasks:
            if task.kind in COMPUTE:
                spans.append(TaskSpan(task, clock, clock + seconds(task)))
                clock = spans[-1].end
        lanes.append(Lane(tuple(spans), (), None))
    return lanes


def test_measured_costs_are_medians():
    def seconds(task):
        usual = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.WEIGHT: 0.5}[task.kind] * (task.stage + 1)
        return usual + (100.0 if task.micro_batch == 3 else 0.0)

    link = Link(1e-5, 1e10)
    known = [BlockCosts(1.0, 1.0, 1.0, 1.5, parameters=10 * stage, activations=stage) for stage in range(1, 5)]
    costs = measured_costs(recorded(seconds), Costs(tuple(known), link, link, link))
    for stage, block in enumerate(costs.blocks, 1):
        assert (block.forward, block.backward, block.weight) == pytest.approx((1.0 * stage, 2.0 * stage, 0.5 * stage))
        assert block.whole_backward == pytest.approx(2.5 * stage)
        assert (block.parameters, block.activations) == (10 * stage, stage)
    assert costs.message == link


def test_plans_keep_the_placement_and_follow_what_was_measured():
    auto = AutoSchedule(None, None)
    placement, cuts = auto.cut(chain(), ranks=2, data=1, micro_batches=4)
    assert (placement.ranks, placement.stages_per_rank, len(cuts)) == (2, 2, 4)
    before = {count: auto.build(placement, 1, count)[0] for count in (1, 3, 4, 8)}
    assert {schedule.placement for schedule in before.values()} == {placement}
    assert {count: schedule.micro_batches for count, schedule in before.items()} == {n: n for n in before}

    def slow_weights(task):
        return {Kind.FORWARD: 1.0, Kind.BACKWARD: 1.0, Kind.WEIGHT: 5.0}[task.kind]

    auto.learn(recorded(slow_weights))
    behind, _ = auto.build(placement, 1, 8)
    assert behind.placement == placement
    again, _ = auto.build(placement, 1, 8)
    assert behind.tasks == again.tasks


@pytest.mark.parametrize(("slower", "kept"), [({}, True), ({Kind.FORWARD: 1.15}, True), ({Kind.WEIGHT: 3.0}, False)])
def test_given_costs_are_kept_while_recorded_times_are_in_their_proportion(slower, kept):
    auto = AutoSchedule(sized(), 2)
    placement, _ = auto.cut(chain(), ranks=2, data=1, micro_batches=4)
    before = auto._stages
    assert before is not None
    field = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.WEIGHT: "weight"}

    def seconds(task):
        # A machine of half the speed.
        return 2 * slower.get(task.kind, 1.0) * getattr(before.blocks[task.stage], field[task.kind])

    auto.learn(recorded(seconds))
    assert auto.measured
    assert (auto._stages is before) == kept
    if not kept:
        assert auto._stages.blocks[0].weight == pytest.approx(6 * before.blocks[0].weight)
        assert auto.build(placement, 1, 4)[0].placement == placement


def test_given_costs_make_the_cut(tmp_path):
    link = Link(0.0, 1e15)
    slow_start = (BlockCosts(forward=3.0, backward=3.0, weight=3.0, output=1),) * 2
    rest = (BlockCosts(forward=1.0, backward=1.0, weight=1.0, output=1),) * 4
    costs = Costs((*slow_start, *rest), link, link, link)
    costs.save(tmp_path / "costs.json")
    auto = AutoSchedule(tmp_path / "costs.json", 1)
    _, cuts = auto.cut(chain(), ranks=2, data=1, micro_batches=4)
    assert cuts == [(0, 2), (2, 6)] or cuts == [(0, 1), (1, 6)]
    with pytest.raises(ValueError, match="costs of 5 blocks for a model with 6"):
        AutoSchedule(Costs(costs.blocks[:5], link, link, link), 1).cut(chain(), 2, 1, 4)


def sized():
    """Costs of the model's six blocks whose fastest order holds more than others."""
    link = Link(0.0, 1e15)
    block = BlockCosts(1.0, 1.4, 0.85, gradients=10, state=40, activations=100, weight_inputs=60, output=5)
    return Costs((block,) * 6, link, link, link)


@pytest.mark.parametrize("recompute", [False, True])
def test_plans_keep_the_memory_limit(recompute):
    costs = sized()
    used = costs.recomputed() if recompute else costs

    def peaks(limit):
        """Before and behind the recorded batch, for the expected number of micro-batches and another."""
        auto = AutoSchedule(costs, None, limit, recompute=recompute)
        placement, cuts = auto.cut(chain(), ranks=2, data=1, micro_batches=8)
        for _ in range(2):
            for count in (8, 6):
                schedule, _ = auto.build(placement, 1, count)
                # Tasks that take other times than the costs say.
                yield max(simulate(schedule, used, cuts).peak_bytes)
            if not auto.measured:
                auto.learn(slow(schedule))

    def slow(schedule):
        lanes = []
        for tasks in schedule.tasks:
            spans = [
                TaskSpan(task, 3.0 * at, 3.0 * at + 2.5)
                for at, task in enumerate(t for t in tasks if t.kind in COMPUTE)
            ]
            lanes.append(Lane(tuple(spans), (), None))
        return lanes

    free = list(peaks(None))
    limit = round(0.8 * min(free))
    assert all(peak <= limit for peak in peaks(limit))
    assert max(free) > limit


def test_plans_fit_the_smallest_gpu_unless_told_otherwise():
    costs, gpu = sized(), 10**6

    def peak(limit, sizes):
        auto = AutoSchedule(costs, None, limit)
        auto.limit_to_gpus(sizes)
        placement, cuts = auto.cut(chain(), ranks=2, data=1, micro_batches=8)
        return max(simulate(auto.build(placement, 1, 8)[0], costs, cuts).peak_bytes)

    free = peak(None, [])
    assert peak(None, [gpu, gpu]) == free
    small = round(0.9 * free)
    assert peak(None, [gpu, small]) <= 0.85 * small
    assert peak(gpu, [gpu, small]) == free
    with pytest.raises(ValueError, match="nothing fits") as raised:
        peak(None, [200])
    assert raised.value.__notes__ == ["(the limit is 85% of the smallest GPU; memory_limit= sets another)"]


def test_a_limit_that_nothing_fits():
    auto = AutoSchedule(sized(), None, 200)
    with pytest.raises(
        ValueError, match=r"memory_limit=.* nothing fits\. The smallest is .* bytes\)\. What would help"
    ):
        auto.cut(chain(), ranks=2, data=1, micro_batches=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "auto", "memory_limit": 10**9}, "nothing says what blocks hold; give costs= measured"),
        ({"schedule": "zbv", "memory_limit": 10**9}, "memory_limit with schedule='zbv': only 'auto' plans with it"),
        ({"schedule": "auto", "memory_limit": 0, "costs": sized()}, "memory_limit=0: give bytes a GPU"),
    ],
    ids=["no costs", "no plan", "zero"],
)
def test_limits_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroPPStrategy(**settings)


def test_an_order_is_kept_where_no_other_is_clearly_faster():
    auto = AutoSchedule(sized(), None)
    placement, cuts = auto.cut(chain(), ranks=2, data=1, micro_batches=8)
    before, _ = auto.build(placement, 1, 8)
    stages = stage_costs(sized(), cuts)
    field = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.WEIGHT: "weight"}
    lanes = [
        Lane(
            tuple(TaskSpan(t, 0.0, getattr(stages[t.stage], field[t.kind])) for t in tasks if t.kind in field), (), None
        )
        for tasks in before.tasks
    ]
    auto.learn(lanes)
    assert auto.build(placement, 1, 8)[0] is before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": 2}, "schedule='auto' chooses unit itself"),
        ({"vshape": True, "resident": 1}, "schedule='auto' chooses resident, vshape itself"),
    ],
)
def test_what_auto_chooses_is_not_given(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroPPStrategy(schedule="auto", **settings)


def test_costs_without_a_planner():
    with pytest.raises(ValueError, match="costs with schedule='zbv': only 'auto' plans with it"):
        ZeroPPStrategy(schedule="zbv", costs="costs.json")
