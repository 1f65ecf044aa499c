# SPDX-License-Identifier: Apache-2.0
"""Pipeline schedules of this package beside torch's own, FSDP2 and the no-bubble limit, in one run.

A GPT stack (RMSNorm, causal SDPA, GELU MLP of 4 x the width, vocabulary 32,000, no biases) is trained on random tokens,
forward and backward passes alone, with bf16 parameters on GPUs. Every case runs the same work: M micro-batches, counted
over all GPUs together. All pipelines use the same blocks, the same cut and the same process group, whose NCCL channels
are capped. Steps are timed alone, between two synchronisations of all ranks; medians count.

Cases (``--cases``, comma-separated; ``--list`` prints them all):

* ``limit``: every rank runs the whole model on its share of the micro-batches in plain autograd and talks to nobody.
* ours on the bare executor, such as ``zeropp-v2-u4`` (2 stages a rank, units of 4); ``fsdp-v8`` is P=1 with blockwise
  gathering over all ranks;
* ``auto``: what the planner chooses for costs that were measured in this run (or given with ``--costs``), and
  ``auto-limit``: the same with memory limited to 1.15 x the measured peak of ``1f1b``, which has to run before;
* ``lightning:`` and one of ours, or ``auto``: the same through ``Trainer(strategy=ZeroPPStrategy(...))`` and an
  optimizer that does nothing, timed from one batch's start to the next;
* ``torch-...``: the schedules of ``torch.distributed.pipelining``;
* ``fsdp2-zero3`` and ``fsdp2-zero2``: ``fully_shard`` of every layer, with and without resharding after its forward.

With ``--predict``, or where a plan is among the cases, costs are measured first, and every case of ours on the bare
executor says how far its step time and its peak memory are from what the simulator made of them. With ``--compile`` the
layers of all cases are compiled, ours with split backward passes; with ``--compile-stages`` ours alone, each stage as
one, also where costs are measured.

TFLOP/s count 6 operations a parameter and token; ``of limit`` is the limit's step time over the case's. With
``--growth 200`` so many steps run, and the memory held after a tenth of them and after all is compared.

Example:
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --model 2.7b --blocks half
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --model 2.7b --cases zeropp-v2,zbv --micro-batches 8 --growth 200
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --model 2.7b --cases limit,1f1b,auto,auto-limit
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --tiny --device cpu
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline_lightning import run_lightning
from pipeline_ours import OURS, PLANNED, costs_of, run_ours, run_planned
from pipeline_support import Bench, Measured, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.pipeline import cut_chain
from lightning_zeroprompt.pipeline.schedule import Placement

MODELS = {"2.7b": (2560, 32), "6.7b": (4096, 32), "tiny": (32, 8)}
"""Width and layers."""

TORCH: dict[str, tuple[str, int, bool]] = {
    "torch-1f1b": ("Schedule1F1B", 1, False),
    "torch-interleaved-v4": ("ScheduleInterleaved1F1B", 4, False),
    "torch-bfs-v4": ("ScheduleLoopedBFS", 4, False),
    "torch-izb-v2": ("ScheduleInterleavedZeroBubble", 2, False),
    "torch-zbv": ("ScheduleZBVZeroBubble", 2, True),
    "torch-dualpipev": ("ScheduleDualPipeV", 2, True),
}
"""Class, stages a rank, V-shaped placement."""

PEERS = ("limit", *TORCH, "fsdp2-zero3", "fsdp2-zero2")
LIGHTNING = tuple(f"lightning:{name}" for name in (*OURS, "auto"))
ALL = ("limit", *OURS, *PLANNED, *LIGHTNING, *PEERS[1:])
DEFAULT = ("limit", *OURS, *PLANNED, "lightning:zeropp-v2", "lightning:zbv", "lightning:auto", *PEERS[1:])


# -- cases ------------------------------------------------------------------------------------------------------------


def run_limit(bench: Bench, micro_batches: int) -> Measured:
    model = bench.materialize(bench.model(halves=False))
    count = max(1, micro_batches // bench.world)
    parts = bench.tokens(count).chunk(count)

    def step() -> Tensor:
        model.zero_grad()
        for part in parts:
            loss = loss_of(model(part), part) / count
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() * count

    return bench.time(step)


def run_fsdp2(bench: Bench, micro_batches: int, *, zero3: bool) -> Measured:
    model = bench.materialize(bench.model(halves=False))
    mesh = init_device_mesh(bench.device.type, (bench.world,))
    for part in (*list(model.blocks)[1:-1], model):
        fully_shard(part, mesh=mesh, reshard_after_forward=zero3)
    count = max(1, micro_batches // bench.world)
    parts = bench.tokens(count).chunk(count)

    def step() -> Tensor:
        model.zero_grad()
        for index, part in enumerate(parts):
            model.set_requires_gradient_sync(index == count - 1)  # type: ignore[operator]
            loss = loss_of(model(part), part) / count
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() * count

    return bench.time(step)


def run_torch(bench: Bench, micro_batches: int, *, name: str, per_rank: int, vshape: bool) -> Measured:
    placement = Placement(bench.world, per_rank, vshape)
    chain = find_chain(bench.model())
    cuts = cut_chain(chain, placement)
    group = bench.groups(bench.world).pipeline
    mine = {
        stage: bench.materialize(nn.Sequential(*chain.blocks[slice(*cuts[stage])]))
        for stage in placement.stages_of(bench.rank)
    }
    stages = [PipelineStage(part, stage, placement.stages, bench.device, group=group) for stage, part in mine.items()]
    kind: Any = getattr(torch_schedules, name)
    schedule = kind(stages if per_rank > 1 else stages[0], micro_batches, loss_fn=loss_of)
    tokens = bench.tokens(micro_batches)
    args = (tokens,) if 0 in mine else ()
    last = placement.stages - 1 in mine
    # Logits of all micro-batches would be kept and joined.
    options = {"return_outputs": False} if "return_outputs" in inspect.signature(schedule.step).parameters else {}

    def step() -> Tensor | None:
        for part in mine.values():
            part.zero_grad()
        losses: list[Tensor] = []
        schedule.step(*args, **({"target": tokens, "losses": losses} if last else {}), **options)
        return torch.stack([loss.detach() for loss in losses]).mean() if last else None

    return bench.time(step)


def case(name: str) -> Callable[[Bench, int], Measured]:
    if name == "limit":
        return run_limit
    if name in OURS:
        return partial(run_ours, name=name)
    if name in PLANNED:
        return partial(run_planned, limited=name == "auto-limit")
    if name.startswith("lightning:"):
        return partial(run_lightning, name=name.removeprefix("lightning:"))
    if name in TORCH:
        kind, per_rank, vshape = TORCH[name]
        return partial(run_torch, name=kind, per_rank=per_rank, vshape=vshape)
    return partial(run_fsdp2, zero3=name == "fsdp2-zero3")


# -- results ----------------------------------------------------------------------------------------------------------


def attempt(bench: Bench, name: str, micro_batches: int) -> dict[str, Any]:
    """Run a case; an error is a result like any other."""
    measured, error = None, None
    try:
        measured = case(name)(bench, micro_batches)
    except Exception as raised:
        error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        if bench.args.traceback:
            traceback.print_exc()
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
    everyone = bench.gather((measured, error))
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
    result: dict[str, Any] = {"case": name, "micro_batches": micro_batches}
    if errors:
        return {**result, "error": "; ".join(errors)}
    all_measured: list[Measured] = [measured for measured, _ in everyone]
    # A step has taken as long as on the rank where it took longest.
    seconds = [max(times) for times in zip(*(each.seconds for each in all_measured), strict=True)]
    median = statistics.median(seconds)
    args = bench.args
    parameters = args.layers * 12 * args.width**2 + 2 * args.vocabulary * args.width
    tokens = micro_batches * args.rows * args.length
    result |= {
        "ms": round(median * 1e3, 2),
        "ms_min": round(min(seconds) * 1e3, 2),
        "ms_max": round(max(seconds) * 1e3, 2),
        "tokens_per_s": round(tokens / median),
        "tflops_per_gpu": round(6 * parameters * tokens / median / bench.world / 1e12, 2),
        "loss": next((round(each.loss, 3) for each in all_measured if each.loss is not None), None),
    }
    predicted = [each.predicted for each in all_measured if each.predicted]
    if predicted:
        # Ranks begin with different memory held.
        seconds_of, held_of = predicted[0][0], max(held for _, held in predicted)
        result |= {"predicted_ms": round(seconds_of * 1e3, 2), "time_error": round(seconds_of / median - 1, 3)}
    if bench.cuda:
        peak = bench.peaks[name, micro_batches] = max(each.peaks[1] for each in all_measured if each.peaks)
        result["peak_gib"] = round(peak / 2**30, 2)
        if predicted:
            result |= {"predicted_gib": round(held_of / 2**30, 2), "memory_error": round(held_of / peak - 1, 3)}
    if args.growth:
        held = [each.held for each in all_measured if each.held]
        peaks = [each.peaks for each in all_measured if each.peaks]
        result["growth_bytes"] = max(late - early for early, late in held)
        result["growth_peak_bytes"] = max(late - early for early, late in peaks)
        result["held_bytes"] = max(late for _, late in held)
    return result


def line(result: dict[str, Any], limit: float | None) -> str:
    head = f"M={result['micro_batches']:3d} {result['case']:26s}"
    if "error" in result:
        return f"{head} failed: {result['error']}"
    text = (
        f"{head} {result['ms']:9.1f} ms  {result['tokens_per_s']:9,d} tokens/s  {result['tflops_per_gpu']:6.1f} TFLOP/s"
    )
    if limit is not None:
        result["of_limit"] = round(limit / result["ms"], 3)
        text += f"  of limit {result['of_limit']:.3f}"
    if "peak_gib" in result:
        text += f"  peak {result['peak_gib']:6.2f} GiB"
    if "time_error" in result:
        text += f"  predicted {result['predicted_ms']:.1f} ms ({result['time_error']:+.1%})"
    if "memory_error" in result:
        text += f", {result['predicted_gib']:.2f} GiB ({result['memory_error']:+.1%})"
    if "growth_bytes" in result:
        text += f"  growth {result['growth_bytes']:,} bytes held, {result['growth_peak_bytes']:,} at the peak"
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="2.7b", choices=sorted(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few steps, M=4: does it run")
    parser.add_argument("--blocks", default="half", choices=["half", "layer"], help="what pipelines are cut into")
    parser.add_argument("--cases", default="", help="comma-separated; default: " + ",".join(DEFAULT))
    parser.add_argument("--list", action="store_true", help="print all cases and end")
    parser.add_argument("--micro-batches", default="4,8,16", help="M, comma-separated")
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--heat-s", type=float, default=2.0, help="of matrix products on GPUs before each case")
    parser.add_argument("--growth", type=int, default=0, help="so many steps, and how memory grew")
    parser.add_argument("--nccl", action="store_true", help="our cases on the bare executor send by NCCL alone")
    parser.add_argument("--timeline", type=Path, help="write timelines of our cases on the bare executor into a folder")
    parser.add_argument("--predict", action="store_true", help="measure costs, and predict our cases from them")
    parser.add_argument("--costs", type=Path, help="costs measured before, instead of measuring them")
    parser.add_argument("--save-costs", type=Path, help="write the costs that were measured")
    parser.add_argument("--compile", action="store_true", help="the layers of all cases")
    parser.add_argument("--compile-stages", action="store_true", help="of our cases")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    parser.add_argument("--timeout-s", type=float, default=300, help="of collectives")
    parser.add_argument("--traceback", action="store_true", help="of cases that fail")
    if parser.parse_known_args(argv)[0].tiny:
        parser.set_defaults(model="tiny", length=16, vocabulary=64, steps=2, warmup=1, micro_batches="4")
    args = parser.parse_args(argv)
    args.width, args.layers = MODELS[args.model]
    args.head = min(128, args.width // 2)
    if args.growth:
        args.steps = args.growth
    args.cases = args.cases.split(",") if args.cases else list(DEFAULT)
    unknown = sorted(set(args.cases) - set(ALL))
    if unknown:
        parser.error(f"unknown cases {', '.join(unknown)}; there are {', '.join(ALL)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.list:
        print("\n".join(ALL))
        return
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc-per-node N benchmarks/pipeline.py")
    bench = Bench(args)
    device = torch.cuda.get_device_name(bench.device) if bench.cuda else "cpu"
    bench.say(f"{bench.world} x {device}, torch {torch.__version__}, {args.model}, blocks: {args.blocks}")
    if args.predict or args.costs or {*PLANNED, "lightning:auto"} & set(args.cases):
        begun = time.perf_counter()
        bench.costs = costs_of(bench)
        counts = [int(count) for count in args.micro_batches.split(",")]
        ideal = ", ".join(f"M={m}: {1e3 * bench.costs.ideal_seconds(bench.world, m):.1f} ms" for m in counts)
        bench.say(f"costs in {time.perf_counter() - begun:.1f} s; no-bubble step of all measured work: {ideal}")
        for name in ("message", "gather", "reduce", "host_action"):
            bench.say(f"{name}: {getattr(bench.costs, name)}")
    started, results = time.perf_counter(), []
    for count in map(int, args.micro_batches.split(",")):
        limit = None
        for name in args.cases:
            if bench.gather(time.perf_counter() - started)[0] > args.budget_s:
                result = {"case": name, "micro_batches": count, "error": f"not started: {args.budget_s} s are over"}
            else:
                result = attempt(bench, name, count)
            if name == "limit":
                limit = result.get("ms")
            bench.say(line(result, limit))
            results.append(result)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings["budget_s"] = None if args.budget_s == float("inf") else args.budget_s
    bench.say(
        json.dumps(
            {
                "benchmark": "pipeline",
                "device": device,
                "gpus": bench.world,
                "torch": torch.__version__,
                "dtype": str(bench.dtype).removeprefix("torch."),
                "settings": settings,
                "results": results,
            }
        )
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
