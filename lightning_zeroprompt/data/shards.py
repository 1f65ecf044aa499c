# SPDX-License-Identifier: Apache-2.0
"""One task as arrays: which rows are kept, in which order, and what their pieces are as tokens.

:func:`encode_task` is a pure function of the task, its examples, the tokeniser and the limits, so that a task can be
encoded in any order, by any worker, before or after a kill, with the same result. Rows are chosen in three steps, each
keyed by the seed and the task's id: rows with too long a field are dropped (or cut later), the instance hold-out is
drawn in groups of identical inputs, and caps keep a random subset, balanced over the classes where there are classes. A
cap never changes the hold-out.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import zipfile
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.data.task import INPUT, OPTIONS, Example, PromptTemplate, Task, TaskError
from lightning_zeroprompt.data.tokenizer import TextTokenizer

__all__ = [
    "Limits",
    "RowPlan",
    "TaskPart",
    "balanced_quota",
    "encode_task",
    "plan_rows",
    "read_part",
    "task_record",
    "write_part",
]

_INT16_MAX = 32_767


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is kept of each task.

    Attributes:
        seed: Keys every draw together with the task's id.
        max_input_tokens: Longest field, in tokens.
        long_inputs: Cut the end of a longer field, or drop its row.
        max_examples_per_task: Most training rows of a task, spread evenly over its classes.
        max_examples_per_class: Most training rows of a class, for tasks with classes; takes the place of the limit
            above there.
        max_heldout_examples: Most rows of a held-out task.
        heldout_fraction: Share of a training task's rows that is held out.
        heldout_max: Most held-out rows of a training task.
    """

    seed: int = 0
    max_input_tokens: int = 1024
    long_inputs: Literal["truncate", "drop"] = "truncate"
    max_examples_per_task: int | None = None
    max_examples_per_class: int | None = None
    max_heldout_examples: int | None = None
    heldout_fraction: float = 0.05
    heldout_max: int = 50

    def __post_init__(self) -> None:
        """Refuse limits that keep nothing.

        Raises:
            ValueError: With the name, the value and what it must be.
        """
        for name in ("max_input_tokens", "max_examples_per_task", "max_examples_per_class", "max_heldout_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} is {value}, which keeps nothing; give at least 1, or null for all where that is allowed"
                )
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction is {self.heldout_fraction}; give a share from 0 up to, not including, 1"
            )
        if self.heldout_max < 0:
            raise ValueError(f"heldout_max is {self.heldout_max}; give 0 or more")
        if self.long_inputs not in ("truncate", "drop"):
            raise ValueError(f"long_inputs is {self.long_inputs!r}; give 'truncate' or 'drop'")


@dataclasses.dataclass(frozen=True, slots=True)
class RowPlan:
    """Which examples a task keeps.

    Attributes:
        rows: Example numbers in the order of the compiled rows, int64 [N].
        num_heldout: The last so many are the instance hold-out.
        class_counts: Sizes of the groups before them; empty for held-out tasks.
        num_capped: Examples left out by the caps.
    """

    rows: npt.NDArray[np.int64]
    num_heldout: int
    class_counts: tuple[int, ...]
    num_capped: int


@dataclasses.dataclass(frozen=True, slots=True)
class TaskPart:
    """A task, encoded; all segment numbers count from the task's first segment.

    Attributes:
        info: The fields of ``TaskInfo`` that do not depend on the other tasks.
        templates: The fields of ``TemplateInfo`` likewise.
        arrays: ``tokens``, ``segment_lengths``, ``template_code_lengths`` and the row and template arrays of
            ``Corpus``.
    """

    info: dict[str, Any]
    templates: list[dict[str, Any]]
    arrays: dict[str, npt.NDArray[Any]]


def task_record(task: Task) -> dict[str, Any]:
    """A task's attributes without its examples, as JSON-like data; a change makes a finished part useless."""
    record = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name != "examples"}
    return record | {"templates": [dataclasses.asdict(template) for template in task.templates]}


