# SPDX-License-Identifier: Apache-2.0
"""Every schedule beside the planner's choice, simulated, from 4 to 64 pipeline ranks on three interconnects.

    python benchmarks/schedules.py --out docs/results

Costs are those measured on H200 for a GPT stack of width 2,560 and 2,048 tokens a micro-batch, with eight layers a rank
whatever the number of ranks, so that a rank's work stays the same, less one to make room for the head. Prints a JSON
object last; with --out it writes schedules.json, schedules.png and the tables of schedules.md (tables.md). Cases that
schedules.json in that folder has already are not simulated again: all of them take an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_zeroprompt.cli.config import write_atomically
from lightning_zeroprompt.pipeline import BlockCosts, Costs, Link, Placement, build_schedule, plan, simulate
from lightning_zeroprompt.pipeline.partition import measured_cuts

LAYERS, TOKENS, WIDTH = 8, 2048, 2560
"""Layers a rank, tokens of a micro-batch, width."""
MESSAGE = 2 * TOKENS * WIDTH
PARAMETERS = 12 * WIDTH**2
LAYER = BlockCosts(
    forward=0.57e-3,
    backward=0.80e-3,
    weight=0.46e-3,
    parameters=2 * PARAMETERS,
    gradients=2 * PARAMETERS,
    # bfloat16 weights and gradients, two moments in float32.
    state=12 * PARAMETERS,
    # 16 widths a token: two norms and their outputs, q, k, v, attention, residual, MLP before and behind GELU.
    activations=16 * MESSAGE,
    # Inputs of four Linears (7 widths), gradients of their outputs (9).
    weight_inputs=16 * MESSAGE,
    output=MESSAGE,
)
HEAD = replace(BlockCosts(), forward=1.45 * LAYER.forward, backward=1.45 * LAYER.backward, weight=1.45 * LAYER.weight)
INTERCONNECTS: dict[str, dict[str, Any]] = {
    "NVLink, 210 GB/s": {"message": Link(5e-6, 210e9), "transport": "copy_engine"},
    "InfiniBand, 25 GB/s": {"message": Link(2e-5, 25e9), "transport": "nccl"},
    "Ethernet, 3 GB/s": {"message": Link(5e-5, 3e9), "transport": "nccl"},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "zb_h1": {},
    "interleaved_1f1b V=2": {"stages_per_rank": 2},
    "interleaved_1f1b V=4": {"stages_per_rank": 4},
    "breadth_first V=1": {},
    "breadth_first V=2": {"stages_per_rank": 2},
    "breadth_first V=4": {"stages_per_rank": 4},
    "zbv": {"stages_per_rank": 2},
    "zeropp V=2, U=2P": {"stages_per_rank": 2, "unit": 2},
    "zeropp V=2, U=M": {"stages_per_rank": 2},
    "zeropp_overlap V=2, U=P": {"stages_per_rank": 2, "unit": 1},
}
"""Arguments of ``build_schedule``; a unit is written as a multiple of P."""


def costs_of(ranks: int, interconnect: str) -> Costs:
    """Costs of a stack of eight layers a rank, less one."""
    link = INTERCONNECTS[interconnect]
    return Costs((LAYER,) * (LAYERS * ranks - 1), gather=link["message"], reduce=link["message"], behind=HEAD, **link)


def fixed(costs: Costs, ranks: int, micro_batches: int, label: str) -> dict[str, float] | None:
    """Seconds, bubble and memory of a published schedule; None where its unit does not fit."""
    arguments = dict(SCHEDULES[label])
    unit = arguments.pop("unit", None)
    if unit is not None:
        unit *= ranks
        if unit > micro_batches:
            return None
    schedule = build_schedule(label.split()[0], ranks=ranks, micro_batches=micro_batches, unit=unit, **arguments)
    cuts = measured_cuts(costs, Placement(ranks, schedule.placement.stages_per_rank, schedule.placement.vshape))
    step = simulate(schedule, costs, cuts)
    return {"seconds": step.seconds, "bubble": step.bubble_share, "peak_bytes": max(step.peak_bytes)}


def case(ranks: int, micro_batches: int, interconnect: str) -> dict[str, Any]:
    """All schedules and the plan for one size."""
    costs = costs_of(ranks, interconnect)
    found = {label: row for label in SCHEDULES if (row := fixed(costs, ranks, micro_batches, label)) is not None}
    begin = time.perf_counter()
    best = plan(costs, ranks=ranks, micro_batches=micro_batches).best
    planned = {
        "seconds": best.seconds,
        "bubble": best.bubble_share,
        "peak_bytes": best.peak_bytes,
        "label": best.label,
        "planning_seconds": time.perf_counter() - begin,
    }
    return {
        "ranks": ranks,
        "micro_batches": micro_batches,
        "interconnect": interconnect,
        "ideal_seconds": costs.ideal_seconds(ranks, micro_batches),
        "schedules": {**found, "auto": planned},
    }


def tables(cases: list[dict[str, Any]]) -> str:
    """A table for each interconnect and number of ranks: throughput as share of the ideal, and memory."""
    parts = []
    for interconnect in INTERCONNECTS:
        for ranks in sorted({each["ranks"] for each in cases}):
            own = [each for each in cases if (each["interconnect"], each["ranks"]) == (interconnect, ranks)]
            if not own:
                continue
            columns = " | ".join(f"M={each['micro_batches']}" for each in own)
            lines = [f"### {interconnect}, P={ranks}", "", f"| schedule | {columns} |", "| --- |" + " --- |" * len(own)]
            for label in [*SCHEDULES, "auto"]:
                cells = []
                for each in own:
                    row = each["schedules"].get(label)
                    share = row and each["ideal_seconds"] / row["seconds"]
                    cells.append(f"{share:.3f}, {row['peak_bytes'] / 2**30:.1f}" if row else "")
                lines.append(f"| {label} | {' | '.join(cells)} |")
            lines.append(f"| *auto chose* | {' | '.join(each['schedules']['auto']['label'] for each in own)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def picture(cases: list[dict[str, Any]], path: Path) -> None:
    """Throughput over M, a panel for each interconnect and number of ranks."""
    from matplotlib.figure import Figure

    sizes = sorted({each["ranks"] for each in cases})
    figure = Figure(figsize=(4.5 * len(INTERCONNECTS), 3.2 * len(sizes)), dpi=110, layout="constrained")
    axes = figure.subplots(len(sizes), len(INTERCONNECTS), squeeze=False)
    for axis_row, ranks in zip(axes, sizes, strict=True):
        for axis, interconnect in zip(axis_row, INTERCONNECTS, strict=True):
            own = [each for each in cases if (each["interconnect"], each["ranks"]) == (interconnect, ranks)]
            for label in [*SCHEDULES, "auto"]:
                points = [
                    (each["micro_batches"], each["ideal_seconds"] / each["schedules"][label]["seconds"])
                    for each in own
                    if label in each["schedules"]
                ]
                style = {"color": "black", "linewidth": 2.5} if label == "auto" else {"linewidth": 1.0}
                axis.plot(*zip(*points, strict=True), marker=".", label=label, **style)
            axis.set_xscale("log", base=2)
            axis.set_title(f"{interconnect}, P={ranks}", fontsize=9)
            axis.set_xlabel("micro-batches")
            axis.set_ylabel("share of ideal")
            axis.set_ylim(0, 1.02)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 4, 8], help="M as multiples of P")
    parser.add_argument("--out", type=Path, help="folder for schedules.json, schedules.png, tables.md")
    args = parser.parse_args()
    known = args.out / "schedules.json" if args.out else None
    done = json.loads(known.read_text()) if known and known.exists() else []
    found = {(each["ranks"], each["micro_batches"], each["interconnect"]): each for each in done}
    cases = []
    for ranks in args.ranks:
        for multiple in args.multiples:
            for interconnect in INTERCONNECTS:
                size = (ranks, multiple * ranks, interconnect)
                cases.append(found.get(size) or case(*size))
                rows = cases[-1]["schedules"]
                least = min(row["seconds"] for label, row in rows.items() if label != "auto")
                print(
                    f"P={ranks} M={multiple * ranks} {interconnect}: auto {rows['auto']['label']} "
                    f"{rows['auto']['seconds'] / least - 1:+.2%} against the best fixed one, planned in "
                    f"{rows['auto']['planning_seconds']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                found[size] = cases[-1]
                if known:
                    write_atomically(known, json.dumps(list(found.values())))
    if args.out:
        picture(cases, args.out / "schedules.png")
        (args.out / "tables.md").write_text(tables(cases))
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
