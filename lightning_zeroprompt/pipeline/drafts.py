# SPDX-License-Identifier: Apache-2.0
"""Which schedules a planner looks at: every published one, and list schedules for the measured costs.

A *setting* is all that is decided before an order: cuts, placement, data-parallel size, recomputation. A *draft* is a
schedule in a setting with two quick figures: the makespan of its order (no host, no collectives), and the memory that
its lists hold (exact but for receive buffers). They decide what is worth simulating.

List schedules vary the unit U, held activations, resident stages K, and *patience* (how much a W may hold up others).
Their number is bounded by the tasks that they order, not by a clock, so that equal input gives equal drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_zeroprompt.pipeline.catalogue import SCHEDULES, build_schedule
from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs, stage_costs
from lightning_zeroprompt.pipeline.local_search import Orders
from lightning_zeroprompt.pipeline.lowering import add_collectives
from lightning_zeroprompt.pipeline.memory import peak_bytes
from lightning_zeroprompt.pipeline.orders import ListCosts, Order, list_schedule
from lightning_zeroprompt.pipeline.partition import measured_cuts
from lightning_zeroprompt.pipeline.schedule import COMPUTE, Placement, Schedule

__all__ = ["PLANNED", "Draft", "Setting", "listed", "published", "settings_of"]

PLANNED = "planned"
"""Name of schedules that are in no catalogue."""
_PATIENCE = (0.0, 0.5, 1.0)
"""Greedy first: patience pays only where little may be held, up to 8 % of a step there."""


@dataclass(frozen=True)
class Setting:
    """What is decided before an order.

    Attributes:
        costs: Of the blocks, with recomputation where that is chosen.
        placement: Stages to ranks.
        cuts: For each stage its first block and the one behind its last.
        micro_batches: M.
        data_parallel: D.
        recompute: Whether blocks run under activation checkpointing.
        memory_limit: Bytes a rank; None for no limit.
    """

    costs: Costs
    placement: Placement
    cuts: tuple[tuple[int, int], ...]
    micro_batches: int
    data_parallel: int
    recompute: bool
    memory_limit: int | None

    @cached_property
    def stages(self) -> list[BlockCosts]:
        """Costs of the stages."""
        return stage_costs(self.costs, self.cuts)

    @property
    def tasks(self) -> int:
        """F, B and W in a step."""
        return 3 * self.placement.stages * self.micro_batches

    @cached_property
    def list_costs(self) -> list[ListCosts]:
        """What list scheduling knows of each stage; where no memory was measured, all stages hold the same."""
        action, message = self.costs.host_action, self.costs.message
        measured = any(stage.activations for stage in self.stages)
        return [
            ListCosts(
                max(stage.forward, action + stage.host_forward),
                max(stage.backward, action + stage.host_backward),
                max(stage.weight, action + stage.host_weight),
                message.seconds(stage.output),
                *((float(stage.activations), float(stage.weight_inputs)) if measured else (1.0, 0.5)),
            )
            for stage in self.stages
        ]

    @cached_property
    def late_bytes(self) -> list[float]:
        """For each stage the part of its state that its first W makes."""
        alone = self.data_parallel == 1
        return [float(min(stage.gradients, stage.state)) if alone else 0.0 for stage in self.stages]

    def fixed_bytes(self, rank: int, resident: int) -> float:
        """What a rank holds besides activations, weight inputs and what comes late, at most."""
        stages = self.placement.stages_of(rank)
        own = [self.stages[stage] for stage in stages]
        held = sum(stage.state for stage in own) / self.data_parallel - sum(self.late_bytes[stage] for stage in stages)
        held += max(stage.workspace for stage in own) + 2 * max(stage.output for stage in self.stages)
        if self.data_parallel > 1:
            held += sum(sorted(stage.parameters for stage in own)[-resident:])
            held += sum(sorted(stage.gradients for stage in own)[-2:])
        return held

    def room(self, resident: int, *, late: bool) -> list[float] | None:
        """For each rank what the limit leaves for activations; None without one.

        Args:
            resident: K.
            late: Leave room for what comes late too, at any time.
        """
        if self.memory_limit is None or not any(stage.activations for stage in self.stages):
            return None
        left = [self.memory_limit - self.fixed_bytes(rank, resident) for rank in range(self.placement.ranks)]
        for stage, held in enumerate(self.late_bytes if late else ()):
            left[self.placement.rank_of(stage)] -= held
        return left

    def orders(self, *, keep: bool, resident: int) -> Orders:
        """What judges orders in this setting."""
        ranks = range(self.placement.ranks)
        tails = [
            sum(self.stages[stage].optimizer for stage in self.placement.stages_of(rank)) / self.data_parallel
            for rank in ranks
        ]
        return Orders(
            self.placement,
            self.micro_batches,
            self.list_costs,
            tails=tails,
            limits=self.room(resident, late=False),
            gradients=self.late_bytes,
            resident_order=keep,
        )

    def draft(self, label: str, schedule: Schedule, arguments: dict[str, Any] | None = None) -> Draft:
        """A schedule with its quick figures."""
        orders = self.orders(keep=False, resident=schedule.resident)
        seconds = orders.judge(orders.numbers(schedule.tasks))[0]
        peak = max(
            peak_bytes(tasks, self.stages, self.placement.stages_of(rank), self.data_parallel)
            for rank, tasks in enumerate(schedule.tasks)
        )
        return Draft(self, label, schedule, seconds, peak, arguments)

    def planned(self, label: str, order: Order, unit: int, resident: int) -> Draft:
        """A draft of an order that is in no catalogue."""
        lists = (add_collectives(tasks, unit, resident, prefetch=resident > 1) for tasks in order)
        tasks = tuple(map(tuple, lists))
        return self.draft(label, Schedule(PLANNED, self.placement, self.micro_batches, unit, resident, tasks))


@dataclass(frozen=True)
class Draft:
    """A schedule in a setting.

    Attributes:
        setting: Where it runs.
        label: What it is, in a few words.
        schedule: Without transfers.
        quick_seconds: Makespan without host, collectives and messages' queues.
        quick_bytes: Memory without receive buffers, of the rank with most.
        arguments: Of ``build_schedule`` besides ranks and micro-batches; None for what is in no catalogue.
    """

    setting: Setting
    label: str
    schedule: Schedule
    quick_seconds: float
    quick_bytes: int
    arguments: dict[str, Any] | None

    @property
    def order(self) -> list[list[Any]]:
        """F, B and W alone."""
        return [[task for task in tasks if task.kind in COMPUTE] for tasks in self.schedule.tasks]


def units(setting: Setting) -> list[int]:
    """Units worth trying: all, 2 P, P, half of all; divisors of M where one is near, as a short unit is dear."""
    count, ranks = setting.micro_batches, setting.placement.ranks

    def near(unit: int) -> int:
        if unit >= count:
            return count
        return next((u for u in range(unit, min(count, 2 * unit)) if count % u == 0), unit)

    wanted = [count, near(2 * ranks), near(ranks), near(max(1, count // 2))]
    if setting.data_parallel > 1 or setting.placement.ranks == 1:
        wanted += [near(max(1, count // 4)), near(max(1, count // 8))]
    return list(dict.fromkeys(wanted))


def residents(setting: Setting) -> list[int]:
    """K worth trying: without sharding everything is resident, and saying so saves the host its gathers."""
    per_rank = setting.placement.stages_per_rank
    return [per_rank] if setting.data_parallel == 1 else sorted({1, min(2, per_rank), per_rank})


def published(setting: Setting) -> Iterator[Draft]:
    """Every schedule of the catalogue that fits the placement."""
    placement, count = setting.placement, setting.micro_batches
    per_rank, ranks = placement.stages_per_rank, placement.ranks
    for name in SCHEDULES:
        if name in ("1f1b", "zb_h1") and per_rank > 1:
            continue
        if (name == "zbv" and (per_rank != 2 or not placement.vshape)) or (
            name in ("interleaved_1f1b", "breadth_first") and placement.vshape
        ):
            continue
        if name == "interleaved_1f1b" and per_rank == 1:
            continue  # that is 1f1b
        if not name.startswith("zeropp"):
            arguments: dict[str, Any] = {"name": name, "stages_per_rank": per_rank}
            yield setting.draft(
                f"{name}, V={per_rank}", build_schedule(ranks=ranks, micro_batches=count, **arguments), arguments
            )
            continue
        listed_here = name == "zeropp_overlap" or placement.vshape
        # Of list schedules there will be more, made for each stage's own times.
        for unit in units(setting)[: 2 if listed_here else 4]:
            for resident in residents(setting)[:2]:
                arguments = {
                    "name": name,
                    "stages_per_rank": per_rank,
                    "unit": unit,
                    "vshape": placement.vshape,
                    "resident": resident,
                }
                times = mean_costs(setting) if listed_here else None
                schedule = build_schedule(ranks=ranks, micro_batches=count, costs=times, **arguments)
                yield setting.draft(f"{name}, {_shape(setting, unit, resident)}", schedule, arguments)


def listed(setting: Setting) -> Iterator[Draft]:
    """List schedules for the measured costs, the likely ones first."""
    per_rank = setting.placement.stages_per_rank
    largest = max(cost.activations for cost in setting.list_costs)
    for patience in _PATIENCE:
        for unit in units(setting) if per_rank > 1 else [setting.micro_batches]:
            for resident in residents(setting):
                for cap in _caps(setting, unit):
                    order = _list(setting, unit, resident, None if cap is None else cap * largest, patience)
                    if order is None:
                        continue
                    words = f", at most {cap} held" if cap is not None else ""
                    label = f"listed, {_shape(setting, unit, resident)}{words}, patience {patience:g}"
                    yield setting.planned(label, order, unit, resident)


def _list(setting: Setting, unit: int, resident: int, cap: float | None, patience: float) -> Order | None:
    """A list schedule that holds what the cap and the memory limit allow; None where there is none."""
    ranks, room = setting.placement.ranks, setting.room(resident, late=True)
    capped = None if cap is None else [cap] * ranks
    ways = [capped]
    if room is not None:
        # What a rank holds besides is overestimated, so a low cap alone may fit where both together leave no order.
        ways.insert(0, room if cap is None else [min(cap, most) for most in room])
    for held in ways if cap is not None else ways[:1]:
        try:
            return list_schedule(
                setting.placement,
                setting.micro_batches,
                unit,
                held=held,
                patience=patience,
                costs=setting.list_costs,
            )
        except ValueError:  # too low for this unit
            continue
    return None


def mean_costs(setting: Setting) -> ListCosts:
    """Of a stage, on average: what the catalogue's list schedules take."""
    each = setting.list_costs

    return ListCosts(
        sum(cost.forward for cost in each) / len(each),
        sum(cost.backward for cost in each) / len(each),
        sum(cost.weight for cost in each) / len(each),
        sum(cost.transfer for cost in each) / len(each),
    )


