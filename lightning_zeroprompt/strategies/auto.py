# SPDX-License-Identifier: Apache-2.0
"""``schedule="auto"``: the planner chooses, first by what is known, then by what was measured in this run.

Before training the model is cut, and its stages placed, for given costs (``costs=``, from ``zeroprompt-plan`` or
``profile_chain``) or for estimates from parameters. The third batch is recorded: every rank's times of F, B and W go to
all ranks. Costs that were given and stand in the proportions of what was recorded are kept: they were measured oftener,
and tell a slow host from a slow device. Otherwise the recorded times take their place, and if another order is then
faster by more than the noise of one recording, it is taken. Cut and placement stay as they are, since weights do not
move; sizes are those that were known before. All ranks compute the same plan from the same numbers, and each plan keeps
the memory limit.

Alternatives: measuring before the cut needs the whole model on one device; planning anew all the time would follow
noise. Cost: one recorded step, which waits for the device, and seconds of planning at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_zeroprompt.pipeline.chain import Chain
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, Link, stage_costs
from lightning_zeroprompt.pipeline.partition import block_cost, module_cost
from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.planner import Candidate, plan
from lightning_zeroprompt.pipeline.profiler import model_fingerprint
from lightning_zeroprompt.pipeline.recorder import StepRecorder
from lightning_zeroprompt.pipeline.schedule import Kind, Placement, Schedule
from lightning_zeroprompt.pipeline.simulator import simulate
from lightning_zeroprompt.pipeline.timeline import Lane

__all__ = ["RECORDED_BATCH", "AutoSchedule", "estimated_costs", "gpu_sizes", "measured_costs"]

RECORDED_BATCH = 2
"""Number of the batch whose times are taken: the first ones compile kernels and fill allocators."""

_LINK = Link(latency=3e-5, bandwidth=1e11)
"""Between GPUs of one host; what matters of it beside a stage's measured times is that it is not nothing."""
_SECONDS = 1e-11
"""Of a parameter that a micro-batch is multiplied with; any number does where no other time is known."""


def estimated_costs(chain: Chain) -> Costs:
    """Costs of blocks from their parameters alone, in the ratios of a transformer's F, B and W.

    Args:
        chain: The model's blocks.
    """

    def costs(work: float, parameters: int) -> BlockCosts:
        seconds = max(work, 1.0) * _SECONDS
        # What is held grows with the work, so that of two plans the one that holds less can be told.
        held = int(work) + 1
        return BlockCosts(
            forward=seconds,
            backward=1.4 * seconds,
            weight=0.85 * seconds,
            parameters=parameters,
            gradients=parameters,
            state=4 * parameters,
            activations=held,
            weight_inputs=held // 2,
        )

    before, behind, _ = chain.outside()
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in chain.blocks]
    outside = [
        costs(sum(module_cost(module) for module in part), 0) if part else BlockCosts() for part in (before, behind)
    ]
    free = Link(0.0, 1e15)
    return Costs(
        tuple(costs(block_cost(block), size) for block, size in zip(chain.blocks, sizes, strict=True)),
        message=free,
        gather=free,
        reduce=free,
        before=outside[0],
        behind=outside[1],
    )


def measured_costs(lanes: Sequence[Lane], stages: Costs) -> Costs:
    """Costs of stages with the times of recorded steps.

    Args:
        lanes: Of all ranks, data-parallel ones too.
        stages: What was known, whole stages in the place of blocks: sizes and links stay.
    """
    times: dict[tuple[int, Kind], list[float]] = {}
    for lane in lanes:
        for span in lane.tasks:
            times.setdefault((span.task.stage, span.task.kind), []).append(span.end - span.start)
    least = 1e-7

    def median(stage: int, kind: Kind) -> float:
        return max(statistics.median(times[stage, kind]), least)

    measured = tuple(
        replace(
            block,
            forward=median(stage, Kind.FORWARD),
            backward=median(stage, Kind.BACKWARD),
            weight=median(stage, Kind.WEIGHT),
            full_backward=None,
        )
        for stage, block in enumerate(stages.blocks)
    )
    return replace(stages, blocks=measured)