def balanced_quota(counts: Sequence[int], total: int) -> npt.NDArray[np.int64]:
    """Spread ``total`` over groups as evenly as their sizes allow.

    Returns:
        int64 [len(counts)], no entry above its count; the sum is ``min(total, sum(counts))``.

    Example:
        >>> balanced_quota([10, 1, 10], 8).tolist()
        [4, 1, 3]
    """
    sizes = np.asarray(counts, np.int64)
    quota = np.zeros_like(sizes)
    left = min(total, int(sizes.sum()))
    while left:
        open_groups = np.flatnonzero(quota < sizes)
        share = max(left // len(open_groups), 1)
        step = np.minimum(share, sizes[open_groups] - quota[open_groups])
        step = np.minimum(step, np.maximum(left - (np.cumsum(step) - step), 0))
        quota[open_groups] += step
        left -= int(step.sum())
    return quota


def _generator(seed: int, task_id: str) -> np.random.Generator:
    digest = hashlib.sha256(task_id.encode("utf-8")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def plan_rows(
    keys: Sequence[Hashable],
    classes: Sequence[int] | None,
    *,
    task_id: str,
    role: Literal["train", "heldout"],
    limits: Limits,
) -> RowPlan:
    """Choose and order the rows of a task.

    The hold-out of a training task is ``round(heldout_fraction * rows)``, at most ``heldout_max``, and at least one
    from 20 rows on; rows with equal ``keys`` stay on one side, so it may fall short where one input fills the task.

    Args:
        keys: What identifies an input, one a row.
        classes: Label number of each row, or None where there are no classes.
        task_id: Keys the draws, with the seed.
        role: Held-out tasks keep the source's order and have neither hold-out nor classes.
        limits: The caps and the hold-out.
    """
    count = len(keys)
    rng = _generator(limits.seed, task_id)
    order = rng.permutation(count)
    if role == "heldout":
        kept = np.sort(order[: limits.max_heldout_examples])
        return RowPlan(kept, 0, (), count - len(kept))
    target = min(round(limits.heldout_fraction * count), limits.heldout_max)
    if not target and count >= 20 and limits.heldout_fraction and limits.heldout_max:
        target = 1
    groups: dict[Hashable, list[int]] = {}
    for row in order.tolist():
        groups.setdefault(keys[row], []).append(row)
    heldout: list[int] = []
    for members in groups.values():
        # A whole group or nothing, and never the last one: training must keep at least one row.
        if len(heldout) + len(members) <= target and len(heldout) + len(members) < count:
            heldout += members
    is_heldout = np.zeros(count, bool)
    is_heldout[heldout] = True
    train = order[~is_heldout[order]]
    if classes is None:
        kept_groups = [train[: limits.max_examples_per_task]]
    else:
        labels = np.asarray(classes, np.int64)[train]
        by_class = [train[labels == label] for label in np.unique(labels)]
        sizes = [len(rows) for rows in by_class]
        if limits.max_examples_per_class is not None:
            quota = np.minimum(sizes, limits.max_examples_per_class)
        else:
            quota = balanced_quota(sizes, limits.max_examples_per_task or len(train))
        kept_groups = [rows[:n] for rows, n in zip(by_class, quota.tolist(), strict=True)]
    kept = np.concatenate([*kept_groups, np.asarray(heldout, np.int64)])
    return RowPlan(kept, len(heldout), tuple(len(rows) for rows in kept_groups), count - len(kept))


class _Segments:
    """Collects the pieces of a task in order; equal texts are encoded once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, *texts: str) -> int:
        first = len(self.texts)
        self.texts += texts
        return first

    def encode(
        self, tokenizer: TextTokenizer, limit_of: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Flat tokens and lengths, each segment cut to its limit; also where the limit bites."""
        distinct = list(dict.fromkeys(self.texts))
        ids = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
        pieces = [ids[text] for text in self.texts]
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        cut = np.minimum(lengths, limit_of)
        for index in np.flatnonzero(cut < lengths).tolist():
            pieces[index] = pieces[index][: int(limit_of[index])]
        dtype = np.uint16 if tokenizer.vocab_size < 65_536 else np.uint32
        flat = np.fromiter(itertools.chain.from_iterable(pieces), dtype, int(cut.sum()))
        return flat, lengths


def _checked(task: Task, examples: Sequence[Example]) -> tuple[list[Example], tuple[str, ...]]:
    if not examples:
        raise TaskError(f"task {task.task_id!r} has no examples; remove the task or give it at least one")
    names = tuple(examples[0].fields)
    if {INPUT, OPTIONS} & set(names):
        raise TaskError(
            f"task {task.task_id!r} names a field {INPUT!r} or {OPTIONS!r}; these names are taken, choose another"
        )
    checked = []
    for row, example in enumerate(examples):
        example.check(task.task_id, row)
        if example.options is not None and len(set(example.options)) < len(example.options):
            # An option that stands twice can be no right or wrong answer of its own; one that stands alone leaves no
            # choice.
            example = dataclasses.replace(example, options=tuple(dict.fromkeys(example.options)))
            if len(example.options or ()) < 2:
                continue
        if tuple(example.fields) != names and set(example.fields) != set(names):
            raise TaskError(
                f"task {task.task_id!r}, example {row} has the fields {sorted(example.fields)}, example 0 has "
                f"{sorted(names)}; "
                "all examples of a task need the same"
            )
        if len(example.outputs) > _INT16_MAX or len(example.options or ()) > _INT16_MAX:
            raise TaskError(
                f"task {task.task_id!r}, example {row} has more than {_INT16_MAX:,} outputs or options; keep fewer"
            )
        for text in (example.input, *example.fields.values(), *example.outputs, *(example.options or ())):
            if not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise TaskError(
                        f"task {task.task_id!r}, example {row} holds text that is not valid UTF-8 ({error.reason} at "
                        f"character "
                        f"{error.start}); decode the source with its own encoding"
                    ) from None
        checked.append(example)
    if not checked:
        raise TaskError(f"task {task.task_id!r}: in every example all options are the same text; give different ones")
    return checked, (INPUT, *names)


def _labels(examples: Sequence[Example]) -> tuple[str, ...] | None:
    first = examples[0].options
    if first is None:
        return None
    expected = frozenset(first)
    same = all(e.options is not None and (e.options == first or frozenset(e.options) == expected) for e in examples)
    return first if same else None


def _check_templates(task: Task, fields: tuple[str, ...], labels: tuple[str, ...] | None, is_choice: bool) -> None:
    for template in task.templates:
        for name in template.placeholders():
            if name == OPTIONS:
                if not is_choice:
                    raise TaskError(
                        f"task {task.task_id!r}: template {template.name!r} shows {{options}}, but not every example "
                        f"has options; "
                        "give options to all or use another template"
                    )
            elif name not in fields:
                raise TaskError(
                    f"task {task.task_id!r}: template {template.name!r} has the unknown variable {name!r}; the "
                    f"examples have: "
                    f"{', '.join((*fields, OPTIONS) if is_choice else fields)}"
                )
        if template.verbalizer is None:
            continue
        if labels is None:
            raise TaskError(
                f"task {task.task_id!r}: template {template.name!r} has a verbalizer, but the task has no closed label "
                f"set"
            )
        if len(template.verbalizer) != len(labels):
            raise TaskError(
                f"task {task.task_id!r}: template {template.name!r} has {len(template.verbalizer)} verbalizer words "
                f"for "
                f"{len(labels)} labels {list(labels)}; give one a label"
            )


def _template_codes(template: PromptTemplate, fields: tuple[str, ...], segments: _Segments) -> list[int]:
    codes = []
    for piece in template.segments():
        if not piece.is_placeholder:
            codes.append(segments.add(piece.text))
        else:
            codes.append(-1 if piece.text == OPTIONS else -2 - fields.index(piece.text))
    return codes


def encode_task(task: Task, examples: Sequence[Example], tokenizer: TextTokenizer, limits: Limits) -> TaskPart:
    """Check a task, choose its rows and turn them into arrays.

    Args:
        task: Its record; ``task.examples`` is not called.
        examples: All its examples, in the source's order.
        tokenizer: Encodes the pieces.
        limits: What to keep.

    Raises:
        TaskError: The task or one of its examples or templates cannot be used.
    """
    checked, fields = _checked(task, examples)
    labels = _labels(checked)
    is_choice = all(example.options is not None for example in checked)
    _check_templates(task, fields, labels, is_choice)
    num_dropped = len(examples) - len(checked)
    if limits.long_inputs == "drop":
        texts = [example.field(name) for example in checked for name in fields]
        sizes = np.fromiter(map(len, tokenizer.encode_batch(texts)), np.int64, len(texts)).reshape(-1, len(fields))
        fits = sizes.max(axis=1) <= limits.max_input_tokens
        num_dropped += int((~fits).sum())
        if not fits.any():
            raise TaskError(
                f"task {task.task_id!r}: all {len(checked)} examples are longer than "
                f"max_input_tokens={limits.max_input_tokens}; "
                "raise the limit or use long_inputs='truncate'"
            )
        checked = [example for example, ok in zip(checked, fits.tolist(), strict=True) if ok]
    rank = {label: index for index, label in enumerate(labels)} if labels is not None else None
    plan = plan_rows(
        [tuple(example.field(name) for name in fields) for example in checked],
        None if rank is None else [rank[example.outputs[0]] for example in checked],
        task_id=task.task_id,
        role=task.role,
        limits=limits,
    )
    rows = [checked[row] for row in plan.rows.tolist()]

    segments = _Segments()
    first_segment, option_segment, num_options, label = [], [], [], []
    for example in rows:
        first_segment.append(segments.add(*(example.field(name) for name in fields), *example.outputs))
        if example.options is None:
            option_segment.append(-1)
            num_options.append(0)
            label.append(-1)
        else:
            option_segment.append(0 if rank is not None else segments.add(*example.options))
            num_options.append(len(example.options))
            label.append(rank[example.outputs[0]] if rank is not None else example.options.index(example.outputs[0]))
    if labels is not None:
        option_segment = [segments.add(*labels)] * len(rows)
    codes = [_template_codes(template, fields, segments) for template in task.templates]
    verbalizers = [-1 if t.verbalizer is None else segments.add(*t.verbalizer) for t in task.templates]
    separators = [segments.add(template.option_separator) for template in task.templates]

    first = np.asarray(first_segment, np.int64)
    field_segments = first[:, None] + np.arange(len(fields))
    limit_of = np.full(len(segments.texts), np.iinfo(np.int64).max)
    limit_of[field_segments] = limits.max_input_tokens
    tokens, full_lengths = segments.encode(tokenizer, limit_of)
    lengths = np.minimum(full_lengths, limit_of)
    info = task_record(task) | {
        "fields": list(fields),
        "labels": None if labels is None else list(labels),
        "num_rows": len(rows),
        "num_heldout_rows": plan.num_heldout,
        "class_counts": list(plan.class_counts),
        "num_templates": len(task.templates),
        "kind": "choice" if is_choice else "generation",
        "num_truncated": int((full_lengths > limit_of)[field_segments].any(axis=1).sum()),
        "num_dropped": num_dropped,
        "num_capped": plan.num_capped,
        "mean_input_tokens": round(float(lengths[field_segments].sum(axis=1).mean()), 3),
        "mean_output_tokens": round(float(lengths[first + len(fields)].mean()), 3),
    }
    templates = info.pop("templates")
    del info["training_allowed"]
    return TaskPart(
        info,
        templates,
        {
            "tokens": tokens,
            "segment_lengths": lengths,
            "row_first_segment": first,
            "row_num_outputs": np.asarray([len(example.outputs) for example in rows], np.int16),
            "row_option_segment": np.asarray(option_segment, np.int64),
            "row_num_options": np.asarray(num_options, np.int16),
            "row_label": np.asarray(label, np.int32),
            "template_codes": np.asarray(list(itertools.chain.from_iterable(codes)), np.int64),
            "template_code_lengths": np.asarray([len(code) for code in codes], np.int64),
            "template_separator": np.asarray(separators, np.int64),
            "template_verbalizer": np.asarray(verbalizers, np.int64),
            "template_role": np.asarray([template.role == "heldout" for template in task.templates], np.int8),
        },
    )


def write_part(part: TaskPart, path: Path) -> None:
    """Write a part under a temporary name and rename it, so that a file of this name is always whole.

    Raises:
        OSError: The disk is full or not writable; the temporary file is removed.
    """
    text = json.dumps({"info": part.info, "templates": part.templates}, ensure_ascii=False)
    meta = np.frombuffer(text.encode("utf-8"), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, meta=meta, **part.arrays)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_part(path: Path, skip: Collection[str] = ()) -> TaskPart | None:
    """Read a part, without the arrays named in ``skip``.

    Returns:
        The part, or None where there is none or it is damaged (a crash of the machine can leave a renamed but empty
        file).
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files if name not in skip}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    content = json.loads(arrays.pop("meta").tobytes().decode("utf-8"))
    return TaskPart(content["info"], content["templates"], arrays)
