# SPDX-License-Identifier: Apache-2.0
"""Chooses layout, cut, placement, schedule and order for measured costs and a memory limit.

1. *Settings*: every P x D of the GPUs (or the one asked for), V stages a rank, both placements, with and without
   recomputation where memory is limited; blocks are cut by measured seconds.
2. *Drafts* in each (``drafts.py``): all published schedules, and list schedules for the measured costs.
3. *Local search* improves the best drafts' orders (``local_search.py``) and cuts (``recut.py``) under the memory limit.
4. *Simulation* of all drafts that can matter, with the host, collectives and messages, and exact memory.
5. *Choice*: of what fits and is within half a per cent of the fastest, and the best of each V and placement within 2.5,
   the one that loses least when every task's time varies by 10 %, with hosts as they are and with slow ones, and of
   equals the one that holds least. All published schedules are among the candidates, so a plan is never slower than one
   of them by more than half a per cent, or 2.5 where it bears jitter and slow hosts better.

What is tried is bounded by counted tasks, never by a clock: equal input gives an equal plan on every rank.

Alternatives: a mixed-integer program (OptPipe, ZB's paper) proves optima for small cases and needs minutes or cached
solutions beyond; in tests a constraint solver is the oracle that plans are compared with. A closed rule for the unit
(the paper's is not public) knows nothing of imbalance, links or memory.

References: Tang et al., *ZeroPP*, arXiv 2402.03791 (adaptive units); Qi et al. 2024 (zero bubble); Lamy-Poirier 2022
(breadth-first); Narayanan et al. 2021 (interleaved 1F1B).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_zeroprompt.pipeline.costs import BlockCosts, Costs
from lightning_zeroprompt.pipeline.drafts import Draft, Setting, listed, published, settings_of
from lightning_zeroprompt.pipeline.local_search import improve
from lightning_zeroprompt.pipeline.lowering import add_transfers
from lightning_zeroprompt.pipeline.recut import recut
from lightning_zeroprompt.pipeline.schedule import Schedule
from lightning_zeroprompt.pipeline.simulator import Simulator

__all__ = ["Candidate", "Plan", "plan"]

_LISTED_TASKS = 60_000
"""Tasks that list scheduling orders in all, at some 20 microseconds each."""
_SIMULATED_TASKS = 60_000
"""Tasks that are simulated in all, at 15 microseconds each."""
_SEARCHED_TASKS = 800_000
"""Tasks that local search walks in all, at 0.4 microseconds each."""
_RECUT_TASKS = 400_000
"""Tasks that are judged under moved cuts in all, at 0.8 microseconds each."""
_FIRST = 8
_STARTS = 6
_FINALISTS = 5
_EQUAL = 1.005
"""Times that are looked at under jitter."""
_NOISE = 1.001
"""Times under jitter that are as good as equal: so much does the mean of a few steps vary."""
_SEEDS = 4
_SLOW_HOSTS = 1.75
"""Times as long as in a profile that hosts have taken in steps, on virtual machines with two H100."""
_LESS_SURE = 1.025
"""Times that are looked at for what slow hosts make of them: one candidate for each V and placement."""


@dataclass(frozen=True)
class Candidate:
    """A schedule with all that it takes to run it, and what it costs.

    Attributes:
        label: What it is, in a few words.
        schedule: To be executed as it is, transfers included.
        cuts: For each stage its first block and the one behind its last.
        data_parallel: D.
        recompute: Whether blocks run under activation checkpointing.
        seconds: Of a step, simulated.
        jittered_seconds: The mean over steps in which every task's time varies, with hosts as they are and with slower
            ones; None where that was not looked at.
        bubble_share: Share of the ranks' time without computations.
        peak_bytes: Of the rank with most.
        bytes_per_gpu: Sent by a GPU in a step, on average.
        arguments: Of ``build_schedule`` besides ranks and micro-batches; None for an order that is in no catalogue.
    """

    label: str
    schedule: Schedule
    cuts: tuple[tuple[int, int], ...]
    data_parallel: int
    recompute: bool
    seconds: float
    jittered_seconds: float | None
    bubble_share: float
    peak_bytes: int
    bytes_per_gpu: int
    arguments: dict[str, Any] | None

    @property
    def gpus(self) -> int:
        """P D."""
        return self.schedule.ranks * self.data_parallel


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        best: The choice.
        pareto: Candidates that none beats in time, memory and bytes at once; those under the limit and those above it.
        candidates: All that were simulated, the fastest first.
        memory_limit: Bytes a GPU; None for no limit.
        ideal_seconds: A step without bubbles and communication, see ``Costs.ideal_seconds``.
    """

    best: Candidate
    pareto: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    memory_limit: int | None
    ideal_seconds: float

    @property
    def schedule(self) -> Schedule:
        """Of the choice."""
        return self.best.schedule

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """Of the choice."""
        return self.best.cuts

    @property
    def share_of_ideal(self) -> float:
        """How much of the ideal speed the choice reaches; above 1 where split backward passes are the faster ones."""
        return self.ideal_seconds / self.best.seconds

    def strategy_arguments(self) -> dict[str, Any]:
        """Arguments of ``ZeroPPStrategy`` for the choice; ``schedule="auto"`` where its order is in no catalogue."""
        best, schedule = self.best, self.best.schedule
        arguments = {
            "pipeline_parallel_size": schedule.ranks,
            "data_parallel_size": best.data_parallel,
            "stages_per_rank": schedule.placement.stages_per_rank,
            "num_microbatches": schedule.micro_batches,
            "schedule": "auto" if best.arguments is None else schedule.name,
            "activation_checkpointing": best.recompute,
        }
        if best.arguments is not None:
            kept = ("unit", "vshape", "cap", "resident")
            arguments |= {name: best.arguments[name] for name in kept if name in best.arguments}
        return arguments


