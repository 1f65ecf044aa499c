# SPDX-License-Identifier: Apache-2.0
"""What a zero-shot evaluation evaluates: a pure function of (corpus, training tasks, settings).

Every evaluated task stands at one of three hold-out levels, reported apart (OPT-IML, arXiv 2212.12017, uses the same):
*category* (no chosen training task has its category), *task* (one has), *instance* (rows kept out of a chosen training
task). A level's task becomes a :class:`TaskSample`: a seeded sample of its rows, the same rows under every template, so
that the spread over templates is the wording's and not the sample's. A sample under one template is an
:class:`EvaluationCell`, the unit that scores are summed in.

Samples are prefixes of one permutation a task, keyed by the seed and the task's id: a larger ``examples_per_task``
contains the smaller one, and other tasks in the corpus change nothing. The alternative, one shared random stream,
changes every sample with every added task, and two runs are then compared on different questions.

Baselines need no model and are computed from the sample: chance (mean share of right options), majority (always the
most frequent answer of the sample, which looks at the evaluated labels and so flatters this baseline), and the first
option.

Cost: 0.3 s for 276 real tasks of 8 rows.
"""

import collections
import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo, take
from lightning_zeroprompt.data.instruction_shuffle import shuffled_templates
from lightning_zeroprompt.metrics import exact_match, rouge_l

__all__ = [
    "EvaluationCell",
    "EvaluationPlan",
    "EvaluationSettings",
    "Level",
    "TaskSample",
    "plan_evaluation",
    "right_options",
    "split_tasks",
]

Level = Literal["category", "task", "instance"]
"""Hold-out level of an evaluated task, from the hardest."""

_LEVELS: tuple[Level, ...] = get_args(Level)
_ROLES: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How much is evaluated.

    Attributes:
        examples_per_task: Rows a task and level; None for all.
        templates_per_task: Templates a task and wording; None for all.
        levels: Hold-out levels to evaluate.
        heldout_wordings: Whether templates that training never draws are evaluated beside the others.
        instance_tasks: Training tasks whose held-out rows are evaluated at the instance level, taken in turn from every
            category; None for all.
        shuffle_instructions: Whether every cell reads the template of another task (see
            :mod:`lightning_zeroprompt.data.instruction_shuffle`): a model that understands instructions scores lower
            then.
        seed: Of rows, templates and the shuffle.

    Raises:
        ValueError: A count below 1, or an unknown level.
    """

    examples_per_task: int | None = 8
    templates_per_task: int | None = None
    levels: tuple[Level, ...] = _LEVELS
    heldout_wordings: bool = True
    instance_tasks: int | None = 32
    shuffle_instructions: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples_per_task", "templates_per_task", "instance_tasks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: evaluation needs at least 1, or null for all")
        unknown = [level for level in self.levels if level not in _LEVELS]
        if unknown or not self.levels:
            raise ValueError(f"levels={list(self.levels)}: give one or more of {', '.join(_LEVELS)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskSample:
    """The evaluated rows of one task at one level.

    Attributes:
        index: Position in :attr:`EvaluationPlan.samples`.
        task: The task as compiled.
        level: Hold-out level.
        rows: Corpus rows, int64, ascending.
        available: Rows that the sample was drawn from; at the instance level without those that a sibling task trains
        on.
        chance: Score of a random answer: mean share of right options; 0 for free answers.
        majority: Score of the sample's most frequent answer, given always, in the task's metric.
        first_option: Accuracy of always the first stored option; None for free answers.
    """

    index: int
    task: TaskInfo
    level: Level
    rows: npt.NDArray[np.int64]
    available: int
    chance: float
    majority: float
    first_option: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCell:
    """One task sample under one template.

    Attributes:
        index: Position in :attr:`EvaluationPlan.cells`; the row of the score tables.
        sample: Index of the :class:`TaskSample`.
        template: The task's own template (global index).
        template_name: Its name.
        shown_template: The template that is read: another one where instructions are shuffled.
        wording: ``"heldout"`` where training never draws the template.
    """

    index: int
    sample: int
    template: int
    template_name: str
    shown_template: int
    wording: Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated.

    Attributes:
        settings: What the plan was made with.
        num_training_tasks: Chosen training tasks.
        samples: Task samples, by level and task.
        cells: Cells, by sample and template.
        item_cell: Cell of every example to score, int64 ``[items]``, ascending.
        item_row: Corpus row of every example, int64 ``[items]``.
        unshuffled_cells: Cells left out because no other task has an instruction of their shape.
    """

    settings: EvaluationSettings
    num_training_tasks: int
    samples: tuple[TaskSample, ...]
    cells: tuple[EvaluationCell, ...]
    item_cell: npt.NDArray[np.int64]
    item_row: npt.NDArray[np.int64]
    unshuffled_cells: int = 0

    def sample_sizes(self) -> dict[str, int]:
        """Counts for reports: samples, cells, items, and the tasks and distinct examples of every level."""
        sizes = {"task_samples": len(self.samples), "cells": len(self.cells), "items": len(self.item_row)}
        for level in self.settings.levels:
            samples = [sample for sample in self.samples if sample.level == level]
            sizes[f"{level}_tasks"] = len(samples)
            sizes[f"{level}_examples"] = sum(len(sample.rows) for sample in samples)
        return sizes


