# SPDX-License-Identifier: Apache-2.0
"""Costs: files that people edit are read as they were written, and what cannot be is refused by name."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link, costs_of_ranks, stage_costs

SECONDS = st.floats(1e-6, 1e3)
BYTES = st.integers(0, 10**12)
BLOCK = st.builds(
    BlockCosts, SECONDS, SECONDS, SECONDS, st.none() | SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, *[BYTES] * 7
)
LINK = st.builds(Link, SECONDS, SECONDS, st.floats(1, 3), st.floats(1, 3))


def small(**changes):
    costs = Costs.uniform(3, forward=1.0, backward=2.0, weight=0.5, output=4, activations=10, weight_inputs=6)
    return replace(costs, **changes)


@settings(max_examples=50, deadline=None)
@given(
    blocks=st.lists(BLOCK, min_size=1, max_size=4),
    repeats=st.integers(1, 3),
    links=st.tuples(LINK, LINK, LINK),
    ends=st.tuples(BLOCK, BLOCK),
    transport=st.sampled_from(["copy_engine", "nccl"]),
)
def test_files_are_read_as_they_were_written(blocks, repeats, links, ends, transport):
    blocks = tuple(block for block in blocks for _ in range(repeats))
    costs = Costs(blocks, *links, *ends, 1e-6, transport, "model", "machine")
    assert Costs.from_json(costs.to_json()) == costs
    assert len(json.loads(costs.to_json())["blocks"]) <= len(blocks) // repeats


def test_files(tmp_path):
    path = tmp_path / "folder" / "costs.json"
    small().save(path)
    assert Costs.load(path) == small()
    assert [found.name for found in path.parent.iterdir()] == ["costs.json"]
    path.write_text(path.read_text().replace('"forward": 1.0', '"forward": NaN'))
    with pytest.raises(ValueError, match=r"costs.json: costs: blocks\[0\].forward=nan is no finite number"):
        Costs.load(path)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_times_of_blocks_that_cannot_be(name, value):
    blocks = (BlockCosts(1.0, 1.0), replace(BlockCosts(1.0, 1.0), **{name: value}))
    with pytest.raises(ValueError, match=rf"blocks\[1\].{name}={value!r}"):
        small(blocks=blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "blocks is empty"),
        ({"message": Link(0, 0)}, "message.bandwidth=0 has to be above 0"),
        ({"gather": Link(-1e-6, 1)}, "gather.latency=-1e-06 has to be at least 0"),
        ({"reduce": Link(0, 1, contention=0.5)}, r"reduce.contention=0.5 is below 1"),
        ({"message": Link(0, 1, slowdown=math.nan)}, "message.slowdown=nan"),
        ({"behind": BlockCosts(weight=math.nan)}, "behind.weight=nan"),
        ({"before": BlockCosts(state=-5)}, "before.state=-5"),
        ({"host_action": math.inf}, "host_action=inf"),
        ({"transport": "pigeon"}, "transport='pigeon' is unknown; there are copy_engine, nccl"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def edited(change):
    data = json.loads(small().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is no JSON"),
        ("[]", "JSON of a list"),
        (edited(lambda data: data.update(format=7)), "format=7, this version reads 1"),
        (edited(lambda data: data.pop("blocks")), "blocks is missing"),
        (edited(lambda data: data["blocks"][0].pop("weight")), r"blocks\[0\].weight is missing"),
        (edited(lambda data: data["blocks"][0].update(count=0)), r"blocks\[0\].count=0"),
        (
            edited(lambda data: data["blocks"][0].update(forwrad=1)),
            r"blocks\[0\].forwrad is unknown; there are forward",
        ),
        (edited(lambda data: data["blocks"].append(3)), r"blocks\[1\] is a int instead of an object"),
        (edited(lambda data: data["message"].pop("latency")), "message.latency is missing"),
        (edited(lambda data: data.pop("reduce")), "reduce is missing"),
        (edited(lambda data: data.update(speed=1)), "costs: speed is unknown"),
    ],
)
def test_files_with_gaps(text, message):
    with pytest.raises(ValueError, match=message):
        Costs.from_json(text)


def test_costs_of_something_else_are_refused():
    costs = small(model="gpt-2.7b", machine="2xH200")
    costs.check_matches(model="gpt-2.7b", machine="2xH200")
    small().check_matches(model="anything", machine="anywhere")
    with pytest.raises(ValueError, match=r"measured for model 'gpt-2.7b', this is 'gpt-6.7b'.*measure again"):
        costs.check_matches(model="gpt-6.7b", machine="2xH200")
    with pytest.raises(ValueError, match="measured for machine '2xH200', this is 'laptop'"):
        costs.check_matches(model="gpt-2.7b", machine="laptop")


def test_stages_are_sums_and_the_ends_belong_to_the_outer_ones():
    blocks = tuple(
        BlockCosts(1.0 + i, 2.0, 0.5, full_backward=2.25, parameters=10 * i, output=i, workspace=5 - i)
        for i in range(4)
    )
    costs = small(
        blocks=blocks,
        before=BlockCosts(forward=0.25, parameters=100),
        behind=BlockCosts(backward=0.75, weight=0.5, output=99, workspace=50),
    )
    first, last = stage_costs(costs, [(0, 3), (3, 4)])
    assert (first.forward, first.backward, first.whole_backward) == (6.25, 6.0, 6.75)
    assert (first.parameters, first.output, first.workspace) == (130, 2, 5)
    assert (last.forward, last.backward, last.weight, last.whole_backward) == (4.0, 2.75, 1.0, 3.5)
    assert (last.parameters, last.output, last.workspace) == (30, 3, 50)
    assert costs.ideal_seconds(2, 3) == pytest.approx(3 * (1 + 2 + 3 + 4 + 0.25 + 4 * 2.25 + 1.25) / 2)
    for cuts in ([(0, 3)], [(0, 2), (3, 4)], [(0, 0), (0, 4)], [(1, 4)]):
        with pytest.raises(ValueError, match="cover 4 blocks, each once and in order"):
            stage_costs(costs, cuts)


def test_recomputing_holds_inputs_and_runs_forward_twice():
    block = small().recomputed().blocks[1]
    assert (block.forward, block.backward, block.weight, block.whole_backward) == (1.0, 3.0, 0.5, 3.5)
    assert (block.activations, block.weight_inputs, block.workspace) == (4, 6, 10)


def test_costs_of_ranks_are_the_mean_device_and_the_slowest_host():
    blocks = [
        BlockCosts(forward=1.0, backward=2.0, weight=0.5, host_forward=0.3, host_backward=0.1, output=4),
        BlockCosts(forward=3.0, backward=4.0, weight=0.5, host_forward=0.1, host_backward=0.7, output=4),
    ]
    ranks = [
        small(blocks=(block,) * 2, behind=block, host_action=action)
        for block, action in zip(blocks, (5e-5, 2e-5), strict=True)
    ]
    expected = BlockCosts(forward=2.0, backward=3.0, weight=0.5, host_forward=0.3, host_backward=0.7, output=4)
    found = costs_of_ranks(ranks)
    assert (found.blocks, found.before, found.behind) == ((expected,) * 2, ranks[0].before, expected)
    assert found.host_action == 5e-5
    assert costs_of_ranks(ranks[:1]) == ranks[0]