class AutoSchedule:
    """Plans for one model.

    Args:
        costs: Measured before, or the path of a file with them; None estimates.
        stages_per_rank: V; None chooses: with measured costs freely, else 2 where there are blocks enough.
        memory_limit: Bytes that a GPU may hold by the costs' sizes; None is no limit (but see ``limit_to_gpus``).
        recompute: Whether blocks run under activation checkpointing.

    Raises:
        ValueError: If memory is limited and no costs say what is held, or a file of costs cannot be read.
    """

    def __init__(
        self,
        costs: Costs | str | Path | None,
        stages_per_rank: int | None,
        memory_limit: int | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        self._given = costs if costs is None or isinstance(costs, Costs) else Costs.load(Path(costs))
        if memory_limit is not None and (self._given is None or not _says_what_is_held(self._given)):
            raise ValueError(
                f"memory_limit={memory_limit}: nothing says what blocks hold; give costs= measured by profile_chain, "
                "or written by zeroprompt-plan --save-costs"
            )
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit={memory_limit}: give bytes a GPU, such as 60 * 2**30")
        self._memory_limit, self._recompute = memory_limit, recompute
        self._limit_is_ours = False
        self._stages_per_rank = stages_per_rank
        self._stages: Costs | None = None
        self._cuts: tuple[tuple[int, int], ...] = ()
        self._chosen: Candidate | None = None
        self.measured = False

    def limit_to_gpus(self, sizes: Sequence[int]) -> None:
        """Limit memory to most of the smallest GPU's, where no limit was given and the costs say what blocks hold.

        Args:
            sizes: Bytes of all ranks' GPUs; empty where there are none.
        """
        if sizes and self._memory_limit is None and self._given is not None and _says_what_is_held(self._given):
            self._memory_limit, self._limit_is_ours = int(_SHARE_OF_GPU * min(sizes)), True

    def cut(self, chain: Chain, ranks: int, data: int, micro_batches: int) -> tuple[Placement, list[tuple[int, int]]]:
        """Choose the cut and the placement.

        Args:
            chain: The model's blocks.
            ranks: P.
            data: D.
            micro_batches: M that is expected.

        Raises:
            ValueError: If there are fewer blocks than stages, the costs are of another model, or nothing fits the
                memory limit.
        """
        costs, per_rank = self._given, self._stages_per_rank
        if costs is not None:
            # Where they were measured is not compared: plans for a machine that one does not have are made, too.
            costs.check_matches(model=model_fingerprint(chain), machine=costs.machine)
        else:
            costs = estimated_costs(chain)
            # More stages cost launches and messages, of which parameters tell nothing.
            per_rank = per_rank or (2 if len(chain) >= 2 * ranks else 1)
        if len(costs.blocks) != len(chain):
            raise ValueError(
                f"costs of {len(costs.blocks)} blocks for a model with {len(chain)}: they were measured for another "
                "model or another configure_pipeline(); measure again"
            )
        try:
            found = plan(
                costs,
                ranks=ranks,
                data_parallel=data,
                micro_batches=micro_batches,
                memory_limit=self._memory_limit,
                stages_per_rank=per_rank,
                recompute=self._recompute,
            )
        except ValueError as error:
            if self._limit_is_ours:
                error.add_note(f"(the limit is {_SHARE_OF_GPU:.0%} of the smallest GPU; memory_limit= sets another)")
            raise
        self._chosen, self._cuts = found.best, found.cuts
        self._stages = _as_blocks(costs.recomputed() if self._recompute else costs, found.cuts)
        return found.schedule.placement, list(found.cuts)

    def build(self, placement: Placement, data: int, micro_batches: int) -> tuple[Schedule, str]:
        """The schedule for a number of micro-batches, on the cut and placement that were chosen.

        Returns:
            It, and what it is in a few words.
        """
        if self._stages is None or self._chosen is None:
            raise RuntimeError("nothing has been cut yet")
        if not self.measured and self._chosen.schedule.micro_batches == micro_batches:
            return self._chosen.schedule, self._chosen.label
        limit = self._memory_limit
        found = plan(
            self._stages,
            ranks=placement.ranks,
            data_parallel=data,
            micro_batches=micro_batches,
            memory_limit=limit,
            stages_per_rank=placement.stages_per_rank,
            recompute=False,
        )
        best = min(
            (
                each
                for each in (found.best, *found.candidates)
                if each.schedule.placement == placement and (limit is None or each.peak_bytes <= limit)
            ),
            key=lambda each: each.seconds if each is not found.best else each.seconds / _EQUAL,
        )
        if self._chosen.schedule.micro_batches == micro_batches:
            stages = [(stage, stage + 1) for stage in range(placement.stages)]
            kept = simulate(self._chosen.schedule, self._stages, stages, data_parallel=data)
            if kept.seconds <= _NOISE * best.seconds:
                return self._chosen.schedule, self._chosen.label
        return best.schedule, best.label

    @contextmanager
    def learning(self, batch: int, pipeline: Pipeline, forget: Callable[[], None]) -> Iterator[None]:
        """Record a training step if it is time to; one that somebody else records is left to them.

        Args:
            batch: Its number.
            pipeline: The model.
            forget: Called when what was built before is out of date.
        """
        executor = pipeline.executor
        if self.measured or batch < RECORDED_BATCH or executor.recorder is not None:
            yield
            return
        recorder = executor.recorder = StepRecorder(pipeline.device)
        try:
            yield
        finally:
            executor.recorder = None
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, recorder.result(), group=pipeline.groups.everyone)
        self.learn([lane for _, _, lane in everyone])
        forget()

    def learn(self, lanes: Sequence[Lane]) -> None:
        """Plan for measured times from now on; see :func:`measured_costs`."""
        if self._stages is None:
            raise RuntimeError("nothing has been cut yet")
        self.measured = True
        if self._given is None:
            self._stages = measured_costs(lanes, _with_links(self._stages, _LINK))
            return
        found = measured_costs(lanes, self._stages)
        if not _in_proportion(found, self._stages):
            self._stages = found


