# SPDX-License-Identifier: Apache-2.0
"""SearchProblem: one task as a prompt search sees it: three disjoint pools, first prompts, and what operators may use.

A problem is made before any model is asked, from a task of a compiled corpus or from examples of one's own, so that
whatever is wrong with the data is said before the search. It never changes.

The search part is put in an order in which every prefix holds the labels in equal numbers, as far as they go: the first
block of a race decides about most candidates, and rows of a corpus often lie label by label.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo
from lightning_zeroprompt.data.permutation import permute, stream_key
from lightning_zeroprompt.data.task import PromptTemplate
from lightning_zeroprompt.prompts.neighbours import (
    Neighbour,
    TaskProfile,
    nearest_tasks,
    profile_corpus_task,
    profile_examples,
)
from lightning_zeroprompt.prompts.operators import Candidate, Material
from lightning_zeroprompt.prompts.parts import CONFIRM_SHARE, Mode, Parts, choose_parts
from lightning_zeroprompt.prompts.pool import UNLABELLED, ExamplePool
from lightning_zeroprompt.prompts.population import gather_donors, gather_material, start_population

__all__ = [
    "Donors",
    "SearchProblem",
    "build_problem",
    "corpus_donors",
    "corpus_pool",
    "heldout_tasks",
    "named_tasks",
    "rows_fingerprint",
]

_PROFILED = 16


def heldout_tasks(corpus: Corpus, trained: Sequence[TaskInfo]) -> list[TaskInfo]:
    """Tasks of a corpus that share neither id nor family with what was trained on.

    Args:
        corpus: The corpus to search in.
        trained: Training tasks, of this corpus or another one.
    """
    ids, families = {task.task_id for task in trained}, {task.family for task in trained}
    return [task for task in corpus.tasks if task.task_id not in ids and task.family not in families]


def named_tasks(corpus: Corpus, heldout: Sequence[TaskInfo], names: Sequence[str]) -> list[TaskInfo]:
    """Held-out tasks by their ids.

    Args:
        corpus: Where they are.
        heldout: Of :func:`heldout_tasks`.
        names: Ids.

    Raises:
        ValueError: One is unknown or not held out.
    """
    known = {task.task_id: task for task in heldout}
    missing = [name for name in names if name not in known]
    if missing:
        is_there = any(task.task_id == missing[0] for task in corpus.tasks)
        why = "is trained on, or shares a family with a task that is" if is_there else "is unknown"
        raise ValueError(
            f"task {missing[0]!r} {why}; {len(known)} tasks of {corpus.path} are held out, such as {sorted(known)[:3]}"
        )
    return [known[name] for name in names]


def corpus_pool(corpus: Corpus, task: TaskInfo, wordings: str = "all") -> ExamplePool:
    """All rows of a corpus' task, with its templates of a role as the manual prompts.

    Args:
        corpus: Where it is.
        task: The task.
        wordings: ``"train"``, ``"heldout"`` or ``"all"``.
    """
    pool = ExamplePool.from_corpus(corpus, task)
    kept = tuple(template for template in pool.templates if wordings in ("all", template.role))
    return dataclasses.replace(pool, templates=kept)


@dataclasses.dataclass(frozen=True, slots=True)
class Donors:
    """Tasks of a corpus that may lend their prompts; profiled once for any number of problems.

    Attributes:
        corpus: Where they are.
        profiles: What they are compared by.
        indices: Task id to index in the corpus.
    """

    corpus: Corpus
    profiles: tuple[TaskProfile, ...]
    indices: dict[str, int]

    def prompts(self, tasks: Sequence[Neighbour]) -> list[Candidate]:
        """Prompts of some of the tasks, in their order, first templates before second ones."""
        return gather_donors({near.task_id: _templates(self.corpus, self.indices[near.task_id]) for near in tasks})

    def nearest(self, pool: ExamplePool, count: int) -> list[Neighbour]:
        """The tasks nearest to a pool's, the nearest first; no labels are read.

        Args:
            pool: Examples to compare by.
            count: How many; 0 for none.
        """
        if not count or not self.profiles:
            return []
        examples = [pool.example(row) for row in range(min(len(pool), _PROFILED))]
        # Only the length of an answer is read, and that of an option will do where the answer is not known.
        filled = [e if e.outputs else dataclasses.replace(e, outputs=(e.options or ("",))[:1]) for e in examples]
        target = profile_examples(pool.name, filled, [template.instruction for template in pool.templates])
        return nearest_tasks(target, self.profiles, count)


def corpus_donors(corpus: Corpus, indices: Sequence[int]) -> Donors:
    """Profile tasks of a corpus, such as those that were trained on.

    Args:
        corpus: A compiled corpus.
        indices: Of the tasks.
    """
    profiles = tuple(profile_corpus_task(corpus, index, num_examples=_PROFILED) for index in indices)
    return Donors(corpus, profiles, {corpus.tasks[index].task_id: index for index in indices})


def _templates(corpus: Corpus, index: int) -> tuple[PromptTemplate, ...]:
    task = corpus.tasks[index]
    return ExamplePool.from_corpus(corpus, task, [task.first_row]).templates


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchProblem:
    """A task to search prompts for.

    Attributes:
        name: The task.
        parts: Which rows of the task's pool the three pools hold.
        search: Prompts are chosen on it; labels are known, or in mode ``zero_label`` not.
        confirm: The choice is checked on it; labels as for ``search``.
        test: Scored once; with its true labels.
        start: First prompts, the manual ones first.
        num_manual: How many of them are the task's own.
        material: What the operators may draw from.
    """

    name: str
    parts: Parts
    search: ExamplePool
    confirm: ExamplePool
    test: ExamplePool
    start: tuple[Candidate, ...]
    num_manual: int
    material: Material

    @property
    def manual(self) -> tuple[Candidate, ...]:
        """The task's own prompts."""
        return self.start[: self.num_manual]

    def fingerprint(self) -> str:
        """Sha256 hex of rows, mode and first prompts: a saved search goes on only with the same ones."""
        parts = {name: getattr(self.parts, name).tolist() for name in ("search", "confirm", "test")}
        keys = [key.hex() for pool in (self.search, self.confirm, self.test) for key in pool.input_keys()]
        prompts = [candidate.genome.fingerprint for candidate in self.start]
        record = [self.name, self.parts.mode, self.parts.k, self.parts.seed, parts, keys, prompts]
        return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def rows_fingerprint(pool: ExamplePool) -> str:
    """Sha256 hex of a pool's inputs in their order."""
    return hashlib.sha256(b"".join(pool.input_keys())).hexdigest()


