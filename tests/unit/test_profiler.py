# SPDX-License-Identifier: Apache-2.0
"""Costs of blocks against what can be counted by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_zeroprompt.models import Text2TextModule
from lightning_zeroprompt.pipeline.chain import Chain
from lightning_zeroprompt.pipeline.costs import BlockCosts, Link, stage_costs
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.meters import DeviceMeter, FlopMeter, Phase
from lightning_zeroprompt.pipeline.profiler import profile_chain
from lightning_zeroprompt.pipeline.weight_grad import DeferredLinear

WIDTH, ROWS, CLASSES = 16, 6, 10
LINK = Link(1e-5, 1e10)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width=WIDTH, blocks=3):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, width)
        self.blocks = nn.Sequential(*(Mlp(width) for _ in range(blocks)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


def profiled(model, meter, rows=ROWS):
    tokens = torch.arange(rows) % CLASSES
    if meter.device.type == "meta":
        tokens = tokens.to("meta")
    return profile_chain(find_chain(model), lambda: F.cross_entropy(model(tokens), tokens), meter, message=LINK)


class Masked(nn.Module):
    """A Linear whose output is multiplied with a part of a large tensor that a stage makes once."""

    SIZE = 1000

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memo):
        return self.linear(x) * memo.once("mask", lambda: torch.ones(self.SIZE))[:WIDTH]


def test_what_a_stage_makes_once_is_shared_by_its_blocks():
    model = Model()
    model.blocks = nn.Sequential(*(Masked() for _ in range(3)))
    costs = profiled(model, DeviceMeter(torch.device("cpu"), repeats=1, warmup=0))
    own, mask = 4 * ROWS * WIDTH, 4 * Masked.SIZE
    assert [(block.activations, block.shared) for block in costs.blocks] == [(own, mask)] * 3
    stages = stage_costs(costs, [(0, 2), (2, 3)])
    assert [stage.activations for stage in stages] == [2 * own + mask, own + mask + costs.behind.activations]
    # Under a checkpoint an input is what a block holds.
    again = costs.recomputed()
    assert [(block.activations, block.shared) for block in again.blocks] == [(own, 0)] * 3


def test_operations_are_counted_exactly():
    with torch.device("meta"):
        model = Model()
    costs = profiled(model, FlopMeter(flops=1.0, bandwidth=1e30))
    per_pass = 2 * ROWS * 8 * WIDTH**2
    for block in costs.blocks:
        assert [block.forward, block.backward, block.weight] == pytest.approx([per_pass] * 3)
        assert block.full_backward == pytest.approx(2 * per_pass)
    head = 2 * ROWS * WIDTH * CLASSES
    assert costs.behind.forward == pytest.approx(head)
    assert costs.behind.backward + costs.behind.weight == pytest.approx(2 * head)
    assert costs.before.forward == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_are_those_of_the_tensors(device):
    with torch.device(device):
        model = Model()
    meter = DeviceMeter(torch.device("cpu"), repeats=1, warmup=0) if device == "cpu" else FlopMeter(1e9, 1e9)
    costs = profiled(model, meter)
    x, hidden, weights = 4 * ROWS * WIDTH, 4 * ROWS * 4 * WIDTH, 4 * 8 * WIDTH**2
    for block in costs.blocks:
        # Inputs of the two Linears, and the output of the ReLU, which is one of them.
        assert block.activations == x + hidden
        # These, and the gradients of their outputs.
        assert block.weight_inputs == 2 * (x + hidden)
        assert block.output == x
        assert (block.parameters, block.gradients, block.state) == (weights, weights, 4 * weights)
    assert costs.before.parameters == 4 * CLASSES * WIDTH
    assert costs.behind.parameters == 4 * (CLASSES * WIDTH + CLASSES)


def test_nothing_is_left_behind():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    small, large = (profiled(model, DeviceMeter(torch.device("cpu"), repeats=2), rows) for rows in (8, 16))
    assert small.model == large.model != profiled(Model(blocks=4), DeviceMeter(torch.device("cpu"), 1)).model
    assert small.machine == large.machine != ""
    # Equal blocks are measured once.
    assert len(set(large.blocks)) == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(isinstance(part, DeferredLinear) for part in model.modules())


def test_our_t5_with_its_tuples():
    module = Text2TextModule(vocab_size=50, size="nano", optimizer={"warmup_steps": 0})
    module.configure_model()
    batch = {
        "input_ids": torch.randint(2, 50, (2, 12)),
        "input_segments": torch.ones(2, 12, dtype=torch.int32),
        "decoder_input_ids": torch.randint(2, 50, (2, 5)),
        "decoder_segments": torch.ones(2, 5, dtype=torch.int32),
    }
    chain = find_chain(module)
    costs = profile_chain(
        chain, lambda: module(batch).square().mean(), DeviceMeter(torch.device("cpu"), repeats=1), message=LINK
    )
    assert len(costs.blocks) == len(chain)
    assert len(set(costs.blocks)) < len(chain)
    # The decoder's stream carries the encoder's output too, but behind its last layer.
    *_, layer, last, _ = costs.blocks
    assert layer.output == costs.blocks[1].output + last.output


def test_a_row_of_blocks_makes_once_what_a_stage_makes_once():
    module = Text2TextModule(vocab_size=50, size="nano", optimizer={"warmup_steps": 0})
    module.configure_model()
    made = []
    own = module.model.encoder_scores
    module.model.encoder_scores = lambda *given: made.append(1) or own(*given)
    batch = {"input_ids": torch.randint(2, 50, (2, 12)), "input_segments": torch.ones(2, 12, dtype=torch.int32)}
    batch |= {
        "decoder_input_ids": torch.randint(2, 50, (2, 5)),
        "decoder_segments": torch.ones(2, 5, dtype=torch.int32),
    }
    chain, meter = find_chain(module), DeviceMeter(torch.device("cpu"), repeats=1, warmup=0)
    runs = []
    for layer in module.model.encoder:
        layer.register_forward_pre_hook(lambda *given: runs.append(1))
    profile_chain(chain, lambda: module(batch).square().mean(), meter, message=LINK)
    # Three rows of four, for F with and without W and for what is held: three of each four found the scores there.
    assert len(runs) - len(made) == 3 * 3


def test_what_a_call_costs_the_host_is_no_part_of_a_block():
    call, block = 0.4, 0.3
    alone, row = (Phase(times * 1.5, call + times * block, times * 7) for times in (1, 4))
    each, besides = row.split(4, alone)
    assert (each.seconds, each.host, each.workspace) == (1.5, pytest.approx(block), 7)
    assert (besides.seconds, besides.host) == (0, pytest.approx(call))
    assert Phase(1.0, 0.1).split(4, Phase(1.0, 0.2))[0].host == 0
    head = Phase(2.0, call + 0.2, 5).without(besides)
    assert (head.seconds, head.host, head.workspace) == (2.0, pytest.approx(0.3), 5)  # never less than half
    assert Phase(2.0, call + 0.6).without(besides).host == pytest.approx(0.6)


def test_what_a_device_makes_once_a_call_is_no_part_of_a_block():
    made, block = 0.6, 1.5
    alone, row = (Phase(made + times * block, 0.0) for times in (1, 4))
    each, besides = row.split(4, alone, once=True)
    assert (each.seconds, besides.seconds) == (pytest.approx(block), pytest.approx(made))
    assert Phase(made + 0.9, 0.0).without(besides, once=True).seconds == pytest.approx(0.9)
    # Without that, a call is what its blocks take.
    assert row.split(4, alone)[0].seconds == pytest.approx(block + made / 4)


def test_a_stage_makes_once_what_its_blocks_share():
    class Clock(DeviceMeter):
        """A block takes 3 s, what a stage makes 2 s; B and W take a second a block."""

        def measure(self, phases, moved):
            found = []
            for phase in phases:
                del ran[:]
                phase()
                blocks = ran.count("block")
                found.append(Phase(2.0 * ran.count("once") + 3.0 * blocks if blocks else 1.0, 0.0))
            return found

    ran = []

    class Noted(Masked):
        def forward(self, x, memo):
            ran.append("block")
            return self.linear(x) * memo.once("mask", lambda: ran.append("once") or torch.ones(WIDTH))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Noted(), Noted(), Noted()])

        def forward(self, x):
            raise AssertionError

    model = Whole()
    root = nn.Module()
    root.model = model
    chain = Chain(root, list(model.blocks), model)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    costs = profile_chain(chain, lambda: root.model(x).sum(), Clock(torch.device("cpu")), message=LINK)
    assert [(block.forward, block.shared_forward) for block in costs.blocks] == [(3.0, 2.0)] * 3
    # Blocks alone: what is in front of them and behind them is the same in all cases.
    costs = replace(costs, before=BlockCosts(), behind=BlockCosts())
    one, two = stage_costs(costs, [(0, 1), (1, 3)])
    assert (one.forward, two.forward, two.shared_forward) == (5.0, 8.0, 0.0)
    again = costs.recomputed()
    assert [stage.forward for stage in stage_costs(again, [(0, 1), (1, 3)])] == [5.0, 10.0]
    assert again.blocks[0].backward == costs.blocks[0].backward + 5.0
    assert costs.ideal_seconds(1, 1) == pytest.approx(2.0 + 3 * (3.0 + costs.blocks[0].whole_backward))


def test_times_are_those_of_a_device_under_load():
    class Hot(FlopMeter):
        def under_load(self, phases):
            for phase in phases:
                phase()
            return [None, *(Phase(3.0 * 2 * ROWS * 8 * WIDTH**2, 1e-4) for _ in phases[1:])]

    with torch.device("meta"):
        model = Model()
    cold, hot = (profiled(model, meter(flops=1.0, bandwidth=1e30, host=2e-4)) for meter in (FlopMeter, Hot))
    for block, slow in zip((*cold.blocks, cold.behind), (*hot.blocks, hot.behind), strict=True):
        assert slow.forward == pytest.approx(3 * block.forward)
        assert slow.backward == pytest.approx(3 * block.backward)
        assert slow.weight == pytest.approx(3 * block.weight)
        assert slow.whole_backward == pytest.approx(3 * block.whole_backward)
        assert slow.state == block.state
        hosts = [[each.host_forward, each.host_backward, each.host_weight] for each in (slow, block)]
        assert hosts[0] == pytest.approx([0.5 * host for host in hosts[1]])
    assert all(parameter.grad is None for parameter in model.parameters())
