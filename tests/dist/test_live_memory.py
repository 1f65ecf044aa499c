# SPDX-License-Identifier: Apache-2.0
"""What ranks hold, tensor by tensor, against what the simulator makes of measured sizes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_zeroprompt.pipeline import Link, build_schedule, simulate
from lightning_zeroprompt.pipeline.costs import stage_costs
from lightning_zeroprompt.pipeline.executor import MicroBatch
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups
from lightning_zeroprompt.pipeline.meters import DeviceMeter
from lightning_zeroprompt.pipeline.pipeline import Pipeline, cut_chain
from lightning_zeroprompt.pipeline.profiler import profile_chain

WIDTH, ROWS, BLOCKS = 96, 128, 8
_MOMENTS = 8
"""Bytes of Adam's moments a parameter, which no step here has."""


class LiveBytes(TorchDispatchMode):
    """The most bytes that live storages had behind any operation."""

    def __init__(self, tensors):
        super().__init__()
        self.peak, self._live = 0, {}
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        self._live.setdefault(storage._cdata, StorageWeakRef(storage))

    def _bytes(self):
        total = 0
        for key, reference in list(self._live.items()):
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._live[key]
            else:
                # FSDP empties a storage and keeps the tensor.
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if type(leaf) in (torch.Tensor, nn.Parameter) and leaf.device.type == "cpu":
                self._add(leaf)
        self.peak = max(self.peak, self._bytes())
        return out


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        halves = (nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.blocks = nn.Sequential(
            *(nn.Sequential(*(type(part)(*_sizes(part)) for part in halves)) for _ in range(BLOCKS))
        )

    def forward(self, x):
        return self.blocks(x)


def _sizes(part):
    return (part.in_features, part.out_features) if isinstance(part, nn.Linear) else ()


def peaks(ranks, name, settings, micro_batches):
    """Bytes that this rank's second step held at most, and that the simulator says."""
    dist.init_process_group("gloo")
    try:
        layout = Layout(ranks, dist.get_world_size() // ranks)
        schedule = build_schedule(name, ranks=ranks, micro_batches=micro_batches, **settings)
        parts = [torch.randn(ROWS, WIDTH) for _ in range(micro_batches)]
        model = Model()
        costs = profile_chain(
            find_chain(model),
            # A part of a batch, as micro-batches are, counts as what it is.
            lambda: model(torch.randn(4 * ROWS, WIDTH)[:ROWS]).square().sum(),
            DeviceMeter(torch.device("cpu"), repeats=1, warmup=0),
            message=Link(1e-5, 1e10),
        )
        blocks = tuple(replace(block, state=block.state - _MOMENTS * block.parameters // 4) for block in costs.blocks)
        model = Model()
        chain, groups = find_chain(model), ProcessGroups(layout, "cpu")
        cuts = cut_chain(chain, schedule.placement)
        pipeline = Pipeline(chain, schedule.placement, cuts, groups, torch.device("cpu"))
        pipeline.prepare()

        def end(output, index):
            return chain.replay(lambda: model(parts[index]), output).square().sum()

        def capture(part):
            return lambda: chain.capture(lambda: model(part))

        given = [MicroBatch(tuple(part.shape), capture(part)) for part in parts]
        for _ in range(2):
            for parameter in pipeline.parameters().values():
                parameter.grad = None
            held = [p.to_local() if isinstance(p, DTensor) else p for p in pipeline.parameters().values()]
            with LiveBytes(held) as live:
                pipeline.train_step(schedule, given, end)
        costs = replace(costs, blocks=blocks)
        expected = simulate(schedule, costs, cuts, data_parallel=layout.data)
        # Of one gather and one reduction, of the gradients between the operators of a block, of a stage's two messages;
        # and the batch.
        largest = max(stage_costs(costs, cuts), key=lambda stage: stage.parameters)
        buffers = (layout.data > 1) * (largest.parameters + largest.gradients) + blocks[0].activations
        buffers += (ranks > 1) * 2 * schedule.placement.stages_per_rank * blocks[0].output + sum(
            part.untyped_storage().nbytes() for part in parts
        )
        return live.peak, expected.peak_bytes[groups.pipeline_rank], buffers
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "data", "name", "settings", "micro_batches"),
    [
        (1, 2, "zeropp", {"stages_per_rank": 4, "unit": 2}, 6),
        (1, 2, "zeropp", {"stages_per_rank": 8, "unit": 1}, 4),
        (2, 1, "zbv", {"stages_per_rank": 2}, 6),
        (2, 1, "1f1b", {}, 6),
        (2, 2, "zeropp", {"stages_per_rank": 2, "unit": 2}, 4),
    ],
    ids=lambda value: str(value),
)
def test_ranks_hold_what_the_simulator_says(run_ranks, ranks, data, name, settings, micro_batches):
    for held, expected, buffers in run_ranks(peaks, ranks * data, ranks, name, settings, micro_batches):
        assert 0.97 * expected <= held <= expected + buffers
