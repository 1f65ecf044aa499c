# SPDX-License-Identifier: Apache-2.0
"""Plans on gloo ranks: orders that are in no catalogue give the gradients of one process, exactly up to rounding."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_zeroprompt.pipeline import BlockCosts, Costs, Link, Placement, plan
from lightning_zeroprompt.pipeline.drafts import PLANNED
from lightning_zeroprompt.pipeline.executor import MicroBatch
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups
from lightning_zeroprompt.pipeline.pipeline import Pipeline, cut_chain

MICRO_BATCHES = 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(7)))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


def loss_of(model, part, logits):
    return F.cross_entropy(logits.flatten(0, 1), part.flatten()) / MICRO_BATCHES


def planned(ranks, data):
    """The fastest candidate in no catalogue; a V-shaped one where weights are whole."""
    costs = Costs.uniform(
        7,
        forward=1.0,
        backward=1.7,
        weight=0.5,
        message=Link(0.1, 1e9),
        output=1,
        behind=BlockCosts(0.3, 0.3, 0.3),
        gather=Link(0.1, 1e9),
        reduce=Link(0.1, 1e9),
        parameters=1,
        gradients=1,
    )
    found = plan(costs, ranks=ranks, data_parallel=data, micro_batches=MICRO_BATCHES // data, stages_per_rank=2)
    return costs, next(
        each
        for each in found.candidates
        if each.schedule.name == PLANNED and (each.schedule.placement.vshape or data > 1)
    )


def difference(data):
    """The largest difference of a gradient between a planned pipeline's second step and one process."""
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    try:
        model = Model()
        tokens = torch.randint(11, (2 * MICRO_BATCHES, 5), generator=torch.Generator().manual_seed(1))
        parts = tokens.chunk(MICRO_BATCHES)
        whole = copy.deepcopy(model)
        for part in parts:
            loss_of(whole, part, whole(part)).backward()
        exact = {name: parameter.grad for name, parameter in whole.named_parameters()}

        layout = Layout(dist.get_world_size() // data, data)
        costs, candidate = planned(layout.pipeline, data)
        schedule, chain = candidate.schedule, find_chain(model)
        cuts = cut_chain(chain, schedule.placement, costs)
        assert tuple(cuts) == candidate.cuts
        groups = ProcessGroups(layout, "cpu")
        pipeline = Pipeline(chain, schedule.placement, cuts, groups, torch.device("cpu"))
        pipeline.prepare()
        mine = parts[groups.data_rank :: data]

        def capture(part):
            return lambda: chain.capture(lambda: model(part))

        def end(output, index):
            return data * loss_of(model, mine[index], chain.replay(lambda: model(mine[index]), output))

        given = [MicroBatch(tuple(part.shape), capture(part)) for part in mine]
        for _ in range(2):
            for parameter in pipeline.parameters().values():
                parameter.grad = None
            pipeline.train_step(schedule, given, end)
        ours = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for name, p in pipeline.parameters().items()
        }
        assert ours
        return max(float((grad - exact[name]).abs().max()) for name, grad in ours.items())
    finally:
        dist.destroy_process_group()
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("ranks", "data"), [(2, 1), (4, 2)])
def test_planned_orders_give_exact_gradients(run_ranks, ranks, data):
    assert max(run_ranks(difference, ranks, data, timeout=300)) < 1e-12


def test_costs_of_another_model_are_refused():
    chain = find_chain(Model())
    with pytest.raises(ValueError, match=r"costs of 3 blocks for a model with 7.*measure again"):
        cut_chain(chain, Placement(2, 1), Costs.uniform(3, forward=1.0, backward=1.0))