def build_problem(
    pool: ExamplePool,
    donors: Donors | None = None,
    *,
    population: int = 32,
    mode: Mode = "few_label",
    k: int | None = 64,
    seed: int = 0,
    neighbours: int = 8,
    test_rows: Sequence[int] | npt.NDArray[np.int64] | None = None,
    soft_prompts: Sequence[str] = (),
    lend_soft_prompts: bool = False,
    confirm_share: float = CONFIRM_SHARE,
) -> SearchProblem:
    """Cut a task into parts and gather its first prompts.

    Args:
        pool: All rows of the task, with its manual prompts.
        donors: Tasks that may lend prompts.
        population: First prompts to reach; the task's own are always all there.
        mode: What the search may know of the answers.
        k: Rows of search and confirm together (:func:`~lightning_zeroprompt.prompts.parts.choose_parts`).
        seed: Of the parts.
        neighbours: Nearest tasks that lend their prompts.
        test_rows: The test part, where it comes from another source.
        soft_prompts: Sources of soft prompts to choose from, beside the run's default.
        lend_soft_prompts: Whether the nearest tasks, by their ids, are such sources too.
        confirm_share: Share of k that is kept for the confirmation.

    Raises:
        PoolError: The pool cannot be cut so.
        TaskError: A template does not parse.
        ValueError: A number out of range.
    """
    if population < 2 or neighbours < 0:
        raise ValueError(f"population={population} has to be at least 2 and neighbours={neighbours} at least 0")
    parts = choose_parts(pool, mode=mode, k=k, seed=seed, confirm_share=confirm_share, test_rows=test_rows)
    hidden = pool if mode != "zero_label" else pool.with_labels(np.full(len(pool), UNLABELLED))
    ordered = parts.search[_balanced(hidden.label[parts.search], seed)]
    search = hidden.select(ordered)
    tasks = [] if donors is None else donors.nearest(search, neighbours)
    near = [] if donors is None else donors.prompts(tasks)
    sources = [*soft_prompts, *(task.task_id for task in tasks if lend_soft_prompts)]
    start = start_population(pool.templates, near, population)
    own = [candidate for candidate in start if candidate.origin.startswith("template ")]
    has_options = pool.kind == "choice"
    material = gather_material(
        own, near, labels=pool.labels, soft_prompts=["", *sources] if sources else (), has_options=has_options
    )
    return SearchProblem(
        name=pool.name,
        parts=parts,
        search=search,
        confirm=hidden.select(parts.confirm),
        test=pool.select(parts.test),
        start=tuple(start),
        num_manual=len(own),
        material=material,
    )


def _balanced(labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """An order in which every prefix has each label equally often, as long as it lasts."""
    order = permute(len(labels), stream_key(seed, "search order"), np.arange(len(labels)))
    groups = [order[labels[order] == label].tolist() for label in np.unique(labels).tolist()]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return np.array([row for row in mixed if row is not None], dtype=np.int64)
