# SPDX-License-Identifier: Apache-2.0
"""Cuts against all cuts there are; layouts against their definition."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_zeroprompt.pipeline.layout import Layout
from lightning_zeroprompt.pipeline.partition import balanced_cuts, module_cost
from lightning_zeroprompt.pipeline.schedule import Placement

COSTS = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=8)


def stage_costs(costs, cuts, before, behind):
    sums = [sum(costs[first:end]) for first, end in cuts]
    sums[0] += before
    sums[-1] += behind
    return max(sums), sum(cost * cost for cost in sums)


@settings(max_examples=200, deadline=None)
@given(costs=COSTS, stages=st.integers(1, 5), before=st.integers(0, 20), behind=st.integers(0, 20))
def test_no_other_cut_is_better(costs, stages, before, behind):
    if len(costs) < stages:
        with pytest.raises(ValueError, match=rf"{len(costs)} blocks cannot fill {stages} stages.* use fewer ranks"):
            balanced_cuts(costs, stages)
        return
    cuts = balanced_cuts(costs, stages, before=before, behind=behind)
    assert [first for first, _ in cuts[1:]] == [end for _, end in cuts[:-1]]
    assert (cuts[0][0], cuts[-1][1], len(cuts)) == (0, len(costs), stages)
    every = []
    for inner in itertools.combinations(range(1, len(costs)), stages - 1):
        edges = [0, *inner, len(costs)]
        every.append(stage_costs(costs, list(itertools.pairwise(edges)), before, behind))
    least = min(largest for largest, _ in every)
    assert stage_costs(costs, cuts, before, behind)[0] == least


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(1, 9).map(float), min_size=4, max_size=10),
    vshape=st.booleans(),
    behind=st.integers(0, 20),
)
def test_ranks_with_two_stages_are_even_too(costs, vshape, behind):
    """Within 20 % of the best of all cuts of a few blocks, and never worse than cuts that look at stages alone."""
    placement = Placement(2, 2, vshape)

    def value(edges):
        of_stages = [sum(costs[first:end]) for first, end in itertools.pairwise(edges)]
        of_stages[-1] += behind
        of_ranks = [0.0, 0.0]
        for stage, cost in enumerate(of_stages):
            of_ranks[placement.rank_of(stage)] += cost
        return max(of_ranks) / 2 + max(of_stages) / 4

    def edges(cuts):
        return [first for first, _ in cuts] + [cuts[-1][1]]

    cuts = balanced_cuts(costs, 4, behind=behind, rank_of=placement.rank_of)
    assert [first for first, _ in cuts[1:]] == [end for _, end in cuts[:-1]]
    assert (cuts[0][0], cuts[-1][1], len(cuts)) == (0, len(costs), 4)
    found = value(edges(cuts))
    assert found <= value(edges(balanced_cuts(costs, 4, behind=behind)))
    best = min(value([0, *inner, len(costs)]) for inner in itertools.combinations(range(1, len(costs)), 3))
    assert found <= 1.2 * best


def test_a_rank_with_the_head_gets_fewer_layers_in_all():
    # 32 half-layers of 1 and 2, and a head of 3: by stages alone the rank without the head has 3 % more than its share.
    costs = [0.0, *([1.0, 2.0] * 32), 3.2]
    placement = Placement(2, 2, vshape=True)

    def heaviest(cuts):
        sums = [sum(costs[first:end]) for first, end in cuts]
        return max(sums[0] + sums[3], sums[1] + sums[2])

    assert heaviest(balanced_cuts(costs, 4)) == 51
    assert heaviest(balanced_cuts(costs, 4, rank_of=placement.rank_of)) < 50.3


def test_cost_counts_what_is_multiplied():
    linear = nn.Linear(10, 20)
    assert module_cost(linear) == pytest.approx(200, abs=0.01)
    assert module_cost(nn.Conv2d(3, 4, 5)) == pytest.approx(300, abs=0.01)
    assert module_cost(nn.Sequential(nn.Embedding(1000, 10), nn.LayerNorm(10))) < 1
    # A weight used twice is one parameter, wherever it is used.
    assert module_cost(nn.ModuleList([linear, linear])) == module_cost(linear)
    # Of two blocks with equal products the one with more to look up costs more.
    assert module_cost(nn.ModuleList([linear, nn.Embedding(9, 9)])) > module_cost(linear)


def test_ranks_of_a_layout_are_numbered_pipeline_first():
    layout = Layout(3, 4, 2)
    ranks = [layout.global_rank(p, d) for p in range(3) for d in range(4)]
    assert ranks == list(range(12))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 1, 1), "pipeline=0"), ((1, -1, 1), "data=-1"), ((1, 4, 3), "4 data-parallel ranks cannot hold 3 replicas")],
)
def test_sizes_that_are_none(sizes, message):
    with pytest.raises(ValueError, match=message):
        Layout(*sizes)
