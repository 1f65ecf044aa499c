# SPDX-License-Identifier: Apache-2.0
"""Our cases of ``pipeline.py`` on the bare executor: measured costs, plans made from them, and what they predict.

Before the first case rank 0 profiles the blocks of the whole model while the others wait, and all ranks measure their
links; every rank then has the same costs, makes the same plans, and simulates what it is about to run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pipeline_support import Bench, Measured, Step, loss_of
from torch import Tensor

from lightning_zeroprompt.pipeline.catalogue import build_schedule, is_listed
from lightning_zeroprompt.pipeline.chain import Chain
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link, Transport, costs_of_ranks
from lightning_zeroprompt.pipeline.executor import MicroBatch
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.host_profile import measure_host_action
from lightning_zeroprompt.pipeline.link_profile import measure_link, slowest_link
from lightning_zeroprompt.pipeline.meters import DeviceMeter
from lightning_zeroprompt.pipeline.orders import TYPICAL_COSTS
from lightning_zeroprompt.pipeline.peer_copy import PeerCopies
from lightning_zeroprompt.pipeline.pipeline import Pipeline, cut_chain
from lightning_zeroprompt.pipeline.planner import plan
from lightning_zeroprompt.pipeline.profiler import profile_chain
from lightning_zeroprompt.pipeline.recorder import StepRecorder
from lightning_zeroprompt.pipeline.render import timeline_text, write_timeline
from lightning_zeroprompt.pipeline.schedule import Kind, Schedule
from lightning_zeroprompt.pipeline.shard_profile import measure_sharding
from lightning_zeroprompt.pipeline.simulator import Simulator
from lightning_zeroprompt.pipeline.timeline import Timeline, align

__all__ = ["LIMIT_OF_PEAK", "OURS", "PLANNED", "costs_of", "run_ours", "run_planned", "spent", "split_settings"]

OURS: dict[str, dict[str, Any]] = {
    "zeropp-v2": {"schedule": "zeropp", "stages_per_rank": 2},
    "zeropp-v2-u4": {"schedule": "zeropp", "stages_per_rank": 2, "unit": 4},
    "zeropp-v4": {"schedule": "zeropp", "stages_per_rank": 4},
    "zeropp-vshape": {"schedule": "zeropp", "stages_per_rank": 2, "vshape": True},
    "overlap-u4-cap8": {"schedule": "zeropp_overlap", "stages_per_rank": 2, "unit": 4, "cap": 8},
    "overlap-u2-cap5": {"schedule": "zeropp_overlap", "stages_per_rank": 2, "unit": 2, "cap": 5},
    "zbv": {"schedule": "zbv", "stages_per_rank": 2},
    "zb-h1": {"schedule": "zb_h1", "stages_per_rank": 1},
    "1f1b": {"schedule": "1f1b", "stages_per_rank": 1},
    "interleaved-v4": {"schedule": "interleaved_1f1b", "stages_per_rank": 4},
    "bfs-v4": {"schedule": "breadth_first", "stages_per_rank": 4},
    "fsdp-v8": {"schedule": "zeropp", "stages_per_rank": 8, "pipeline": 1},
    "fsdp-v8-u2": {"schedule": "zeropp", "stages_per_rank": 8, "unit": 2, "pipeline": 1},
    "fsdp-v16-u2": {"schedule": "zeropp", "stages_per_rank": 16, "unit": 2, "pipeline": 1},
}
PLANNED = ("auto", "auto-limit")
"""Chosen by the planner for measured costs; the second with :data:`LIMIT_OF_PEAK` times the memory of ``1f1b``."""

LIMIT_OF_PEAK = 1.15
_MOMENTS = 8
"""Bytes a parameter that a profile counts for Adam's moments; nothing is optimized here."""


# -- costs ------------------------------------------------------------------------------------------------------------


