# SPDX-License-Identifier: Apache-2.0
"""What a corpus, and a choice of its tasks, holds: the counts that every program prints, in words."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo

if TYPE_CHECKING:
    from lightning_zeroprompt.data.task import Task

__all__ = ["corpus_summary", "folder_size", "task_counts", "training_summary"]


def folder_size(corpus: Corpus) -> str:
    """Size of the compiled folder on disk, in MiB."""
    return f"{sum(file.stat().st_size for file in corpus.path.iterdir()) / 2**20:.1f} MiB"


def task_counts(tasks: "Iterable[TaskInfo | Task]") -> str:
    """Training tasks and families, how many of them the extra tier adds, and held-out tasks.

    Args:
        tasks: Of a source or of a corpus.
    """
    train, heldout = [], 0
    for task in tasks:
        if task.role == "train":
            train.append(task)
        else:
            heldout += 1
    core = {task.family for task in train if task.tier == 0}
    extra = [task for task in train if task.tier > 0]
    text = f"{len(train):,} training tasks ({len({task.family for task in train}):,} families)"
    if extra:
        text += f", {len(extra):,} of them beyond the core with {len({t.family for t in extra} - core):,} new families"
    return f"{text}, {heldout:,} held out"


def corpus_summary(corpus: Corpus) -> str:
    """Two lines: what the corpus holds, and what was cut, dropped and left out when it was compiled.

    Args:
        corpus: An opened corpus.
    """
    counts = corpus.counts
    return (
        f"{corpus.path}: {counts['tasks']:,} tasks, {counts['rows']:,} rows, {counts['tokens']:,} tokens, "
        f"{folder_size(corpus)}; {task_counts(corpus.tasks)}\n"
        f"inputs cut to {corpus.settings['max_input_tokens']:,} tokens in {counts['truncated']:,} rows; dropped "
        f"{counts['dropped']:,}; left out by caps {counts['capped']:,}; fingerprint {corpus.fingerprint[:16]}"
    )


def training_summary(corpus: Corpus, chosen: Iterable[int], candidates: Iterable[int], heldout: Iterable[int]) -> str:
    """One line: the chosen training tasks, and how many training tasks share a family with held-out ones.

    Args:
        corpus: An opened corpus.
        chosen: Indices of the chosen training tasks.
        candidates: Indices of the tasks that they were chosen from; with ``heldout`` what
            :func:`~lightning_zeroprompt.data.evaluation_plan.split_tasks` returns.
        heldout: Indices of the held-out tasks.
    """
    held = set(heldout)
    kept = held | set(candidates)
    dropped = sum(task.role == "train" and task.index not in kept for task in corpus.tasks)
    train = task_counts(corpus.tasks[index] for index in chosen).removesuffix(", 0 held out")
    text = f"training on {train}; {len(held):,} tasks held out"
    return f"{text}; {dropped:,} training tasks of held-out families dropped" if dropped else text
