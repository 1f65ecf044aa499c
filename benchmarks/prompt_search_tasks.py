# SPDX-License-Identifier: Apache-2.0
"""Held-out tasks for ``prompt_search.py``: built-in ones in new wordings, T0's evaluation sets, other real tasks."""

import dataclasses
import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.sources.parquet import parquet_tasks
from lightning_zeroprompt.data.sources.promptsource import promptsource_tasks
from lightning_zeroprompt.data.task import Example, Task, TaskError
from lightning_zeroprompt.data.tokenizer import TextTokenizer
from lightning_zeroprompt.prompts.pool import ExamplePool, PoolError

__all__ = ["Found", "LeaveOut", "builtin_pools", "real_pools", "t0_pools"]

Found = tuple[ExamplePool, Any]
"""A task's rows, and those of its test part (None: a share of the rows by seed)."""
LeaveOut = Callable[[str, str], None]
"""Told of a task that is not searched, and why."""

_T0 = {
    "super_glue_rte": "train",
    "super_glue_cb": "train",
    "super_glue_copa": "train",
    "super_glue_wsc.fixed": "train",
    "super_glue_wic": "train",
    "winogrande_winogrande_debiased": "train",
    "anli_r1": "test",
    "anli_r2": "test",
    "anli_r3": "test",
}
"""T0's evaluation sets, and the split that search and confirm read; test is the validation split."""

_MOST_OPTIONS = 8
_TRAIN_ROWS = 600
_FEWEST_ROWS = 192
_LONGEST_ANSWER = 64


def _drawn(rows: list[Example], limit: int, seed: str) -> list[Example]:
    return rows if len(rows) <= limit else random.Random(seed).sample(rows, limit)


def builtin_pools(
    tokenizer: TextTokenizer, *, count: int, kind: str, rows: int, seed: int, corpus_seed: int
) -> Iterator[Found]:
    """Built-in held-out tasks; the manual prompts are the wordings that no training draws.

    Args:
        tokenizer: The model's.
        count: Tasks, drawn by seed from all that are held out and have 192 rows.
        kind: ``"all"``, or ``"choice"`` for those with options alone.
        rows: Rows a task.
        seed: Of the draw.
        corpus_seed: Seed of the corpus that was trained on: wordings depend on it.
    """
    listed = builtin_tasks(seed=corpus_seed, examples_per_task=rows)
    heldout = [task for task in listed if task.role == "heldout"]
    random.Random(f"{seed} tasks").shuffle(heldout)
    chosen: list[tuple[Task, list[Example]]] = []
    for task in heldout:
        examples = list(task.examples()) if len(chosen) < count else []
        if len(examples) >= _FEWEST_ROWS and (kind == "all" or examples[0].options is not None):
            chosen.append((task, examples))
    for task, examples in sorted(chosen, key=lambda pair: pair[0].task_id):
        templates = [template for template in task.templates if template.role == "heldout"]
        yield ExamplePool.from_examples(task.task_id, examples, templates, tokenizer, metric=task.metric), None


def t0_pools(
    folder: Path, tokenizer: TextTokenizer, *, rows: int, encoder_length: int, leave_out: LeaveOut
) -> Iterator[Found]:
    """T0's evaluation sets under their promptsource templates.

    Templates of one set that ask other rows or for other choices make a task of their own; those with one template are
    left out, since there is nothing to choose from.

    Args:
        folder: With ``t0/NAME/SPLIT.parquet`` and ``templates_t0/NAME.yaml``.
        tokenizer: The model's.
        rows: Most rows of a test part.
        encoder_length: Longer fields lose their end.
        leave_out: Told of the tasks that are left out.
    """
    for name, split in _T0.items():
        found: dict[str, dict[tuple[str, ...], Task]] = {}
        try:
            for part in (split, "validation"):
                tasks = promptsource_tasks(_only(folder / "templates_t0", name), folder / "t0", split=part)
                found[part] = {tuple(template.name for template in task.templates): task for task in tasks}
        except (OSError, TaskError) as error:
            leave_out(name, str(error))
            continue
        for names, train in found[split].items():
            test = found["validation"].get(names)
            if test is None:
                leave_out(train.task_id, f"{', '.join(names)}: no rows of the split validation")
                continue
            # A template that is plain text in one split and rendered in the other would need other fields.
            kept = [one for one, other in zip(train.templates, test.templates, strict=True) if one == other]
            if len(kept) < 2:
                leave_out(train.task_id, f"{', '.join(names)}: {len(kept)} template(s), nothing to choose from")
                continue
            fields = set(itertools.chain.from_iterable(template.placeholders() for template in kept))
            first = _drawn(list(train.examples()), _TRAIN_ROWS, f"{name} {split}")
            last = _drawn(list(test.examples()), rows, f"{name} validation")
            examples = [_with_fields(example, fields) for example in (*first, *last)]
            if any(example.options is None for example in examples):
                leave_out(train.task_id, "rows without options")
                continue
            pool = ExamplePool.from_examples(train.task_id, examples, kept, tokenizer, max_input_tokens=encoder_length)
            yield pool, np.arange(len(first), len(examples))


