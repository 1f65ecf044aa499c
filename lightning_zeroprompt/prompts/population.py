# SPDX-License-Identifier: Apache-2.0
"""What a search starts from: the task's own templates, instructions of the nearest tasks, and what operators may use.

GPS (arXiv 2210.17041) starts from the hand-written templates alone, and so has nothing to search where a task has one
or two. Here the instructions of the nearest training tasks come in as well, each in a frame of the task's own, so that
fields and options stand where the task's author put them.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from lightning_zeroprompt.data.task import PromptTemplate, TaskError
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.operators import Candidate, Material

__all__ = ["gather_donors", "gather_material", "start_population"]


def gather_donors(templates: Mapping[str, Sequence[PromptTemplate]]) -> list[Candidate]:
    """Prompts of similar tasks, the nearest tasks' first templates before any second ones.

    Args:
        templates: Task id to templates, nearest task first (:func:`~lightning_zeroprompt.prompts.neighbours.
            nearest_tasks`); held-out wordings are passed over.

    Returns:
        Prompts whose origin is the task's id; of two that read the same, the first.

    Raises:
        TaskError: A template does not parse.
    """
    columns = [
        [Candidate(PromptGenome.from_template(t), task_id) for t in listed if t.role == "train"]
        for task_id, listed in templates.items()
    ]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return _distinct(candidate for candidate in mixed if candidate is not None)


def start_population(
    templates: Sequence[PromptTemplate], donors: Sequence[Candidate], size: int, *, soft_prompt: str = ""
) -> list[Candidate]:
    """First prompts of a search.

    Args:
        templates: The task's own; all of them are kept, also above ``size``, since the result is compared with them.
        donors: Prompts of similar tasks, nearest first; each gives its instruction to one of the own frames, in turn.
        size: Number of prompts to reach; fewer where the donors do not suffice.
        soft_prompt: Source of soft prompts of all of them.

    Returns:
        Prompts that read differently, the task's own first (origin ``"template NAME"``), then ``"instruction of
        TASK"`` with the frame's prompt as the parent.

    Raises:
        TaskError: The task has no template, or one does not parse.
        ValueError: ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size={size}: a population needs one prompt at least")
    if not templates:
        raise TaskError("the task has no template to start from; give one at least, such as '{input}'")
    own = _distinct(
        Candidate(PromptGenome.from_template(template, soft_prompt=soft_prompt), f"template {template.name}")
        for template in templates
    )
    nearest: dict[str, Candidate] = {}
    for donor in donors:
        if donor.genome.instruction.strip():
            nearest.setdefault(donor.genome.instruction, donor)
    lent = [
        Candidate(
            dataclasses.replace(frame.genome, instruction=donor.genome.instruction),
            f"instruction of {donor.origin}",
            (frame.genome.fingerprint,),
        )
        for donor, frame in zip(nearest.values(), itertools.cycle(own), strict=False)
    ]
    return [*own, *_distinct([*own, *lent])[len(own) :][: max(size - len(own), 0)]]


def gather_material(
    own: Sequence[Candidate],
    donors: Sequence[Candidate],
    *,
    labels: Sequence[str] | None = None,
    soft_prompts: Sequence[str] = (),
    has_options: bool = False,
) -> Material:
    """What operators may draw from for one task.

    Args:
        own: The task's own prompts.
        donors: Prompts of similar tasks, nearest first.
        labels: The task's closed label set, or None. Verbalizers to choose from are the labels, the own prompts'
            verbalizers, and each of them in small letters and with a capital.
        soft_prompts: Sources to choose from.
        has_options: Whether the task's examples have options.
    """
    verbalizers: list[tuple[str, ...] | None] = []
    if labels is not None:
        written = [tuple(labels), *(c.genome.verbalizer for c in own if c.genome.verbalizer is not None)]
        cased = [
            words
            for given in written
            for words in (given, tuple(w.lower() for w in given), tuple(w[:1].upper() + w[1:] for w in given))
        ]
        fitting = [words for words in cased if len(set(words)) == len(labels) and words != tuple(labels)]
        verbalizers = [None, *dict.fromkeys(fitting)]
    return Material(
        founders=tuple(candidate.genome for candidate in own),
        donors=tuple(donor.genome for donor in donors),
        verbalizers=tuple(verbalizers),
        soft_prompts=tuple(soft_prompts),
        has_options=has_options,
    )


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of those that read the same."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.genome.fingerprint, candidate)
    return list(found.values())
