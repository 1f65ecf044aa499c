# SPDX-License-Identifier: Apache-2.0
"""Which task, row and template each draw is: a pure function of (manifest, seed, position), O(1) in the position.

Draws come in blocks of B. A task with share p gets floor(B p) or ceil(B p) draws of every block by systematic
sampling: with C the cumulative shares, block b cuts [0, B) at floor(B C_i + u_b). The offset u_b runs through the
multiples of 1/256 in bit-reversed order, and B C_i is rounded to such multiples, so that by Hermite's identity the
counts over 256 blocks are exact, and the count before any block is a product plus a table look-up. Within a block the
order is a keyed permutation. The k-th draw of a task goes round its classes (in a keyed order each time round) and,
inside a class, round its capped rows in an order keyed by the epoch: no row comes twice before every other has come
once. Template, option order and noise are hashes of the position.

Alternatives: independent random draws need no bookkeeping and leave a task about sqrt(k) off its target k; streaming
interleaves (``datasets.interleave_datasets``) hold an open iterator a task and cannot be entered in the middle.
Balance rules follow ZeroPrompt's 128 examples a class (arXiv 2201.06910) and T5's examples-proportional temperature
mixing (arXiv 1910.10683).
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_zeroprompt.data.permutation import SHORT, below, mix64, permute, stream_key

if TYPE_CHECKING:
    from lightning_zeroprompt.data.corpus import Corpus, TaskInfo

__all__ = ["Draws", "Mixture", "MixtureSettings", "select_tasks", "stratified_order"]

_PERIOD = 256
_OFFSETS = np.array([int(f"{number:08b}"[::-1], 2) for number in range(_PERIOD)], dtype=np.int64)
# _CARRIES[m, f]: in how many of the first m blocks of a period an edge with the fractional part f / 256 is rounded up.
_CARRIES = np.zeros((_PERIOD + 1, _PERIOD), dtype=np.int64)
_CARRIES[1:] = np.cumsum(_OFFSETS[:, None] + np.arange(_PERIOD) >= _PERIOD, axis=0)
_LARGEST_BLOCK = 1 << 16
_NO_LIMIT = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """How tasks are balanced.

    Attributes:
        max_per_class: Rows of a class that the run uses, in tasks with classes (a label set that all rows share); None
            uses all. Which rows is fixed by the seed.
        max_per_task: The same for tasks without classes.
        temperature: Shares are proportional to (rows used) ** (1 / temperature); infinity means equal shares.
        category_exponent: With a number a, a category's share is (its tasks) ** a, divided inside by the temperature
            rule; None divides over the tasks directly.
        class_balance: Whether a task's classes come equally often; otherwise as often as their rows used.
        denoising: Share of draws that train span corruption on the row's input in place of the task, in [0, 1).
        block_size: Draws in a block, at most 65,536; None takes one in which every task has a draw, but at least 256.
        task_weights: Factors for the shares of the mixed tasks, in the order given to :class:`Mixture`; None means 1
            each.
        curriculum: Phases before the full mixture, each (number of draws, tasks mixed meanwhile, as indices into the
            corpus).
    """

    max_per_class: int | None = 128
    max_per_task: int | None = 256
    temperature: float = math.inf
    category_exponent: float | None = None
    class_balance: bool = True
    denoising: float = 0.15
    block_size: int | None = None
    task_weights: tuple[float, ...] | None = None
    curriculum: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_per_class", "max_per_task"):
            cap = getattr(self, name)
            if cap is not None and cap < 1:
                raise ValueError(
                    f"mixture.{name} is {cap}, which leaves no row to draw; give 1 or more, or null for all rows"
                )
        if not self.temperature > 0:
            raise ValueError(
                f"mixture.temperature is {self.temperature}; give a number above 0 (.inf for equal shares)"
            )
        if not 0 <= self.denoising < 1:
            raise ValueError(f"mixture.denoising is {self.denoising}; it is a share of the draws, from 0 to below 1")
        if self.block_size is not None and not 1 <= self.block_size <= _LARGEST_BLOCK:
            raise ValueError(
                f"mixture.block_size is {self.block_size}; give 1 to {_LARGEST_BLOCK}, or null to choose it"
            )
        if self.task_weights is not None and not all(weight > 0 for weight in self.task_weights):
            raise ValueError(
                f"mixture.task_weights has {min(self.task_weights)}; leave a task out instead of weighing it 0"
            )
        for count, _ in self.curriculum:
            if count < 1:
                raise ValueError(f"a curriculum phase has {count} draws; give 1 or more, or leave the phase out")


@dataclasses.dataclass(frozen=True, slots=True)
class Draws:
    """Consecutive or selected draws as a struct of arrays, all of one length.

    Attributes:
        index: int64, position in the run.
        task: int32, index into the corpus.
        row: int64, row of the corpus.
        template: int32, global index of the template.
        denoise: bool, whether the draw trains span corruption.
        key: uint64, decides option order and noise.
    """

    index: NDArray[np.int64]
    task: NDArray[np.int32]
    row: NDArray[np.int64]
    template: NDArray[np.int32]
    denoise: NDArray[np.bool_]
    key: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.index)


@dataclasses.dataclass(frozen=True, slots=True)
class _Phase:
    """One stretch of the run with fixed shares."""

    start: int
    draws: int | None
    members: NDArray[np.int64]  # positions in the mixture's list of tasks
    block: int
    edges: NDArray[np.int64]  # [members + 1]: block * cumulative share, in units of 1 / 256
    key: np.uint64


def stratified_order(groups: Sequence[tuple[int, str]], generator: np.random.Generator) -> list[int]:
    """A random order by tier, inside a tier such that every prefix holds its share of each category.

    Args:
        groups: (tier, category) of each element.
        generator: Decides the order.

    Returns:
        Positions in ``groups``.
    """
    members: dict[tuple[int, str], list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    order: list[tuple[int, float, str, int]] = []
    for (tier, category), numbers in sorted(members.items()):
        offset = generator.random()
        shuffled = generator.permutation(numbers).tolist()
        order += [(tier, (rank + offset) / len(numbers), category, number) for rank, number in enumerate(shuffled)]
    return [number for *_, number in sorted(order)]


def select_tasks(
    tasks: Sequence["TaskInfo"], num_tasks: int | None = None, seed: int = 0, *, among: Iterable[int] | None = None
) -> list[int]:
    """Choose training tasks: a prefix of one seeded order whose every prefix holds its share of each category.

    Subsets of different sizes are therefore nested. Tasks of tier 0 all come before those of tier 1.

    Args:
        tasks: Tasks of a corpus; those with the role ``"train"`` and a row to train on are candidates.
        num_tasks: How many; None means all.
        seed: Seed of the order.
        among: Indices of the tasks that may be chosen; all when None.

    Returns:
        Indices into ``tasks``, in the order chosen.

    Raises:
        ValueError: Fewer candidates than asked for, or none asked for.
    """
    allowed = range(len(tasks)) if among is None else among
    candidates = [number for number in allowed if tasks[number].role == "train" and tasks[number].num_train_rows > 0]
    wanted = len(candidates) if num_tasks is None else num_tasks
    if not 1 <= wanted <= len(candidates):
        raise ValueError(
            f"asked for {wanted} training tasks; the corpus has {len(candidates)} (of {len(tasks)} tasks in all): "
            f"give a number from 1 to {len(candidates)} or compile more tasks"
        )
    generator = np.random.default_rng([seed & 0xFFFFFFFF, 0x7A5C])
    order = stratified_order([(tasks[number].tier, tasks[number].category) for number in candidates], generator)
    return [candidates[position] for position in order[:wanted]]


class Mixture:
    """The draws of a run.

    Args:
        corpus: Where the tasks lie.
        task_indices: Tasks to mix, as indices into ``corpus.tasks``.
        seed: Seed of everything drawn.
        settings: How tasks are balanced.

    Raises:
        ValueError: No task, a task twice, a task that is not for training, has no rows or no template to train on; a
            weight or a curriculum phase that fits no task; a share that rounds to nothing.

    Attributes:
        task_indices: The tasks mixed, int64.
        settings: As given.
        seed: As given.
        fingerprint: sha256 (hex) of corpus, tasks, seed and settings: equal fingerprints mean equal draws.
    """

    def __init__(
        self, corpus: "Corpus", task_indices: Sequence[int], *, seed: int = 0, settings: MixtureSettings | None = None
    ) -> None:
        self.settings = settings or MixtureSettings()
        self.seed = seed
        self.task_indices = np.asarray(list(task_indices), dtype=np.int64)
        if not len(self.task_indices):
            raise ValueError("a mixture of no tasks; choose at least one training task")
        if len(np.unique(self.task_indices)) < len(self.task_indices):
            raise ValueError("a task stands twice in the mixture's list; give each task once and use task_weights")
        tasks = [corpus.tasks[number] for number in self.task_indices]
        self._read_classes(tasks)
        self._read_templates(corpus, tasks)
        shares = self._shares(tasks)
        self._phases = self._build_phases(shares)
        # Windows end inside blocks, so the last block of one is the first of the next.
        self._block = functools.lru_cache(maxsize=2)(self._order_block)
        identity = [corpus.fingerprint, self.task_indices.tolist(), seed, dataclasses.astuple(self.settings)]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._keys = {
            name: stream_key(seed, name) for name in ("subset", "epoch", "cycle", "template", "noise", "example")
        }

    def _read_classes(self, tasks: Sequence["TaskInfo"]) -> None:
        """Lay the classes of all tasks end to end: first row, rows, rows used."""
        for task in tasks:
            if task.role != "train" or task.num_train_rows < 1:
                raise ValueError(
                    f"task {task.task_id!r} (role {task.role!r}) has {task.num_train_rows} training rows; leave it out"
                )
        settings = self.settings
        sizes = np.asarray(list(itertools.chain.from_iterable(task.class_counts for task in tasks)), dtype=np.int64)
        owner = np.repeat(np.arange(len(tasks)), [len(task.class_counts) for task in tasks])
        before = np.cumsum(sizes) - sizes
        first_row = np.asarray([task.first_row for task in tasks], dtype=np.int64)
        start = first_row[owner] + before - before[np.searchsorted(owner, owner)]
        limits = [settings.max_per_task if task.labels is None else settings.max_per_class for task in tasks]
        cap = np.asarray([_NO_LIMIT if limit is None else limit for limit in limits], dtype=np.int64)[owner]
        used = sizes > 0
        self._class_row, self._class_size = start[used], sizes[used]
        self._class_cap = np.minimum(sizes, cap)[used]
        self._num_classes = np.bincount(owner[used], minlength=len(tasks))
        self._first_class = np.cumsum(self._num_classes) - self._num_classes
        self._cap_ends = np.cumsum(self._class_cap)
        self._cap_start = (self._cap_ends - self._class_cap)[self._first_class]
        self.rows_used = np.add.reduceat(self._class_cap, self._first_class)

    def _read_templates(self, corpus: "Corpus", tasks: Sequence["TaskInfo"]) -> None:
        """List the templates to train on, task after task."""
        first = np.asarray([task.first_template for task in tasks], dtype=np.int64)
        count = np.asarray([task.num_templates for task in tasks], dtype=np.int64)
        every = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        trained = np.asarray(corpus.template_role)[every] == 0
        self._templates = every[trained].astype(np.int32)
        self._num_templates = np.bincount(np.repeat(np.arange(len(tasks)), count)[trained], minlength=len(tasks))
        self._first_template = np.cumsum(self._num_templates) - self._num_templates
        if not self._num_templates.all():
            task = tasks[int(self._num_templates.argmin())]
            raise ValueError(
                f"task {task.task_id!r} has no template of role 'train'; give it one or leave the task out"
            )

    def _shares(self, tasks: Sequence["TaskInfo"]) -> NDArray[np.float64]:
        """Unnormalised target share of each task."""
        settings = self.settings
        shares = self.rows_used.astype(np.float64) ** (1 / settings.temperature)
        if settings.task_weights is not None:
            if len(settings.task_weights) != len(tasks):
                raise ValueError(
                    f"mixture.task_weights has {len(settings.task_weights)} numbers for {len(tasks)} tasks"
                )
            shares *= settings.task_weights
        if settings.category_exponent is not None:
            _, category = np.unique([task.category for task in tasks], return_inverse=True)
            shares *= (np.bincount(category) ** settings.category_exponent / np.bincount(category, weights=shares))[
                category
            ]
        return shares

    def _build_phases(self, shares: NDArray[np.float64]) -> tuple[_Phase, ...]:
        position = {int(number): place for place, number in enumerate(self.task_indices)}
        phases, start = [], 0
        stages: list[tuple[int | None, Iterable[int]]] = [*self.settings.curriculum, (None, self.task_indices.tolist())]
        for number, (draws, indices) in enumerate(stages):
            members = np.asarray(sorted(position[index] for index in set(indices) if index in position), dtype=np.int64)
            if not len(members):
                raise ValueError(
                    f"phase {number} of the curriculum names none of the {len(position)} tasks of the mixture"
                )
            part = shares[members] / shares[members].sum()
            block = self.settings.block_size or min(max(_PERIOD, math.ceil(1 / part.min())), _LARGEST_BLOCK)
            edges = np.concatenate([[0], np.rint(np.cumsum(part) * block * _PERIOD).astype(np.int64)])
            edges[-1] = block * _PERIOD
            if (np.diff(edges) < 1).any():
                rarest = int(self.task_indices[members[part.argmin()]])
                raise ValueError(
                    f"task {rarest} has the share {part.min():.2g}, under 1/{_PERIOD} of a draw in a block of {block}: "
                    "raise mixture.block_size, raise mixture.temperature or leave the task out"
                )
            phases.append(_Phase(start, draws, members, block, edges, stream_key(self.seed, f"order {number}")))
            start += draws or 0
        return tuple(phases)

    @property
    def phases(self) -> tuple[tuple[int, int | None], ...]:
        """(first position, number of draws or None for no end) of each phase; the full mixture is the last."""
        return tuple((phase.start, phase.draws) for phase in self._phases)

    def targets(self, phase: int = -1) -> NDArray[np.float64]:
        """Target share of each task in a phase, float64 in the order of ``task_indices``; -1 is the full mixture."""
        chosen = self._phases[phase]
        shares = np.zeros(len(self.task_indices))
        shares[chosen.members] = np.diff(chosen.edges) / (chosen.block * _PERIOD)
        return shares

    def realised(self, start: int, count: int) -> NDArray[np.int64]:
        """How often each task comes among ``count`` draws from ``start``, int64 in the order of ``task_indices``."""
        counts = np.zeros(int(self.task_indices.max()) + 1, dtype=np.int64)
        for first in range(start, start + count, _LARGEST_BLOCK):
            task = self.draws(first, min(_LARGEST_BLOCK, start + count - first)).task
            counts += np.bincount(task, minlength=len(counts))
        return counts[self.task_indices]

    def draws(self, start: int, count: int) -> Draws:
        """The draws at the positions [start, start + count).

        Args:
            start: First position, from 0.
            count: How many; memory is about 200 bytes each.

        Raises:
            ValueError: A negative position or count.
        """
        if start < 0 or count < 0:
            raise ValueError(f"draws at [{start}, {start} + {count}); positions and counts are not negative")
        places, ordinals, epochs = [], [], []
        for number, phase in enumerate(self._phases):
            end = start + count if phase.draws is None else min(start + count, phase.start + phase.draws)
            first = max(start, phase.start)
            if first < end:
                place, ordinal = self._quotas(number, first - phase.start, end - phase.start)
                places.append(place)
                ordinals.append(ordinal)
                epochs.append(np.full(end - first, number, dtype=np.uint64))
        if not places:
            places, ordinals, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        place = np.concatenate(places)
        index = np.arange(start, start + count, dtype=np.int64)
        row = self._rows(place, np.concatenate(ordinals), np.concatenate(epochs))
        counter = index.astype(np.uint64)
        choice = below(mix64(counter + self._keys["template"]), self._num_templates[place])
        threshold = np.uint64(int(self.settings.denoising * 2**64))
        return Draws(
            index=index,
            task=self.task_indices[place].astype(np.int32),
            row=row,
            template=self._templates[self._first_template[place] + choice],
            denoise=mix64(counter + self._keys["noise"]) < threshold,
            key=mix64(counter + self._keys["example"]),
        )

    def _quotas(self, number: int, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Task (as a place in the list) and ordinal within the task of a phase's draws [start, end)."""
        phase = self._phases[number]
        places, ordinals = [], []
        for block in range(start // phase.block, -(-end // phase.block)):
            cut = slice(max(start - block * phase.block, 0), min(end - block * phase.block, phase.block))
            place, ordinal = self._block(number, block)
            places.append(place[cut])
            ordinals.append(ordinal[cut])
        return np.concatenate(places), np.concatenate(ordinals)

    def _order_block(self, number: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Task and ordinal of all draws of a block of a phase, in the order drawn."""
        phase = self._phases[number]
        whole, fraction = phase.edges // _PERIOD, phase.edges % _PERIOD
        period, member = divmod(block, _PERIOD)
        edges = whole + (fraction + _OFFSETS[member] >= _PERIOD)
        counts = np.diff(edges)
        by_task = np.repeat(np.arange(len(counts)), counts)
        key = mix64(np.array([block], dtype=np.uint64) + phase.key)
        owner = by_task[permute(phase.block, key, np.arange(phase.block))]
        before = period * phase.edges + member * whole + _CARRIES[member][fraction]
        ordinal = np.diff(before)[owner]
        if counts.max() > 1:
            # 16-bit numbers are sorted by radix, five times faster; a block has at most 65,536 owners.
            ordinal[np.argsort(owner.astype(np.uint16), kind="stable")] += np.arange(phase.block) - edges[by_task]
        return phase.members[owner], ordinal

    def _rows(
        self, place: NDArray[np.int64], ordinal: NDArray[np.int64], phase: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Row of the ``ordinal``-th draw of the task at ``place`` in a phase."""
        phase_bits = phase << np.uint64(56)
        if self.settings.class_balance:
            classes = self._num_classes[place]
            turn, member = np.divmod(ordinal, classes)
            split = np.flatnonzero(classes > 1)
            turn_key = self._key("cycle", self.task_indices[place[split]], turn[split], phase_bits[split])
            member[split] = permute(classes[split], turn_key, member[split], rounds=SHORT)
            group = self._first_class[place] + member
            size = self._class_cap[group]
            epoch, position = np.divmod(turn, size)
            name = self._class_row[group]
        else:
            size = self.rows_used[place]
            epoch, position = np.divmod(ordinal, size)
            name = self._class_row[self._first_class[place]]
        position = permute(size, self._key("epoch", name, epoch, phase_bits), position)
        if not self.settings.class_balance:
            position += self._cap_start[place]
            group = np.searchsorted(self._cap_ends, position, side="right")
            position -= self._cap_ends[group] - self._class_cap[group]
        capped = np.flatnonzero(self._class_size[group] > self._class_cap[group])
        name = self._class_row[group[capped]]
        position[capped] = permute(
            self._class_size[group[capped]], self._key("subset", name, 0, np.uint64(0)), position[capped]
        )
        rows: NDArray[np.int64] = self._class_row[group] + position
        return rows

    def _key(
        self,
        purpose: str,
        name: NDArray[np.int64],
        count: NDArray[np.int64] | int,
        extra: NDArray[np.uint64] | np.uint64,
    ) -> NDArray[np.uint64]:
        """Key of the permutation that belongs to a purpose, a task or class, and a counter."""
        word = mix64(name.astype(np.uint64) + self._keys[purpose])
        word ^= np.asarray(count).astype(np.uint64) | extra
        return mix64(word)