def split_tasks(
    tasks: Iterable[TaskInfo], holdout_categories: Sequence[str] = (), *, drop_shared_families: bool = False
) -> tuple[list[int], list[int]]:
    """Tasks that training may choose from, and tasks held out from it.

    Args:
        tasks: Tasks of a corpus.
        holdout_categories: Categories to hold out beside the tasks whose source holds them out.
        drop_shared_families: Leave out training tasks of held-out families instead of refusing them.

    Returns:
        Indices of the training side and of the held-out side, ascending.

    Raises:
        ValueError: A category that no task has, or a family on both sides.
    """
    tasks = tuple(tasks)
    known = sorted({task.category for task in tasks})
    for category in holdout_categories:
        if category not in known:
            near = difflib.get_close_matches(category, known, n=3) or known[:10]
            raise ValueError(
                f"hold-out category {category!r} is unknown: none of the {len(tasks)} tasks has it; did you mean "
                f"{', '.join(map(repr, near))}? ({len(known)} categories; `zeroprompt-data describe` lists them)"
            )
    out = [task for task in tasks if task.role == "heldout" or task.category in holdout_categories]
    held = {task.index for task in out}
    train = [task for task in tasks if task.index not in held]
    if drop_shared_families:
        families = {task.family for task in out}
        train = [task for task in train if task.family not in families]
    _refuse_shared_families(train, out)
    return [task.index for task in train], [task.index for task in out]


def _refuse_shared_families(train: Sequence[TaskInfo], heldout: Sequence[TaskInfo]) -> None:
    of_family = {task.family: task for task in train}
    shared = {task.family: task for task in heldout if task.family in of_family}
    if shared:
        family, task = next(iter(shared.items()))
        raise ValueError(
            f"{len(shared)} families are on both sides of the split: family {family!r} has the training task "
            f"{of_family[family].task_id!r} and the held-out task {task.task_id!r}, so the evaluation would not be "
            "zero-shot; hold out the whole family, or drop its training tasks (data.drop_shared_families=true, "
            "--drop-shared-families)"
        )


def right_options(corpus: Corpus, task: TaskInfo, row: int) -> list[bool]:
    """Which of a row's options equal a right output, in stored order.

    Args:
        corpus: The corpus.
        task: The row's task.
        row: A row with options.
    """
    first = int(corpus.row_option_segment[row])
    outputs = {corpus.segment(segment).tobytes() for segment in _output_segments(corpus, task, row)}
    return [corpus.segment(first + k).tobytes() in outputs for k in range(int(corpus.row_num_options[row]))]


def _output_segments(corpus: Corpus, task: TaskInfo, row: int) -> range:
    first = int(corpus.row_first_segment[row]) + len(task.fields)
    return range(first, first + int(corpus.row_num_outputs[row]))


