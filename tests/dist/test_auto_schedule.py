# SPDX-License-Identifier: Apache-2.0
"""``schedule="auto"``: plans before and behind the recorded step train as one process does, on every rank alike."""

import pytest
import torch

from lightning_zeroprompt.pipeline.catalogue import build_schedule
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.schedule import COMPUTE, Kind
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

    costs = measured_costs(recorded(seconds), [10, 20, 30, 40])
    for stage, block in enumerate(costs.blocks):
        assert (block.forward, block.backward, block.weight) == pytest.approx(
            (1.0 * (stage + 1), 2.0 * (stage + 1), 0.5 * (stage + 1))
        )
        assert block.parameters == 10 * (stage + 1)


def test_plans_keep_the_placement_and_follow_what_was_measured():
    auto = AutoSchedule(None, None)
    placement, cuts = auto.cut(chain(), ranks=2, data=1, micro_batches=4)
    assert (placement.ranks, placement.stages_per_rank, len(cuts)) == (2, 2, 4)
    before = {count: auto.build(placement, 1, count)[0] for count in (1, 3, 4, 8)}
    assert {schedule.placement for schedule in before.values()} == {placement}
    assert {count: schedule.micro_batches for count, schedule in before.items()} == {n: n for n in before}

    def slow_weights(task):
        return {Kind.FORWARD: 1.0, Kind.BACKWARD: 1.0, Kind.WEIGHT: 5.0}[task.kind]

    auto.learn(recorded(slow_weights), [1] * 4)
    behind, _ = auto.build(placement, 1, 8)
    assert behind.placement == placement
    again, _ = auto.build(placement, 1, 8)
    assert behind.tasks == again.tasks


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
    with pytest.raises(ValueError, match="costs with schedule='zbv': only 'auto' plans with them"):
        ZeroPPStrategy(schedule="zbv", costs="costs.json")
