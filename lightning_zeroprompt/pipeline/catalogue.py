# SPDX-License-Identifier: Apache-2.0
"""All schedules by name, with their settings checked before anything is built."""

from __future__ import annotations

from lightning_zeroprompt.pipeline import orders
from lightning_zeroprompt.pipeline.lowering import add_collectives
from lightning_zeroprompt.pipeline.schedule import Placement, Schedule

__all__ = ["SCHEDULES", "build_schedule", "is_listed"]

SCHEDULES: dict[str, str] = {
    "zeropp": "ZeroPP, unit after unit",
    "zeropp_overlap": "ZeroPP whose next unit starts in the drain of this one",
    "1f1b": "one forward, one full backward; one stage a rank",
    "interleaved_1f1b": "1F1B with several stages a rank",
    "breadth_first": "all forwards of a stage, then all full backwards",
    "zb_h1": "1F1B with weight gradients moved into its bubbles; one stage a rank",
    "zbv": "two stages a rank, placed as a V, weight gradients in the bubbles",
}
"""Names that ``build_schedule`` takes, with what they are."""

_ONE_STAGE = ("1f1b", "zb_h1")
_UNITS = ("zeropp", "zeropp_overlap")


def is_listed(name: str, vshape: bool) -> bool:
    """Whether a schedule's order is made by simulating times, so that it can be given ``costs`` and ``cap``."""
    return name == "zeropp_overlap" or (name == "zeropp" and vshape)


def build_schedule(
    name: str,
    *,
    ranks: int,
    micro_batches: int,
    stages_per_rank: int = 1,
    unit: int | None = None,
    vshape: bool | None = None,
    cap: int | None = None,
    resident: int | None = None,
    prefetch: bool | None = None,
    costs: orders.ListCosts | None = None,
) -> Schedule:
    """Build a schedule.

    Args:
        name: One of ``SCHEDULES``.
        ranks: P.
        micro_batches: M.
        stages_per_rank: V.
        unit: U, at most M; None is M. Only ZeroPP computes in units; the others reduce gradients once a step.
        vshape: Place stages down the ranks and up again; None is what the schedule was published with.
        cap: For ``zeropp_overlap`` and V-shaped ZeroPP: activations of a stage that a rank may hold; None is U * V.
        resident: K, stages of a rank whose weights are gathered at once; None is 1 for ``zeropp``, 2 for
            ``zeropp_overlap``, all for the others, which would gather for every micro-batch otherwise. At most V.
        prefetch: Gather one phase ahead; None does so where K > 1.
        costs: For ``zeropp_overlap`` and V-shaped ZeroPP: times that the order is made for; None is one unit of time a
            task. An order made for other times than those of the machine loses several per cent.

    Returns:
        The schedule with computations, gathers, releases and reductions; ``add_transfers`` adds sends and receives.

    Raises:
        ValueError: If a setting is out of range or does not fit the schedule, with the remedy.

    >>> print(build_schedule("zeropp", ranks=1, stages_per_rank=2, micro_batches=2))
    0: AG0 F0.0 F0.1 RSH0 AG1 F1.0 B1.0 F1.1 B1.1 RSH1 W1.0 AG0 B0.0 W1.1 RS1 B0.1 RSH0 W0.0 W0.1 RS0
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; there are {', '.join(SCHEDULES)}")
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: a step has at least 1")
    if unit is not None and name not in _UNITS:
        raise ValueError(
            f"unit={unit} with schedule {name!r}: only {' and '.join(_UNITS)} compute in units; leave it out"
        )
    unit = micro_batches if unit is None else unit
    if not 1 <= unit <= micro_batches:
        raise ValueError(f"unit={unit} with {micro_batches} micro-batches: a unit has 1 to {micro_batches} of them")
    if name in _ONE_STAGE and stages_per_rank != 1:
        raise ValueError(
            f"schedule {name!r} has one stage a rank, {stages_per_rank} were asked for; use stages_per_rank=1"
            + (", or interleaved_1f1b" if name == "1f1b" else ", or zbv with 2")
        )
    if name == "zbv" and stages_per_rank != 2:
        raise ValueError(f"schedule 'zbv' has two stages a rank, not {stages_per_rank}; use stages_per_rank=2")
    vshape = name == "zbv" if vshape is None else vshape
    if vshape != (name == "zbv") and name not in _UNITS:
        raise ValueError(
            f"vshape={vshape} with schedule {name!r}: only {' and '.join(_UNITS)} can be placed either way"
        )
    placement = Placement(ranks, stages_per_rank, vshape)
    least = (stages_per_rank - 1) * unit + 1
    listed = is_listed(name, vshape)
    if cap is not None and not listed:
        raise ValueError(f"cap={cap} with schedule {name!r}: its memory is fixed by its order; leave cap out")
    if costs is not None and not listed:
        raise ValueError(f"costs with schedule {name!r}: its order does not depend on times; leave costs out")
    if cap is not None and cap < least:
        raise ValueError(
            f"cap={cap}: {stages_per_rank} stages a rank and a unit of {unit} hold at least "
            f"({stages_per_rank} - 1) * {unit} + 1 = {least} activations; raise cap or lower unit"
        )
    if resident is None:
        resident = {"zeropp": 1, "zeropp_overlap": min(2, stages_per_rank)}.get(name, stages_per_rank)
    if not 1 <= resident <= stages_per_rank:
        raise ValueError(
            f"resident={resident} with {stages_per_rank} stages a rank: 1 to {stages_per_rank} can be gathered"
        )
    if prefetch and resident < 2:
        raise ValueError(
            f"prefetch=True with resident=1: gathering ahead needs room for two stages; use resident=2 and "
            f"stages_per_rank of at least 2 (it is {stages_per_rank}), or leave prefetch out"
        )

    if listed:
        held = (float(unit * stages_per_rank if cap is None else cap),) * ranks
        order = orders.list_schedule(
            placement,
            micro_batches,
            unit,
            held=held,
            overlap=name == "zeropp_overlap",
            costs=orders.ListCosts() if costs is None else costs,
        )
    elif name == "zeropp":
        order = orders.zeropp_strict(placement, micro_batches, unit)
    elif name == "1f1b":
        order = orders.one_f_one_b(placement, micro_batches)
    elif name == "interleaved_1f1b":
        order = orders.interleaved_1f1b(placement, micro_batches)
    elif name == "breadth_first":
        order = orders.breadth_first(placement, micro_batches)
    elif name == "zb_h1":
        order = orders.zb_h1(placement, micro_batches)
    else:
        order = orders.zbv(placement, micro_batches)
    prefetch = resident > 1 if prefetch is None else prefetch
    lowered = (add_collectives(tasks, unit, resident, prefetch) for tasks in order)
    return Schedule(name, placement, micro_batches, unit, resident, tuple(map(tuple, lowered)))
