# SPDX-License-Identifier: Apache-2.0
"""How long simulations and plans take, and what plans gain over published schedules in simulation; needs no GPU.

    python benchmarks/planner.py [--costs costs.json] [--sizes 2x4,8x32,16x64]

Without a file, costs are those of a 2.7B GPT stack as measured on two H200 (attention and MLP as blocks of their own;
docs/pipeline.md). Times are CPU seconds of this process, so they bear a shared machine; of simulations the best of ten.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_zeroprompt.pipeline import BlockCosts, Costs, Link, Placement, Simulator, build_schedule, plan
from lightning_zeroprompt.pipeline.partition import measured_cuts

LAYER = {"forward": 0.57e-3, "backward": 0.80e-3, "weight": 0.46e-3}
"""Seconds of a layer of 78.6M parameters (d 2,560) for 2,048 tokens in bf16."""
WEIGHTS, TOKENS, WIDTH = 78_643_200, 2048, 2560
HEAD = 1.45
"""The head's and loss's work, in layers."""


def stack(layers: int) -> Costs:
    """The stack's costs, a layer's attention and MLP as 0.45 and 0.55 of it."""

    def part(share: float) -> BlockCosts:
        return BlockCosts(
            **{name: share * seconds for name, seconds in LAYER.items()},
            host_forward=share * 0.3e-3,
            host_backward=share * 0.4e-3,
            host_weight=share * 0.15e-3,
            parameters=int(share * 2 * WEIGHTS),
            gradients=int(share * 2 * WEIGHTS),
            state=int(share * 12 * WEIGHTS),
            activations=int(share * 34 * TOKENS * WIDTH),
            weight_inputs=int(share * 28 * TOKENS * WIDTH),
            output=2 * TOKENS * WIDTH,
        )

    head = BlockCosts(
        **{name: HEAD * seconds for name, seconds in LAYER.items()},
        parameters=2 * 32_000 * WIDTH,
        gradients=2 * 32_000 * WIDTH,
        state=12 * 32_000 * WIDTH,
        activations=4 * TOKENS * 32_000,
    )
    one = Costs.uniform(1, **LAYER, message=Link(20e-6, 350e9), gather=Link(30e-6, 300e9), reduce=Link(30e-6, 300e9))
    return replace(one, blocks=(part(0.45), part(0.55)) * layers, behind=head, host_action=20e-6)


def cpu_seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """The least of several."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def simulations(costs: Callable[[int], Costs]) -> list[dict[str, Any]]:
    """Seconds of one simulation, made ready once and run again."""
    rows = []
    for ranks, per_rank, micro_batches in ((4, 2, 8), (8, 2, 32)):
        schedule = build_schedule("zeropp", ranks=ranks, stages_per_rank=per_rank, micro_batches=micro_batches)
        used = costs(ranks)
        cuts = measured_cuts(used, schedule.placement)
        simulator = Simulator(schedule, used, cuts)
        simulator.run()
        row = {
            "ranks": ranks,
            "stages_per_rank": per_rank,
            "micro_batches": micro_batches,
            "ready_ms": 1e3 * cpu_seconds(lambda: Simulator(schedule, used, cuts), 10),  # noqa: B023 - called at once
            "run_ms": 1e3 * cpu_seconds(simulator.run, 10),
        }
        print(
            f"simulation P={ranks} V={per_rank} M={micro_batches}: {row['run_ms']:.2f} ms, made ready in "
            f"{row['ready_ms']:.1f} ms"
        )
        rows.append(row)
    return rows


def plans(costs: Callable[[int], Costs], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Plans, and the best published schedule on cuts of equal work beside each."""
    rows = []
    for ranks, micro_batches in sizes:
        used, found = costs(ranks), []
        seconds = cpu_seconds(lambda: found.append(plan(used, ranks=ranks, micro_batches=micro_batches)))  # noqa: B023
        chosen = found[0]
        shares = {}
        for name, per_rank in (("1f1b", 1), ("zb_h1", 1), ("zbv", 2), ("interleaved_1f1b", 2), ("breadth_first", 2)):
            schedule = build_schedule(name, ranks=ranks, micro_batches=micro_batches, stages_per_rank=per_rank)
            cuts = measured_cuts(used, Placement(ranks, per_rank, schedule.placement.vshape))
            shares[name] = chosen.ideal_seconds / Simulator(schedule, used, cuts).run().seconds
        row = {
            "ranks": ranks,
            "micro_batches": micro_batches,
            "plan_cpu_s": seconds,
            "choice": chosen.best.label,
            "share": chosen.share_of_ideal,
            "peak_gib": chosen.best.peak_bytes / 2**30,
            "published": shares,
        }
        others = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        print(
            f"plan P={ranks} M={micro_batches}: {row['share']:.3f} of the ideal in {seconds:.1f} s "
            f"({row['choice']}, {row['peak_gib']:.1f} GiB); {others}"
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, help="a file of costs instead of the built-in ones")
    parser.add_argument("--sizes", default="2x2,2x4,2x8,4x8,8x16,16x64", help="P x M of the plans")
    arguments = parser.parse_args()
    given = Costs.load(arguments.costs) if arguments.costs else None
    sizes = [(int(p), int(m)) for p, m in (size.split("x") for size in arguments.sizes.split(","))]

    def costs(ranks: int) -> Costs:
        return given if given is not None else stack(max(32, 2 * ranks))

    print(json.dumps({"simulations": simulations(costs), "plans": plans(costs, sizes)}))


if __name__ == "__main__":
    main()