def costs_of(bench: Bench, build: Callable[[], tuple[Chain, Callable[[], Any]]] | None = None) -> Costs:
    """Measure this machine and model, or read what was measured before (``--costs``).

    Args:
        bench: All ranks call this together.
        build: Makes the whole model on the device, and a function that runs one micro-batch of it; None is the GPT.
    """
    if bench.args.costs is not None:
        return Costs.load(bench.args.costs)
    chain, step = (build or partial(_gpt, bench))()
    # All at once, as in a step: ranks share a host's memory and its driver.
    bench.synchronize()
    costs = profile_chain(
        chain,
        step,
        DeviceMeter(bench.device, repeats=10 if bench.cuda else 2),
        message=partial(_message_link, bench),
        gather=partial(_collective_link, bench, "gather"),
        reduce=partial(_collective_link, bench, "reduce"),
        host_action=measure_host_action(bench.device, bench.groups(1).pipeline),
    )
    width = bench.dtype.itemsize

    def still(block: BlockCosts) -> BlockCosts:
        return replace(block, state=block.state - _MOMENTS * block.parameters // width, optimizer=0.0)

    transport: Transport = "nccl" if bench.world > 1 and _peers(bench) is None else "copy_engine"
    gather, reduce = _with_sharding(bench, costs.gather, costs.reduce)
    costs = replace(costs, blocks=tuple(map(still, costs.blocks)), gather=gather, reduce=reduce, transport=transport)
    costs = replace(costs, model="")
    costs = costs_of_ranks([Costs.from_json(text) for text in bench.gather(costs.to_json())])
    if bench.rank == 0 and bench.args.save_costs is not None:
        costs.save(bench.args.save_costs)
    return costs


def _gpt(bench: Bench) -> tuple[Chain, Callable[[], Tensor]]:
    model = bench.materialize(bench.model())
    tokens = bench.tokens(1)
    return bench.chain(model), lambda: loss_of(model(tokens), tokens)


def _peers(bench: Bench) -> PeerCopies | None:
    """What messages travel by; None is NCCL."""
    return None if bench.args.nccl else bench.groups(bench.world).peer_copies(bench.device)


def _message_link(bench: Bench, work: Sequence[Callable[[], Any]]) -> Link:
    """From rank 0 to rank 1, as the executor sends; the others look on."""
    if bench.world == 1:
        return Link(0.0, 1e12)
    group, peers = bench.groups(bench.world).pipeline, _peers(bench)

    def transfer(tensor: Tensor) -> None:
        if bench.rank > 1:
            return
        other = 1 - bench.rank
        if peers is not None:
            (peers.send if bench.rank == 0 else peers.receive)(tensor, other).wait()
        elif bench.rank == 0:
            dist.send(tensor, other, group=group)
        else:
            dist.recv(tensor, other, group=group)

    return slowest_link(bench.gather(measure_link(transfer, bench.device, work=work))[:2])


def _collective_link(bench: Bench, kind: Literal["gather", "reduce"], work: Sequence[Callable[[], Any]]) -> Link:
    """Of gathers or reductions over all ranks; a tensor is what each rank receives."""
    if bench.world == 1:
        return Link(0.0, 1e12)
    group = bench.groups(1).data_mesh.get_group()
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def transfer(tensor: Tensor) -> None:
        size = tensor.numel() // (bench.world - 1)
        if size not in buffers:
            whole = torch.zeros(size * bench.world, dtype=torch.uint8, device=bench.device)
            buffers[size] = whole.view(bench.dtype), whole[:size].clone().view(bench.dtype)
        whole, shard = buffers[size]
        if kind == "gather":
            dist.all_gather_into_tensor(whole, shard, group=group)
        else:
            dist.reduce_scatter_tensor(shard, whole, group=group)

    sizes = (2**16 * (bench.world - 1), 2**27 * (bench.world - 1) if bench.cuda else 2**20 * (bench.world - 1))
    return slowest_link(bench.gather(measure_link(transfer, bench.device, sizes, work=work)))


def _with_sharding(bench: Bench, gather: Link, reduce: Link) -> tuple[Link, Link]:
    """The same with what FSDP takes around collectives."""
    if bench.world == 1 or not bench.cuda:
        return gather, reduce
    mesh = bench.groups(1).data_mesh
    everyone = bench.gather(measure_sharding(gather, reduce, bench.device, mesh, bench.dtype))
    return slowest_link([link for link, _ in everyone]), slowest_link([link for _, link in everyone])


# -- cases ------------------------------------------------------------------------------------------------------------


def split_settings(bench: Bench, micro_batches: int, settings: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """P, micro-batches of one pipeline, and the schedule's settings for so many."""
    ranks = settings.get("pipeline", bench.world)
    count = max(1, micro_batches * ranks // bench.world)
    rest = {name: value for name, value in settings.items() if name != "pipeline"}
    if "unit" in rest:
        rest["unit"] = min(rest["unit"], count)
    return ranks, count, rest


def run_ours(bench: Bench, micro_batches: int, *, name: str) -> Measured:
    """A schedule of the catalogue, cut by estimated work."""
    ranks, count, settings = split_settings(bench, micro_batches, OURS[name])
    per_rank, kind = settings["stages_per_rank"], settings.pop("schedule")
    resident = min(2, per_rank) if kind.startswith("zeropp") else None
    costs = TYPICAL_COSTS if is_listed(kind, settings.get("vshape", False)) else None
    schedule = build_schedule(kind, ranks=ranks, micro_batches=count, resident=resident, costs=costs, **settings)
    cuts = cut_chain(find_chain(bench.model()), schedule.placement)
    return _run(bench, schedule, cuts, f"{name}_m{micro_batches}")


def run_planned(bench: Bench, micro_batches: int, *, limited: bool) -> Measured:
    """What the planner chooses for measured costs.

    Args:
        bench: With costs.
        micro_batches: M.
        limited: To :data:`LIMIT_OF_PEAK` times the most that ``1f1b`` has held in this run.

    Raises:
        RuntimeError: If ``1f1b`` has not run, or where peaks are not known.
    """
    limit = None
    if limited:
        if not bench.cuda:
            raise RuntimeError("the limit is a multiple of a peak, which GPUs alone report")
        peak = bench.peaks.get(("1f1b", micro_batches))
        if peak is None:
            raise RuntimeError("the limit is a multiple of the memory of 1f1b: let it run before, in the same run")
        # All ranks plan, and have to do so with equal numbers.
        limit = round(LIMIT_OF_PEAK * peak) - max(bench.gather(bench.memory()[0]))
    assert bench.costs is not None
    found = plan(bench.costs, ranks=bench.world, micro_batches=micro_batches, memory_limit=limit, recompute=False)
    bench.say(f"      plan: {found.best.label}; cuts {list(found.cuts)}")
    name = "auto-limit" if limited else "auto"
    return _run(bench, found.schedule, list(found.cuts), f"{name}_m{micro_batches}")


def _run(bench: Bench, schedule: Schedule, cuts: list[tuple[int, int]], name: str) -> Measured:
    gc.collect()  # of what cases before have left, or the profile
    held, data = bench.memory()[0], bench.world // schedule.ranks
    predicted = expected = None
    if bench.costs is not None:
        simulated = Simulator(schedule, bench.costs, cuts, data_parallel=data).run()
        predicted, expected = (simulated.seconds, held + max(simulated.peak_bytes)), simulated.timeline
    model = bench.model()
    groups = bench.groups(schedule.ranks)
    pipeline = Pipeline(
        bench.chain(model), schedule.placement, cuts, groups, bench.device, peer_copies=not bench.args.nccl
    )
    pipeline.prepare()
    parts = bench.tokens(schedule.micro_batches).chunk(schedule.micro_batches)
    given = [MicroBatch(tuple(part.shape), partial(pipeline.chain.capture, partial(model, part))) for part in parts]
    parameters = list(pipeline.parameters().values())
    losses: list[Tensor] = []

    def loss(output: Tensor, index: int) -> Tensor:
        value = loss_of(output, parts[index]) / schedule.micro_batches
        losses.append(value.detach())
        return value

    def step() -> Tensor | None:
        losses.clear()
        for parameter in parameters:
            parameter.grad = None
        pipeline.train_step(schedule, given, loss)
        return torch.stack(losses).sum() if losses else None

    measured = bench.time(step)
    if bench.args.timeline is not None:
        timeline = _record(bench, pipeline, step, name)
        bench.say("\n".join(spent(timeline, expected)))
    return replace(measured, predicted=predicted)


def _record(bench: Bench, pipeline: Pipeline, step: Step, name: str) -> Timeline:
    """Write and print the timeline of one more step."""
    recorder = pipeline.executor.recorder = StepRecorder(bench.device)
    step()
    pipeline.executor.recorder = None
    timeline = align(bench.gather(recorder.result()))
    if bench.rank == 0:
        write_timeline(timeline, bench.args.timeline, name, title=name)
        print(timeline_text(timeline, 160), flush=True)
    return timeline


def spent(measured: Timeline, predicted: Timeline | None = None) -> list[str]:
    """Where the time of a recorded step went, a line for each rank of one pipeline.

    Args:
        measured: All ranks' lanes.
        predicted: What the simulator says of one pipeline; it stands in parentheses.
    """
    lines = []
    ranks = len(measured.lanes if predicted is None else predicted.lanes)
    for rank in range(ranks):
        lanes = [measured.lanes[rank * (len(measured.lanes) // ranks)]]
        lanes += [] if predicted is None else [predicted.lanes[rank]]
        tasks = ""
        for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT):
            sums = [1e3 * sum(s.end - s.start for s in lane.tasks if s.task.kind is kind) for lane in lanes]
            tasks += f"{kind} {sums[0]:.1f} " + "".join(f"({each:.1f}) " for each in sums[1:])
        idle = "  ".join(f"{cause} {1e3 * seconds:.1f}" for cause, seconds in measured.idle(rank).items())
        lines.append(
            f"      rank {rank}: {tasks}ms recorded{' (predicted)' * (predicted is not None)}; idle: {idle} ms"
        )
    return lines