def plan_evaluation(
    corpus: Corpus,
    training_tasks: Sequence[int],
    settings: EvaluationSettings | None = None,
    *,
    heldout_tasks: Sequence[int] | None = None,
    trained_elsewhere: Sequence[TaskInfo] = (),
) -> EvaluationPlan:
    """Choose tasks, rows and templates.

    Args:
        corpus: A compiled corpus.
        training_tasks: Indices of the tasks that training draws from.
        settings: How much is evaluated.
        heldout_tasks: Indices of the held-out tasks; those whose role is ``"heldout"`` when None.
        trained_elsewhere: Further trained tasks, of another corpus; they count for the levels.

    Raises:
        ValueError: A task or a family on both sides, or nothing to evaluate.
    """
    settings = settings or EvaluationSettings()
    chosen = [corpus.tasks[index] for index in training_tasks]
    if heldout_tasks is None:
        held = [task for task in corpus.tasks if task.role == "heldout"]
    else:
        held = [corpus.tasks[index] for index in heldout_tasks]
    both = {task.index for task in chosen} & {task.index for task in held}
    if both:
        raise ValueError(
            f"{len(both)} tasks are trained on and held out, such as {corpus.tasks[min(both)].task_id!r}; "
            "take them out of one side (split_tasks does)"
        )
    _refuse_shared_families([*chosen, *trained_elsewhere], held)
    seen = {task.category for task in (*chosen, *trained_elsewhere)}
    leveled: list[tuple[Level, TaskInfo, npt.NDArray[np.int64]]] = []
    for level in settings.levels:
        if level == "instance":
            kept_out = [
                (task, np.arange(task.first_row + task.num_train_rows, task.first_row + task.num_rows))
                for task in _instance_tasks(chosen, settings)
            ]
            leveled += [(level, task, rows) for task, rows in _without_trained(corpus, chosen, kept_out) if len(rows)]
        else:
            leveled += [
                (level, task, np.arange(task.first_row, task.first_row + task.num_rows))
                for task in held
                if (task.category in seen) == (level == "task")
            ]
    samples = tuple(_sample(corpus, index, *entry, settings) for index, entry in enumerate(leveled))
    pairs = [(sample.index, template) for sample in samples for template in _templates(corpus, sample.task, settings)]
    shown: list[int | None] = [template for _, template in pairs]
    if settings.shuffle_instructions:
        shown = shuffled_templates(corpus, [template for _, template in pairs], seed=settings.seed)
    kept = [(sample, own, other) for (sample, own), other in zip(pairs, shown, strict=True) if other is not None]
    cells = tuple(
        EvaluationCell(
            index=index,
            sample=sample,
            template=own,
            template_name=corpus.templates[own].name,
            shown_template=other,
            wording=corpus.templates[own].role,
        )
        for index, (sample, own, other) in enumerate(kept)
    )
    if not cells:
        raise ValueError(
            f"nothing to evaluate: {len(chosen)} training tasks and {len(held)} held-out tasks give {len(samples)} "
            f"task samples and {len(pairs)} wordings at the levels {', '.join(settings.levels)}, {len(pairs)} of them "
            "without a partner to shuffle with; hold tasks out or add a level"
        )
    sizes = np.array([len(samples[cell.sample].rows) for cell in cells])
    return EvaluationPlan(
        settings=settings,
        num_training_tasks=len(chosen) + len(trained_elsewhere),
        samples=samples,
        cells=cells,
        item_cell=np.repeat(np.arange(len(cells)), sizes),
        item_row=np.concatenate([samples[cell.sample].rows for cell in cells]),
        unshuffled_cells=len(pairs) - len(kept),
    )


def _generator(settings: EvaluationSettings, task: TaskInfo, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose}\0{task.task_id}".encode()).digest()
    return np.random.default_rng([settings.seed, int.from_bytes(digest[:8], "little")])


def _instance_tasks(chosen: Sequence[TaskInfo], settings: EvaluationSettings) -> list[TaskInfo]:
    drawn = sorted(
        (task for task in chosen if task.num_heldout_rows),
        key=lambda task: (_generator(settings, task, "instance").random(), task.index),
    )
    turn: collections.Counter[str] = collections.Counter()
    turns: list[tuple[int, TaskInfo]] = []
    for task in drawn:
        turns.append((turn[task.category], task))
        turn[task.category] += 1
    turns.sort(key=lambda entry: entry[0])  # stable: in turn from every category, each in its drawn order
    return sorted((task for _, task in turns[: settings.instance_tasks]), key=lambda task: task.index)


def _templates(corpus: Corpus, task: TaskInfo, settings: EvaluationSettings) -> list[int]:
    own = range(task.first_template, task.first_template + task.num_templates)
    result: list[int] = []
    for role in _ROLES if settings.heldout_wordings else _ROLES[:1]:
        of_role = [index for index in own if corpus.templates[index].role == role]
        order = _generator(settings, task, f"templates {role}").permutation(len(of_role))
        result += sorted(of_role[position] for position in order[: settings.templates_per_task])
    return result