_EQUAL = 1.005
"""What the planner chose among equals bears jitter better, or holds less."""
_NOISE = 1.02
"""Times of one recorded step in which an order is as good as a better one."""
_PROPORTION = 1.2
"""How far the factors may lie apart by which recorded times differ from costs that are kept."""


_SHARE_OF_GPU = 0.85
"""Of a GPU's memory that a plan may use: the rest is for contexts, communicators and what lies between tensors."""


def gpu_sizes(device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    """Bytes of the GPUs of all ranks of a group, which call this together; empty on CPUs."""
    if device.type != "cuda":
        return []
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, torch.cuda.get_device_properties(device).total_memory, group=group)
    return sizes


def _says_what_is_held(costs: Costs) -> bool:
    return any(block.activations for block in costs.blocks)


def _in_proportion(found: Costs, known: Costs) -> bool:
    """Whether two costs are the same but for one factor: each stage's, and F, B and W of all stages."""

    def table(costs: Costs) -> list[float]:
        rows = [(block.forward, block.backward, block.weight) for block in costs.blocks]
        return [*map(sum, rows), *map(sum, zip(*rows, strict=True))]

    factors = [one / other for one, other in zip(table(found), table(known), strict=True) if other > 0]
    return max(factors) <= _PROPORTION * min(factors)


def _with_links(costs: Costs, link: Link) -> Costs:
    return replace(costs, message=link, gather=link, reduce=link)


def _as_blocks(costs: Costs, cuts: Sequence[tuple[int, int]]) -> Costs:
    """Costs with whole stages in the place of blocks."""
    return replace(costs, blocks=tuple(stage_costs(costs, cuts)), before=BlockCosts(), behind=BlockCosts())