def _only(folder: Path, name: str) -> Path:
    """A folder with one template file."""
    single = Path(tempfile.mkdtemp(prefix="templates-"))
    (single / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return single


def _with_fields(example: Example, names: set[str]) -> Example:
    return dataclasses.replace(example, fields={name: text for name, text in example.fields.items() if name in names})


def real_pools(
    folder: Path,
    tokenizer: TextTokenizer,
    *,
    count: int,
    kind: str,
    rows: int,
    seed: int,
    encoder_length: int,
    leave_out: LeaveOut,
) -> Iterator[Found]:
    """Held-out tasks with options (8 at most) or short free answers and at least 192 distinct inputs, without T0's.

    Args:
        folder: With ``heldout.parquet`` and ``tasks.jsonl``.
        tokenizer: The model's.
        count: Tasks, drawn by seed, at most 4 of a benchmark.
        kind: ``"all"``, or ``"choice"`` for those with options alone.
        rows: Most rows a task.
        seed: Of the draw.
        encoder_length: Longer fields lose their end.
        leave_out: Told of the tasks that were drawn and cannot be searched.
    """
    tasks = [task for task in parquet_tasks(folder, splits=("heldout",), num_tasks=None) if task.benchmark != "t0"]
    random.Random(f"{seed} tasks").shuffle(tasks)
    taken: dict[str, int] = {}
    chosen: list[ExamplePool] = []
    for task in tasks:
        source = task.task_id.partition("/")[0]
        if source == "t0" or taken.get(source, 0) >= 4 or len(chosen) == count:
            continue
        try:
            pool = _real_pool(task, tokenizer, kind=kind, rows=rows, encoder_length=encoder_length)
        except (PoolError, TaskError) as error:
            leave_out(task.task_id, str(error))
            continue
        taken[source] = taken.get(source, 0) + 1
        chosen.append(pool)
    for pool in sorted(chosen, key=lambda pool: pool.name):
        yield pool, None


def _real_pool(task: Task, tokenizer: TextTokenizer, *, kind: str, rows: int, encoder_length: int) -> ExamplePool:
    """A task's rows.

    Raises:
        PoolError: It is not of the kind that is searched.
    """
    examples = list(task.examples())
    is_choice = [example.options is not None for example in examples]
    if any(is_choice) != all(is_choice) or (kind == "choice" and not any(is_choice)):
        raise PoolError(f"{sum(is_choice)} of {len(examples)} rows have options")
    sizes = {len(example.options) for example in examples if example.options is not None} or {2}
    if max(sizes) > _MOST_OPTIONS or min(sizes) < 2:
        raise PoolError(f"{min(sizes)} to {max(sizes)} options; wanted are 2 to {_MOST_OPTIONS}")
    if len(examples) < _FEWEST_ROWS or len({example.outputs[0] for example in examples}) < 2:
        raise PoolError(f"{len(examples)} rows, fewer than {_FEWEST_ROWS}, or one answer to all of them")
    drawn = _drawn(examples, rows, task.task_id)
    pool = ExamplePool.from_examples(
        task.task_id, drawn, task.templates, tokenizer, metric=task.metric, max_input_tokens=encoder_length
    )
    # Long inputs that begin alike are one input when their ends are cut.
    if len(set(pool.input_keys())) < _FEWEST_ROWS:
        raise PoolError(f"{len(set(pool.input_keys()))} distinct inputs, fewer than {_FEWEST_ROWS}")
    if pool.kind == "generation":
        first = pool.first_piece + len(pool.fields)
        longest = int(np.diff(pool.offsets)[first].max())
        if longest > _LONGEST_ANSWER:
            raise PoolError(f"answers of up to {longest} tokens; generating more than {_LONGEST_ANSWER} takes too long")
    return pool