def _without_trained(
    corpus: Corpus, chosen: Sequence[TaskInfo], kept_out: Sequence[tuple[TaskInfo, npt.NDArray[np.int64]]]
) -> list[tuple[TaskInfo, npt.NDArray[np.int64]]]:
    """Leave out rows that another chosen task trains on: sibling tasks share examples.

    A row counts as trained on where a training row has the same input, the same further fields in any order and under
    any name, and a right output in common.
    """
    if not kept_out:
        return []
    trained = np.concatenate([np.arange(task.first_row, task.first_row + task.num_train_rows) for task in chosen])
    rows = np.concatenate([found for _, found in kept_out])
    fields = np.zeros(len(corpus.row_first_segment), dtype=np.int64)
    for task in corpus.tasks:
        fields[task.first_row : task.first_row + task.num_rows] = len(task.fields)
    # Lengths and end tokens tell nearly all pairs apart; only rows that agree in them are read as a whole.
    likely = trained[np.isin(_outline(corpus, trained), _outline(corpus, rows))]
    seen = set().union(*(_answered(corpus, row, fields[row]) for row in likely.tolist()))
    return [
        (
            task,
            np.array([row for row in found.tolist() if seen.isdisjoint(_answered(corpus, row, fields[row]))], np.int64),
        )
        for task, found in kept_out
    ]


def _outline(corpus: Corpus, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A number a row, of its input's length and first and last token; equal inputs have equal ones."""
    first = take(corpus.row_first_segment, rows)
    start, end = take(corpus.segment_offsets, first), take(corpus.segment_offsets, first + 1)
    tokens, last = corpus.tokens, len(corpus.tokens) - 1
    head, tail = (tokens[np.minimum(place, last)].astype(np.int64) for place in (start, np.maximum(end - 1, 0)))
    return ((end - start) << 34) + (head << 17) + tail


def _answered(corpus: Corpus, row: int, fields: int) -> set[tuple[bytes, frozenset[bytes], bytes]]:
    """(input, further fields, answer) of each right output of a row."""
    first, outputs = int(corpus.row_first_segment[row]), int(corpus.row_num_outputs[row])
    texts = [corpus.segment(segment).tobytes() for segment in range(first, first + int(fields) + outputs)]
    # A field that repeats the input, or is empty, tells nothing apart.
    further = frozenset(texts[1:fields]) - {b"", texts[0]}
    return {(texts[0], further, answer) for answer in texts[fields:]}


def _sample(
    corpus: Corpus, index: int, level: Level, task: TaskInfo, rows: npt.NDArray[np.int64], settings: EvaluationSettings
) -> TaskSample:
    order = _generator(settings, task, f"rows {level}").permutation(len(rows))[: settings.examples_per_task]
    drawn = np.sort(rows[order])
    chance, majority, first = (_choice_baselines if task.kind == "choice" else _free_baselines)(corpus, task, drawn)
    return TaskSample(
        index=index,
        task=task,
        level=level,
        rows=drawn,
        available=len(rows),
        chance=chance,
        majority=majority,
        first_option=first,
    )


def _choice_baselines(corpus: Corpus, task: TaskInfo, rows: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    right = [right_options(corpus, task, row) for row in rows.tolist()]
    answers = [corpus.segment(_output_segments(corpus, task, row)[0]).tobytes() for row in rows.tolist()]
    frequent = collections.Counter(answers).most_common(1)[0][0]
    hits = [
        any(corpus.segment(segment).tobytes() == frequent for segment in _output_segments(corpus, task, row))
        for row in rows.tolist()
    ]
    return (
        float(np.mean([np.mean(flags) for flags in right])),
        float(np.mean(hits)),
        float(np.mean([flags[0] for flags in right])),
    )


def _free_baselines(corpus: Corpus, task: TaskInfo, rows: npt.NDArray[np.int64]) -> tuple[float, float, None]:
    outputs = [
        [corpus.tokenizer.decode(corpus.segment(segment).tolist()) for segment in _output_segments(corpus, task, row)]
        for row in rows.tolist()
    ]
    frequent = collections.Counter(texts[0] for texts in outputs).most_common(1)[0][0]
    score = exact_match if task.metric == "exact_match" else rouge_l
    return 0.0, float(np.mean([score(frequent, texts) for texts in outputs])), None
