# SPDX-License-Identifier: Apache-2.0
"""``zeroprompt-plan``: which layout and schedule a model wants, how many GPUs it needs, whether it fits; without one.

Costs are measured ones (--costs), those of a GPT of a known size (--model 7b, or --layers and --width), or those of
your own LightningModule (--module), whose operations are counted on the meta device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_zeroprompt.pipeline import Candidate, Costs, Plan, Simulation

__all__ = ["main"]

_AUTO = "auto"


def _plans(args: argparse.Namespace, costs: Costs) -> list[tuple[int, Plan | str]]:
    """A plan for every number of GPUs, or why there is none."""
    from lightning_zeroprompt.pipeline import plan

    shared: dict[str, Any] = {
        "memory_limit": args.memory,
        "stages_per_rank": args.stages_per_rank,
        "recompute": args.recompute,
    }
    if args.ranks is not None:
        count = args.micro_batches or 4 * args.ranks
        found = plan(costs, ranks=args.ranks, data_parallel=args.data, micro_batches=count, **shared)
        return [(args.ranks * args.data, found)]
    count = args.micro_batches or 4 * max(args.gpus)
    plans: list[tuple[int, Plan | str]] = []
    for gpus in sorted(set(args.gpus)):
        try:
            plans.append((gpus, plan(costs, gpus=gpus, micro_batches=count, **shared)))
        except ValueError as error:
            plans.append((gpus, str(error)))
    if all(isinstance(each, str) for _, each in plans):
        raise ValueError(" | ".join(f"{gpus} GPUs: {each}" for gpus, each in plans))
    return plans


def _simulated(candidate: Candidate, costs: Costs) -> Simulation:
    from lightning_zeroprompt.pipeline import simulate

    used = costs.recomputed() if candidate.recompute else costs
    return simulate(candidate.schedule, used, candidate.cuts, data_parallel=candidate.data_parallel)


def _shown(found: Plan, most: int) -> list[Candidate]:
    """The choice, what no other candidate beats, and the fastest of each published schedule; the fastest first."""
    fastest: dict[str, Candidate] = {}
    for each in found.candidates:
        if each.arguments is not None:
            fastest.setdefault(each.schedule.name, each)
    # Candidates with the same schedule are one; the planner looks at some under jitter, which makes copies.
    wanted: dict[int, Candidate] = {}
    for each in [found.best, *fastest.values(), *found.pareto]:
        wanted.setdefault(id(each.schedule), each)
    return sorted(list(wanted.values())[:most], key=lambda each: (each.seconds, each.peak_bytes))


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f}" if count >= 2**27 else f"{count / 2**30:.4f}"


def _rows(candidate: Candidate, found: Plan) -> list[str]:
    """Cells that both tables have."""
    limit = found.memory_limit
    share = [] if limit is None else [f"{candidate.peak_bytes / limit:.0%}"]
    return [
        f"{candidate.schedule.ranks} x {candidate.data_parallel}",
        candidate.label,
        _time(candidate.seconds),
        f"{found.ideal_seconds / candidate.seconds:.3f}",
        f"{candidate.bubble_share:.1%}",
        _size(candidate.peak_bytes),
        *share,
        _size(candidate.bytes_per_gpu),
    ]


def _table(title: str, first: str, limited: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, justify="right", no_wrap=True)
    table.add_column("P x D", justify="right", no_wrap=True)
    table.add_column("schedule", overflow="fold")
    memory = ["of limit"] if limited else []
    for name in ("step", "of ideal", "bubble", "peak GiB", *memory, "sent GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _fits(candidate: Candidate, found: Plan) -> bool:
    return found.memory_limit is None or candidate.peak_bytes <= found.memory_limit


def _print_counts(console: Console, plans: Sequence[tuple[int, Plan | str]], limited: bool) -> None:
    table = _table("How many GPUs, the same batch for all", "GPUs", limited)
    for gpus, found in plans:
        if isinstance(found, str):
            table.add_row(str(gpus), "-", "none, see below", style="red")
        else:
            table.add_row(str(gpus), *_rows(found.best, found))
    console.print(table)
    for gpus, found in plans:
        if isinstance(found, str):
            console.print(f"{gpus} GPUs: {found}\n", highlight=False, markup=False)


def _print_candidates(console: Console, gpus: int, found: Plan, most: int) -> None:
    title = f"{gpus} GPUs: {len(found.candidates)} candidates simulated; step without bubbles and communication: "
    table = _table(title + _time(found.ideal_seconds), "", found.memory_limit is not None)
    for each in _shown(found, most):
        chosen = each is found.best
        style = "bold green" if chosen else None if _fits(each, found) else "red"
        mark = "->" if chosen else "" if _fits(each, found) else "too large"
        table.add_row(mark, *_rows(each, found), style=style)
    console.print(table)


def _arguments(candidate: Candidate, found: Plan) -> dict[str, Any]:
    """Arguments of ``ZeroPPStrategy`` for any candidate of a plan."""
    from dataclasses import replace

    return replace(found, best=candidate).strategy_arguments()


def _call(arguments: dict[str, Any], costs: Path | None, memory_limit: int | None = None) -> str:
    given = dict(arguments)
    if arguments["schedule"] == _AUTO and costs is not None:
        given["costs"] = str(costs)
        if memory_limit is not None:
            given["memory_limit"] = memory_limit
    return f"ZeroPPStrategy({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _paste(console: Console, found: Plan, costs: Path | None) -> None:
    """What to write in one's own program."""
    lines = ["from lightning_zeroprompt.strategies import ZeroPPStrategy", ""]
    arguments = found.strategy_arguments()
    lines.append(f"strategy = {_call(arguments, costs, found.memory_limit)}")
    if arguments["schedule"] == _AUTO:
        if costs is None:
            words = " and memory_limit=" if found.memory_limit is not None else ""
            lines.append(f'# With --save-costs FILE here and costs="FILE"{words} there, "auto" starts from this plan.')
        fixed = [each for each in found.candidates if each.arguments is not None and _fits(each, found)]
        if fixed:
            words = f"{_time(fixed[0].seconds)}, {_size(fixed[0].peak_bytes)} GiB"
            lines.append(f"# The fastest published schedule ({words}):")
            lines.append(f"# strategy = {_call(_arguments(fixed[0], found), None)}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _data(candidate: Candidate, found: Plan) -> dict[str, Any]:
    return {
        "label": candidate.label,
        "pipeline_parallel_size": candidate.schedule.ranks,
        "data_parallel_size": candidate.data_parallel,
        "stages_per_rank": candidate.schedule.placement.stages_per_rank,
        "micro_batches": candidate.schedule.micro_batches,
        "recompute": candidate.recompute,
        "seconds": candidate.seconds,
        "share_of_ideal": found.ideal_seconds / candidate.seconds,
        "bubble_share": candidate.bubble_share,
        "peak_bytes": candidate.peak_bytes,
        "bytes_per_gpu": candidate.bytes_per_gpu,
        "fits": _fits(candidate, found),
    }


def _json(plans: Sequence[tuple[int, Plan | str]], most: int) -> str:
    entries: list[dict[str, Any]] = []
    for gpus, found in plans:
        if isinstance(found, str):
            entries.append({"gpus": gpus, "error": found})
        else:
            entries.append(
                {
                    "gpus": gpus,
                    "memory_limit": found.memory_limit,
                    "ideal_seconds": found.ideal_seconds,
                    "choice": _data(found.best, found),
                    "cuts": found.cuts,
                    "strategy_arguments": found.strategy_arguments(),
                    "candidates": [_data(each, found) for each in _shown(found, most)],
                }
            )
    return json.dumps({"plans": entries}, indent=2)


def _run(args: argparse.Namespace) -> None:
    from lightning_zeroprompt.cli.plan_costs import costs_of

    if (args.ranks is None) == (args.gpus is None):
        raise ValueError("give --gpus N for the best layout of N GPUs, or --ranks P (and --data D) for one layout")
    if args.data != 1 and args.ranks is None:
        raise ValueError(f"--data {args.data} goes with --ranks; --gpus tries every number of data-parallel ranks")
    for name in ("ranks", "data", "micro_batches", "stages_per_rank", "show", *(["gpus"] if args.gpus else [])):
        for value in getattr(args, name) if name == "gpus" else [getattr(args, name)]:
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")
    costs = costs_of(args, args.ranks * args.data if args.ranks is not None else max(args.gpus))
    if args.save_costs is not None:
        costs.save(args.save_costs)
    plans = _plans(args, costs)
    gpus, found = next((gpus, each) for gpus, each in plans if not isinstance(each, str))
    step = _simulated(found.best, costs)
    if args.out is not None:
        from lightning_zeroprompt.pipeline.render import write_timeline

        title = f"{found.best.label} on {found.best.schedule.ranks} x {found.best.data_parallel} GPUs"
        written = write_timeline(step.timeline, args.out, "plan", title)
    if args.json:
        print(_json(plans, args.show))
        return
    from rich.console import Console

    from lightning_zeroprompt.pipeline.render import print_timeline

    # Eight columns leave schedules' names no room on the 80 columns that a pipe is taken for.
    console = Console(width=max(Console().width, 110))
    if len(plans) > 1:
        _print_counts(console, plans, args.memory is not None)
    _print_candidates(console, gpus, found, args.show)
    print_timeline(step.timeline)
    console.print()
    _paste(console, found, args.save_costs or args.costs)
    if args.out is not None:
        console.print(f"\n{written[0]}, {written[1]} (chrome://tracing, Perfetto)", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    from lightning_zeroprompt.cli.plan_costs import parse_bandwidth, parse_bytes, parse_operations, parse_seconds

    parser = argparse.ArgumentParser(prog="zeroprompt-plan", description=__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--costs", type=Path, metavar="FILE", help="measured or edited costs, as JSON")
    model.add_argument("--model", metavar="SIZE", help="a GPT: 125m, 350m, 1.3b, 2.7b, 7b, 13b, 30b, 70b, 175b")
    model.add_argument("--layers", type=int, help="of a GPT, instead of the size's")
    model.add_argument("--width", type=int, help="of a GPT, instead of the size's")
    model.add_argument("--rows", type=int, default=1, help="of a GPT's micro-batch (default: 1)")
    model.add_argument("--sequence", type=int, default=2048, help="tokens of a GPT's row (default: 2048)")
    model.add_argument("--vocabulary", type=int, default=50_304, help="of a GPT (default: 50304)")
    model.add_argument("--module", metavar="PACKAGE.MODULE:CLASS", help="your own LightningModule")
    model.add_argument("--arguments", metavar="JSON", help="of the class, as a JSON object")
    model.add_argument(
        "--batch", help='a micro-batch for --module: "x=float32[8,16] y=int64[8]", without names a tuple'
    )
    model.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights (default: GPT bfloat16, own as is)")
    model.add_argument("--save-costs", type=Path, metavar="FILE", help="write the costs that are planned with")

    size = parser.add_argument_group("layout")
    size.add_argument("--gpus", type=int, nargs="+", metavar="N", help="try every layout of N GPUs; several: each N")
    size.add_argument("--ranks", type=int, metavar="P", help="pipeline ranks, for one layout")
    size.add_argument(
        "--data", type=int, default=1, metavar="D", help="data-parallel ranks beside --ranks (default: 1)"
    )
    size.add_argument(
        "--micro-batches", type=int, metavar="M", help="of all GPUs; with --ranks of each pipeline (default: 4 a GPU)"
    )
    size.add_argument("--stages-per-rank", type=int, metavar="V", help="default: the best")
    size.add_argument("--memory", type=parse_bytes, help="limit of a GPU, such as 80GiB (default: none)")
    size.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="activation checkpointing (default: where the limit makes it worth while)",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--interconnect", type=parse_bandwidth, help="between GPUs, such as 25GB/s (the default)")
    machine.add_argument("--latency", type=parse_seconds, help="of a message, such as 20us (the default)")
    machine.add_argument(
        "--collectives", type=parse_bandwidth, help="of gathers and reductions (default: the interconnect's)"
    )
    machine.add_argument("--transport", choices=("copy_engine", "nccl"), help="default: copy_engine up to 8 GPUs")
    machine.add_argument(
        "--flops", type=parse_operations, default=5e14, help="that matrix products reach (default: 500TFLOPS, an H200)"
    )
    machine.add_argument(
        "--memory-bandwidth", type=parse_bandwidth, default=3e12, help="of a GPU's own memory (default: 3TB/s)"
    )

    parser.add_argument("--show", type=int, default=20, help="candidates to list (default: 20)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write plan.png and plan.json (Chrome trace)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run ``zeroprompt-plan``.

    Args:
        argv: Arguments; those of the process when None.

    Raises:
        SystemExit: With 2 and one line on stderr where the input cannot be used, or nothing fits the memory limit.
    """
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"zeroprompt-plan: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
