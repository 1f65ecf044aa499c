# SPDX-License-Identifier: Apache-2.0
"""What ranks hold, against closed forms that are published for the schedules. Exact."""

import pytest

from lightning_zeroprompt.pipeline import build_schedule
from lightning_zeroprompt.pipeline.costs import BlockCosts
from lightning_zeroprompt.pipeline.memory import most_held, peak_bytes
from lightning_zeroprompt.pipeline.schedule import parse_tasks


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 3), (4, 8)])
def test_activations(ranks, micro_batches):
    def held(name, rank, stages_per_rank=1):
        schedule = build_schedule(name, ranks=ranks, micro_batches=micro_batches, stages_per_rank=stages_per_rank)
        return most_held(schedule, rank).activations

    for rank in range(ranks):
        assert held("1f1b", rank) == min(ranks - rank, micro_batches)
        assert held("breadth_first", rank, 3) == 3 * micro_batches
        assert held("zb_h1", rank) <= ranks
        assert held("zbv", rank, 2) <= 2 * ranks


def test_units_bound_what_is_held():
    schedule = build_schedule("zeropp", ranks=2, stages_per_rank=3, micro_batches=16, unit=4)
    rank_0, rank_1 = (most_held(schedule, rank) for rank in range(2))
    # 2 (P - 1 - r) + (V - 1) U + 1
    assert (rank_0.activations, rank_1.activations) == (11, 9)
    # 2 r + 1 weight gradients wait, and one more between a B and the W that follows it.
    assert (rank_0.weight_inputs, rank_1.weight_inputs) == (2, 4)
    assert rank_0.gathered == rank_1.gathered == 1
    assert most_held(build_schedule("zeropp_overlap", ranks=2, stages_per_rank=3, micro_batches=8), 0).gathered == 2


def test_gradients_are_held_from_the_first_weight_gradient_on():
    stage = BlockCosts(state=600, gradients=100, activations=50, weight_inputs=30)
    two_held = parse_tasks("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1")
    # Weights and moments are 500. Behind the first W: activations of one micro-batch, and the gradients.
    assert peak_bytes(two_held, [stage], [0], 1) == 500 + 50 + 100
    all_held = parse_tasks("F0.0 F0.1 F0.2 F0.3 B0.0 W0.0 B0.1 W0.1 B0.2 W0.2 B0.3 W0.3")
    assert peak_bytes(all_held, [stage], [0], 1) == 500 + 3 * 50 + 100
    late = parse_tasks("F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3 W0.0 W0.1 W0.2 W0.3")
    assert peak_bytes(late, [stage], [0], 1) == 500 + 4 * 50


def test_shards_of_gradients_are_held_from_the_first_reduction_on():
    stage = BlockCosts(parameters=100, state=600, gradients=100, activations=50)
    tasks = parse_tasks("AG0 F0.0 B0.0 W0.0 RSH0 RS0 AG0 F0.1 B0.1 W0.1 RSH0 RS0")
    # Of four ranks: 125 of weights and moments, the stage gathered, activations; in the second unit the shards too.
    assert peak_bytes(tasks, [stage], [0], 4) == 125 + 100 + 100 + 50 + 25