def plan(
    costs: Costs,
    *,
    micro_batches: int,
    ranks: int | None = None,
    data_parallel: int = 1,
    gpus: int | None = None,
    memory_limit: int | None = None,
    stages_per_rank: int | None = None,
    recompute: bool | None = None,
    jitter: float = 0.1,
) -> Plan:
    """Find the best schedule for a layout, or the best layout too.

    Args:
        costs: Of the model and the machine.
        micro_batches: M of each pipeline; with ``gpus`` those of all data-parallel ranks together, so that every layout
            does the same work.
        ranks: P.
        data_parallel: D beside ``ranks``.
        gpus: Try every P x D of that many instead.
        memory_limit: Bytes a GPU.
        stages_per_rank: V; None tries several.
        recompute: Activation checkpointing; None uses it if the memory limit makes it worth while.
        jitter: Standard deviation of tasks' times that plans are compared under, as a share.

    Raises:
        ValueError: If the sizes do not fit one another, or nothing fits the memory limit: then it says what would.

    >>> costs = Costs.uniform(8, forward=1.0, backward=1.4, weight=0.8)
    >>> found = plan(costs, ranks=2, micro_batches=4)
    >>> found.share_of_ideal > 0.97
    True
    """
    layouts = _layouts(costs, micro_batches, ranks, data_parallel, gpus)
    settings: list[list[Setting]] = []
    for pipeline, data, count in layouts:
        per_rank = _stages_per_rank(costs, pipeline, stages_per_rank, optional=gpus is not None)
        if pipeline * data == 1 and stages_per_rank is None:
            per_rank = [1]  # nothing to overlap, nothing to gather
        again = [recompute] if recompute is not None else [False, True] if memory_limit is not None else [False]
        found = settings_of(costs, pipeline, count, data, memory_limit, per_rank, [bool(each) for each in again])
        if found:
            settings.append(found)
    if not settings:
        raise ValueError(
            f"stages_per_rank={stages_per_rank}: no layout of {gpus} GPUs has a block for every stage, there are "
            f"{len(costs.blocks)} blocks; use fewer stages"
        )
    share = 1 / len(settings)
    candidates = [each for layout in settings for each in _simulated(_drafts(layout, share), share)]
    candidates.sort(key=_by_time)
    fitting = [each for each in candidates if memory_limit is None or each[0].peak_bytes <= memory_limit]
    if not fitting:
        raise ValueError(_nothing_fits(costs, settings, layouts, memory_limit or 0, recompute))
    pareto = _pareto([candidate for candidate, _ in candidates])
    near = [each for each in fitting if each[0].seconds <= _EQUAL * fitting[0][0].seconds]
    frugal = sorted(near, key=lambda each: (each[0].peak_bytes, each[0].seconds))
    others: dict[tuple[int, bool], tuple[Candidate, Simulator]] = {}
    for each in fitting:
        placement = each[0].schedule.placement
        if each[0].seconds <= _LESS_SURE * fitting[0][0].seconds:
            others.setdefault((placement.stages_per_rank, placement.vshape), each)
    chosen = [*near[:_FINALISTS], *frugal[:2], *others.values()]
    finalists = {id(candidate): (candidate, simulator) for candidate, simulator in chosen}
    scored = {key: _jittered(candidate, simulator, jitter) for key, (candidate, simulator) in finalists.items()}
    best = _choose(list(scored.values()))
    pipeline, data, count = layouts[0]
    return Plan(
        best,
        tuple(scored.get(id(each), each) for each in pareto),
        tuple(scored.get(id(each), each) for each, _ in candidates),
        memory_limit,
        costs.ideal_seconds(pipeline * data, count * data),
    )


