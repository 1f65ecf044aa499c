# SPDX-License-Identifier: Apache-2.0
"""The executor on many ranks of one machine, with stages that sleep, against the simulator.

    python benchmarks/emulate.py --ranks 4 8 16

Ranks are gloo processes; a block sleeps for a given time in its F, its B and its W, so a few cores are enough for many
ranks as long as tasks are much longer than what the host does for them. All else is the executor as it trains: lists,
messages, capture and replay, split backward passes. Measured is the time from the first rank's start of a step to the
last one's end, the median over steps, and the order in which each rank computed. One JSON object is printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_zeroprompt.pipeline import Costs, Link, Schedule, build_schedule, simulate
from lightning_zeroprompt.pipeline.executor import MicroBatch
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups
from lightning_zeroprompt.pipeline.partition import measured_cuts
from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.recorder import StepRecorder
from lightning_zeroprompt.pipeline.schedule import COMPUTE
from lightning_zeroprompt.pipeline.weight_grad import WeightGradStore
from lightning_zeroprompt.testing import run_distributed

SCHEDULES: dict[str, int] = {"zeropp": 2, "1f1b": 1, "interleaved_1f1b": 2, "breadth_first": 2, "zbv": 2}
"""Stages a rank of each."""
RATIOS = (1.0, 1.4, 0.8)
"""F, B and W."""


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0], None, None


class _Block(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(4, 4, bias=False), (forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        slept: Tensor = _Sleep.apply(self.linear(x), *self.seconds)
        return slept


class _Model(nn.Module):
    def __init__(self, blocks: int, forward: float, backward: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.Sequential(*(_Block(forward, backward) for _ in range(blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.blocks(self.embedding(tokens))
        return output


def costs_of(ranks: int, seconds: float) -> Costs:
    """Two blocks a rank that take so long in F, B and W together."""
    forward, backward, weight = (seconds * ratio / sum(RATIOS) for ratio in RATIOS)
    link = Link(1e-3, 1e9)
    return Costs.uniform(2 * ranks, forward=forward, backward=backward, weight=weight, output=32, message=link)


def schedules(ranks: int, micro_batches: int) -> dict[str, Schedule]:
    """All that are compared."""
    return {
        name: build_schedule(name, ranks=ranks, micro_batches=micro_batches, stages_per_rank=per_rank)
        for name, per_rank in SCHEDULES.items()
    }


def emulate(ranks: int, micro_batches: int, seconds: float, steps: int) -> dict[str, tuple[list[Any], list[str]]]:
    """On one rank: start and end of each step of each schedule, and the order of its tasks."""
    dist.init_process_group("gloo")
    costs, found = costs_of(ranks, seconds), {}
    add = WeightGradStore._add

    def slow(self: WeightGradStore, call: Any) -> None:
        time.sleep(costs.blocks[0].weight)
        add(self, call)

    try:
        with mock.patch.object(WeightGradStore, "_add", slow):
            for name, schedule in schedules(ranks, micro_batches).items():
                model = _Model(len(costs.blocks), costs.blocks[0].forward, costs.blocks[0].backward)
                chain, groups = find_chain(model), ProcessGroups(Layout(ranks, 1), "cpu")
                cuts = measured_cuts(costs, schedule.placement)
                pipeline = Pipeline(chain, schedule.placement, cuts, groups, torch.device("cpu"))
                pipeline.prepare()
                found[name] = _steps(pipeline, model, schedule, steps)
        return found
    finally:
        dist.destroy_process_group()


def _steps(pipeline: Pipeline, model: nn.Module, schedule: Schedule, steps: int) -> tuple[list[Any], list[str]]:
    chain, tokens = pipeline.chain, torch.arange(2)[None]
    given = [MicroBatch((1, 2), lambda: chain.capture(lambda: model(tokens)))] * schedule.micro_batches

    def end(output: Any, _: int) -> Tensor:
        return F.mse_loss(chain.replay(lambda: model(tokens), output), torch.zeros(1, 2, 4))

    spans = []
    # The first step finds out what messages look like.
    for step in range(steps + 1):
        dist.barrier()
        begin = time.perf_counter()
        pipeline.train_step(schedule, given, end)
        if step:
            spans.append((begin, time.perf_counter()))
    recorder = pipeline.executor.recorder = StepRecorder(pipeline.device)
    pipeline.train_step(schedule, given, end)
    pipeline.executor.recorder = None
    result = recorder.result()
    assert result is not None
    return spans, [str(span.task) for span in result[2].tasks]


def case(ranks: int, micro_batches: int, seconds: float, steps: int) -> dict[str, dict[str, Any]]:
    """Every schedule, measured and simulated."""
    costs = costs_of(ranks, seconds)
    everyone = run_distributed(emulate, ranks, ranks, micro_batches, seconds, steps, timeout=1800)
    rows = {}
    for name, schedule in schedules(ranks, micro_batches).items():
        lanes = [each[name] for each in everyone]
        # One clock serves all processes of a machine.
        makespans = [
            max(lane[0][step][1] for lane in lanes) - min(lane[0][step][0] for lane in lanes) for step in range(steps)
        ]
        measured = statistics.median(makespans)
        predicted = simulate(schedule, costs, measured_cuts(costs, schedule.placement)).seconds
        listed = [[str(task) for task in tasks if task.kind in COMPUTE] for tasks in schedule.tasks]
        rows[name] = {
            "measured": measured,
            "simulated": predicted,
            "ratio": measured / predicted,
            "as_listed": [order for _, order in lanes] == listed,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], help="each a case (default: 4)")
    parser.add_argument("--multiple", type=int, default=2, help="M as a multiple of P (default: 2)")
    parser.add_argument("--seconds", type=float, default=0.08, help="F, B and W of a block (default: 0.08)")
    parser.add_argument("--steps", type=int, default=3, help="measured (default: 3)")
    args = parser.parse_args()
    cases = {}
    for ranks in args.ranks:
        cases[ranks] = case(ranks, args.multiple * ranks, args.seconds, args.steps)
        for name, row in cases[ranks].items():
            print(
                f"P={ranks} {name}: measured {row['measured']:.3f} s, simulated {row['simulated']:.3f} s, "
                f"ratio {row['ratio']:.3f}, order as listed: {row['as_listed']}",
                flush=True,
            )
    print(json.dumps({"seconds": args.seconds, "multiple": args.multiple, "cases": cases}))


if __name__ == "__main__":
    main()