def _caps(setting: Setting, unit: int) -> list[int | None]:
    """Held activations worth trying: as the memory limit has it, 1F1B's, twice that, and between; the least."""
    ranks, per_rank = setting.placement.ranks, setting.placement.stages_per_rank
    least, every = (per_rank - 1) * unit + 1, per_rank * setting.micro_batches
    caps = [2 * ranks * per_rank, ranks * per_rank, 3 * ranks * per_rank // 2, least]
    return [None, *dict.fromkeys(cap for cap in caps if least <= cap < every)]


def _shape(setting: Setting, unit: int, resident: int) -> str:
    placement = setting.placement
    words = f"V={placement.stages_per_rank}{' as a V' if placement.vshape else ''}, U={unit}"
    return words + (f", K={resident}" if setting.data_parallel > 1 else "")


def settings_of(
    costs: Costs,
    ranks: int,
    micro_batches: int,
    data_parallel: int,
    memory_limit: int | None,
    per_rank: Sequence[int],
    recompute: Sequence[bool],
) -> list[Setting]:
    """All settings of one layout: V, both placements, with and without recomputation; cut by measured work."""
    found = []
    for again in recompute:
        used = costs.recomputed() if again else costs
        for stages in per_rank:
            for vshape in (False, True) if stages > 1 and ranks > 1 else (False,):
                placement = Placement(ranks, stages, vshape)
                cuts = tuple(measured_cuts(used, placement))
                found.append(Setting(used, placement, cuts, micro_batches, data_parallel, again, memory_limit))
    return found