def _layouts(
    costs: Costs, micro_batches: int, ranks: int | None, data_parallel: int, gpus: int | None
) -> list[tuple[int, int, int]]:
    """P, D and each pipeline's M of everything that is to be tried."""
    if (ranks is None) == (gpus is None):
        raise ValueError(f"ranks={ranks}, gpus={gpus}: give one of them, the pipeline's ranks or all GPUs")
    numbers = {"micro_batches": micro_batches, "data_parallel": data_parallel, "ranks": ranks, "gpus": gpus}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    blocks = len(costs.blocks)
    if ranks is not None:
        if ranks > blocks:
            raise ValueError(
                f"{ranks} ranks need a block each, there are {blocks}: use fewer ranks and more data_parallel, or "
                "smaller blocks"
            )
        return [(ranks, data_parallel, micro_batches)]
    assert gpus is not None  # noqa: S101 - one of them is given
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    found = [
        (size, gpus // size, micro_batches * size // gpus)
        for size in sizes
        if size <= blocks and micro_batches % (gpus // size) == 0
    ]
    if not found:
        raise ValueError(
            f"{gpus} GPUs, {micro_batches} micro-batches, {blocks} blocks: no pipeline of at most {blocks} ranks "
            "leaves a number of data-parallel ranks that divides the micro-batches; use a multiple of the GPUs"
        )
    return found


def _stages_per_rank(costs: Costs, ranks: int, wanted: int | None, *, optional: bool) -> list[int]:
    most = len(costs.blocks) // ranks
    if wanted is not None:
        if not 1 <= wanted <= most and not optional:
            raise ValueError(
                f"stages_per_rank={wanted} on {ranks} ranks are {wanted * ranks} stages, there are "
                f"{len(costs.blocks)} blocks and every stage needs one: use 1 to {most}"
            )
        return [wanted] if 1 <= wanted <= most else []
    return [each for each in ((1, 2, 3, 4) if ranks > 1 else (1, 2, 4, 8, 16)) if each <= most]


def _fits(draft: Draft) -> bool:
    limit = draft.setting.memory_limit
    return limit is None or draft.quick_bytes <= limit


def _drafts(settings: Sequence[Setting], share: float) -> list[Draft]:
    """What of a layout is worth simulating, the likeliest first.

    Published schedules, list schedules, and the best of both improved.

    Args:
        settings: Of the layout.
        share: Of the budgets.
    """
    drafts = [draft for setting in settings for draft in published(setting)]
    waiting = [(setting, listed(setting)) for setting in settings]
    left = share * _LISTED_TASKS
    while waiting and left > 0:
        for setting, source in list(waiting):
            draft = next(source, None)
            if draft is None:
                waiting.remove((setting, source))
                continue
            drafts.append(draft)
            left -= setting.tasks
            if left <= 0:
                break
    drafts.sort(key=lambda draft: (not _fits(draft), draft.quick_seconds, draft.quick_bytes))
    # One start a setting: the same order found in several ways is improved in the same way.
    starts: dict[int, Draft] = {}
    for draft in drafts:
        if _fits(draft) and len(starts) < _STARTS:
            starts.setdefault(id(draft.setting), draft)
    improved = [better for draft in starts.values() if (better := _improved(draft, share)) is not None]
    improved.sort(key=lambda draft: draft.quick_seconds)
    return improved + drafts


def _improved(draft: Draft, share: float) -> Draft | None:
    """A draft after local search over its order and its cuts; None if that found nothing."""
    setting, schedule = draft.setting, draft.schedule
    resident = schedule.resident
    keep = resident < setting.placement.stages_per_rank
    moves = int(share * _SEARCHED_TASKS / (2 * _STARTS * setting.tasks))
    orders = setting.orders(keep=keep, resident=resident)
    seconds, order = improve(orders, orders.numbers(schedule.tasks), moves=moves)
    tries = int(share * _RECUT_TASKS / (_STARTS * setting.tasks))
    moved = recut(setting, order, resident=resident, tries=tries)
    if moved is not setting:
        setting, orders = moved, moved.orders(keep=keep, resident=resident)
        seconds, order = improve(orders, order, moves=moves)
    if seconds >= draft.quick_seconds:
        return None
    return setting.planned(f"improved {draft.label}", orders.tasks(order), schedule.unit, resident)


def _simulated(drafts: Sequence[Draft], share: float) -> list[tuple[Candidate, Simulator]]:
    """Drafts of a layout simulated, those that can be chosen and those that hold little first.

    One of every published schedule is simulated in any case: quick figures know nothing of queues and the host. When
    the budget is spent, further published schedules whose makespan alone is shorter than the best step so far still get
    their turn: none that could win is left out.

    Args:
        drafts: The likeliest first.
        share: Of the budget.
    """
    first = list(range(min(_FIRST, len(drafts))))
    fixed: dict[tuple[str, int], int] = {}
    least = float("inf")
    for index, draft in enumerate(drafts):
        if draft.arguments is not None:
            fixed.setdefault((draft.schedule.name, min(2, draft.schedule.placement.stages_per_rank)), index)
        # In the order of time: what holds less than all before it.
        if draft.quick_bytes < least:
            first.append(index)
            least = draft.quick_bytes
    always = set(fixed.values())
    left, fastest = share * _SIMULATED_TASKS, float("inf")
    found: list[tuple[Candidate, Simulator]] = []
    for index in dict.fromkeys([*always, *first, *range(len(drafts))]):
        draft = drafts[index]
        may_win = draft.arguments is not None and _fits(draft) and draft.quick_seconds < fastest
        if left <= 0 and index not in always and not may_win:
            continue
        left -= draft.setting.tasks
        candidate, simulator = _simulate(draft)
        found.append((candidate, simulator))
        if _fits(draft):
            fastest = min(fastest, candidate.seconds)
    return found


def _simulate(draft: Draft) -> tuple[Candidate, Simulator]:
    setting = draft.setting
    lowered = [add_transfers(draft.schedule, setting.list_costs)]
    if draft.arguments is not None and setting.costs.transport == "nccl":
        # Where messages queue up, placing them for free queues can be worse than in the order of the tasks.
        lowered.append(add_transfers(draft.schedule))
    simulators = [Simulator(each, setting.costs, setting.cuts, data_parallel=setting.data_parallel) for each in lowered]
    steps = [simulator.run() for simulator in simulators]
    fastest = min(range(len(steps)), key=lambda index: steps[index].seconds)
    schedule, simulator, step = lowered[fastest], simulators[fastest], steps[fastest]
    candidate = Candidate(
        draft.label + (", recomputed" if setting.recompute else ""),
        schedule,
        setting.cuts,
        setting.data_parallel,
        setting.recompute,
        step.seconds,
        None,
        step.bubble_share,
        max(step.peak_bytes),
        round(step.bytes_moved / schedule.ranks),
        draft.arguments,
    )
    return candidate, simulator


def _jittered(candidate: Candidate, simulator: Simulator, jitter: float) -> Candidate:
    if not jitter:
        return replace(candidate, jittered_seconds=candidate.seconds)
    steps = [simulator.run(jitter=jitter, seed=seed).seconds for seed in range(_SEEDS)]
    slow = [simulator.run(jitter=jitter, seed=seed, slower_hosts=_SLOW_HOSTS).seconds for seed in range(_SEEDS // 2)]
    return replace(candidate, jittered_seconds=(sum(steps) / len(steps) + sum(slow) / len(slow)) / 2)


def _choose(finalists: Sequence[Candidate]) -> Candidate:
    """Of those that bear jitter as well as the best one, the one that holds least."""

    def borne(candidate: Candidate) -> float:
        return candidate.jittered_seconds or candidate.seconds

    least = min(map(borne, finalists))
    good = [each for each in finalists if borne(each) <= _NOISE * least]
    return min(good, key=lambda each: (each.peak_bytes, borne(each), each.bytes_per_gpu))


def _by_time(each: tuple[Candidate, Simulator]) -> tuple[float, int, int]:
    return each[0].seconds, each[0].peak_bytes, each[0].bytes_per_gpu


def _pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates in the order of time, those that no earlier one equals or beats in memory and bytes."""
    kept: list[Candidate] = []
    for each in candidates:
        if not any(k.peak_bytes <= each.peak_bytes and k.bytes_per_gpu <= each.bytes_per_gpu for k in kept):
            kept.append(each)
    return kept


def _least(settings: Sequence[Setting]) -> Candidate:
    """What needs least memory, as exactly as it is known."""
    drafts: list[Draft] = []
    for setting in settings:
        free = replace(setting, memory_limit=None)
        drafts += [*published(free), *itertools.islice(listed(free), _LISTED_TASKS // (4 * setting.tasks) + 8)]
    drafts.sort(key=lambda draft: draft.quick_bytes)
    return min((_simulate(draft)[0] for draft in drafts[:3]), key=lambda each: each.peak_bytes)


def _nothing_fits(
    costs: Costs,
    settings: Sequence[Sequence[Setting]],
    layouts: Sequence[tuple[int, int, int]],
    memory_limit: int,
    recompute: bool | None,
) -> str:
    """The smallest that fits, and what would help how much."""
    smallest = _least([each for layout in settings for each in layout])
    ranks, data, count = layouts[-1]
    blocks = len(costs.blocks)
    helps: dict[str, tuple[Costs, int, int, int, bool]] = {}
    if recompute is False:
        helps["recomputation (recompute=None or True)"] = costs, ranks, data, count, True
    again = recompute is not False
    if 2 * ranks <= blocks:
        helps[f"twice the pipeline ranks ({2 * ranks})"] = costs, 2 * ranks, data, count, again
    helps[f"twice the data-parallel ranks ({2 * data})"] = costs, ranks, 2 * data, max(1, count // 2), again
    halved = replace(costs, blocks=tuple(_half(block) for block in costs.blocks), behind=_half(costs.behind))
    helps["micro-batches of half the rows"] = halved, ranks, data, 2 * count, again
    moved = replace(
        costs,
        blocks=tuple(replace(block, state=0) for block in costs.blocks),
        before=replace(costs.before, state=0),
        behind=replace(costs.behind, state=0),
    )
    helps["weights and optimizer state in the host's memory (cpu_offload)"] = moved, ranks, data, count, again
    found = []
    for words, (used, pipeline, shared, micro_batches, recomputed) in helps.items():
        per_rank = _stages_per_rank(used, pipeline, None, optional=True)[:2]
        trial = settings_of(used, pipeline, micro_batches, shared, None, per_rank, [recomputed])
        found.append(f"{words}: {_size(_least(trial).peak_bytes)}")
    return (
        f"memory_limit={_size(memory_limit)} a GPU: nothing fits. The smallest is {smallest.label} on "
        f"{smallest.schedule.ranks} x {smallest.data_parallel} GPUs with {_size(smallest.peak_bytes)} "
        f"({smallest.peak_bytes} bytes). What would help, and the least it would need: {'; '.join(found)}"
    )


def _half(block: BlockCosts) -> BlockCosts:
    """With half the rows a micro-batch."""
    return replace(
        block,
        **{name: getattr(block, name) // 2 for name in ("activations", "weight_inputs", "output", "workspace")},
        **{name: getattr(block, name) / 2 for name in ("forward", "backward", "weight")},
    )


def _size(count: float) -> str:
    """As people read it.

    >>> _size(5 * 2**30), _size(3 * 2**20)
    ('5.00 GiB', '0.003 GiB')
    """
    gibibytes = count / 2**30
    return f"{gibibytes:.2f} GiB" if gibibytes >= 0.1 else f"{gibibytes:.3f} GiB"
