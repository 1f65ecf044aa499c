# SPDX-License-Identifier: Apache-2.0
r"""How prompts change: small operators with weights, and one batched call of each text model a generation.

An :class:`Operator` is a name, a number of parents, the text model that it needs (if any), and a pure function of
(parents, material, random generator). It gives a child, nothing where it does not apply, or a :class:`Pending` child
that waits for text. :class:`OperatorSet` draws one operator a couple by weight, collects what all couples of a
generation ask of each text model, calls every model once, and finishes the children. GPS (arXiv 2210.17041) has
sentence continuation, back-translation and cloze; GrIPS (arXiv 2203.07281) the edits of phrases; the exchange of slots,
also with similar tasks, needs a typed genome.

==================== ======= ===================================================================================
name                 parents what it does
==================== ======= ===================================================================================
crossover            2       every slot from one of the parents
delete_phrase        1       leaves out a phrase of some literal text
swap_phrases         1       exchanges two phrases
duplicate_phrase     1       writes a phrase twice
reinsert_phrase      1       puts in a phrase of one of the task's first prompts
borrow_slot          1       takes a slot from a prompt of a similar task
change_verbalizer    1       takes other words for the labels
change_option_order  1       given, reversed, or shuffled anew
change_soft_prompt   1       takes another source of soft prompts
infill_span          1       lets the model fill a gap in literal text (or write something into it)
continue_sentence    1       writes the longest literal text anew by continuation (GPS)
back_translate       1       writes it anew by translating it there and back
==================== ======= ===================================================================================

Every operator takes its random numbers from the :class:`random.Random` it is given: DEAP's own operators use the global
one, so two searches in a process would disturb each other. Cost: 110 microseconds a child without
text models (one core).
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from lightning_zeroprompt.data.task import OPTIONS
from lightning_zeroprompt.prompts.genome import LiteralPart, PromptGenome
from lightning_zeroprompt.prompts.phrases import Phrases, split_phrases

__all__ = [
    "DEFAULT_WEIGHTS",
    "OPERATORS",
    "Candidate",
    "Couple",
    "Material",
    "Operator",
    "OperatorSet",
    "Pending",
    "TextGenerator",
    "TextRequest",
]

_SEEDS = 10_000
_QUOTES = "\"'\u201c\u201d\u2018\u2019\u00ab\u00bb"


@dataclasses.dataclass(frozen=True, slots=True)
class TextRequest:
    """What a text model is asked for.

    Attributes:
        text: The text to write anew; or what stands before the gap to fill.
        behind: What stands behind the gap.
    """

    text: str
    behind: str = ""


class TextGenerator(Protocol):
    """A text model: a pure function of its weights, the requests and the seed."""

    def __call__(self, requests: Sequence[TextRequest], *, seed: int) -> list[list[str]]:
        """For every request, usable texts, best first; empty where the model found none."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What the operators may draw from, for one task.

    Attributes:
        founders: The task's first prompts, source of phrases to put in.
        donors: Prompts of similar tasks, nearest first.
        verbalizers: Words for the labels to choose from; None stands for the task's own.
        soft_prompts: Sources of soft prompts to choose from.
        has_options: Whether the task's examples have options to show.
    """

    founders: tuple[PromptGenome, ...] = ()
    donors: tuple[PromptGenome, ...] = ()
    verbalizers: tuple[tuple[str, ...] | None, ...] = ()
    soft_prompts: tuple[str, ...] = ()
    has_options: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A child that waits for text.

    Attributes:
        request: What to ask the operator's text model.
        finish: Makes the child from one of the texts.
    """

    request: TextRequest
    finish: Callable[[str], PromptGenome]


Change = Callable[[Sequence[PromptGenome], Material, random.Random], PromptGenome | Pending | None]
"""What an operator does; None where it does not apply to these parents."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """One way to make a child.

    Attributes:
        name: In weights, lineages and reports.
        arity: Number of parents that it reads.
        change: What it does.
        needs_model: Name of the text model that it asks; empty for none.
    """

    name: str
    arity: int
    change: Change
    needs_model: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt with its origin.

    Attributes:
        genome: The prompt.
        origin: The operator, or for a first prompt where it comes from.
        parents: Fingerprints of the prompts that it was made from.
    """

    genome: PromptGenome
    origin: str
    parents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Couple:
    """Chosen parents and their task's material.

    Attributes:
        parents: At least one; an operator with fewer parents reads the first ones.
        material: Of the parents' task.
    """

    parents: tuple[PromptGenome, ...]
    material: Material


_GENES = tuple(field.name for field in dataclasses.fields(PromptGenome))


def _replaced(genome: PromptGenome, changes: Mapping[str, Any]) -> PromptGenome:
    return dataclasses.replace(genome, **changes)


def _crossover(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    mother, father = parents
    differing = [name for name in _GENES if getattr(mother, name) != getattr(father, name)]
    if len(differing) < 2:
        return None
    # At least one slot and not all of them, or the child would be one of its parents.
    taken = rng.sample(differing, rng.randint(1, len(differing) - 1))
    return _replaced(mother, {name: getattr(father, name) for name in taken})


def _phrased(genome: PromptGenome, least: int) -> list[tuple[LiteralPart, Phrases]]:
    """Literal parts of at least so many phrases."""
    cut = [(part, split_phrases(part.text)) for part in genome.literals()]
    return [(part, phrases) for part, phrases in cut if len(phrases) >= least]


def _choose(genome: PromptGenome, rng: random.Random, least: int) -> tuple[LiteralPart, Phrases] | None:
    """One literal part of at least so many phrases, each as likely as it has phrases."""
    parts = _phrased(genome, least)
    return rng.choices(parts, [len(phrases) for _, phrases in parts])[0] if parts else None


def _delete_phrase(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    chosen = _choose(parents[0], rng, 2)
    if chosen is None:
        return None
    part, phrases = chosen
    return parents[0].with_literal(part, phrases.without(rng.randrange(len(phrases))))


def _swap_phrases(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    chosen = _choose(parents[0], rng, 2)
    if chosen is None:
        return None
    part, phrases = chosen
    return parents[0].with_literal(part, phrases.swapped(*rng.sample(range(len(phrases)), 2)))


def _duplicate_phrase(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    chosen = _choose(parents[0], rng, 1)
    if chosen is None:
        return None
    part, phrases = chosen
    return parents[0].with_literal(part, phrases.inserted(rng.choice(phrases.parts), rng.randint(0, len(phrases))))


def _reinsert_phrase(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    chosen = _choose(parents[0], rng, 1)
    there = {phrase for _, own in _phrased(parents[0], 1) for phrase in own.parts}
    founders = (phrases.parts for founder in material.founders for _, phrases in _phrased(founder, 1))
    missing = [phrase for phrase in dict.fromkeys(itertools.chain.from_iterable(founders)) if phrase not in there]
    if chosen is None or not missing:
        return None
    part, phrases = chosen
    return parents[0].with_literal(part, phrases.inserted(rng.choice(missing), rng.randint(0, len(phrases))))


def _borrow_slot(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    genome = parents[0]
    if not material.donors:
        return None
    donor = rng.choice(material.donors)
    # Another filled instruction or cue reads differently; of another layout or frame only the whole text says.
    loans: list[dict[str, Any]] = [
        {name: value}
        for name in ("instruction", "answer_cue")
        if (value := getattr(donor, name)) and value != getattr(genome, name)
    ]
    wide: list[dict[str, Any]] = [{"layout": donor.layout}] if donor.layout != genome.layout else []
    has_frame = bool(donor.option_frame and donor.option_separator)
    if material.has_options and has_frame and donor.option_frame != genome.option_frame:
        wide.append({"option_frame": donor.option_frame, "option_separator": donor.option_separator})
    loans += [loan for loan in wide if _replaced(genome, loan).text != genome.text]
    return _replaced(genome, rng.choice(loans)) if loans else None


def _change_verbalizer(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    others = [words for words in dict.fromkeys(material.verbalizers) if words != parents[0].verbalizer]
    return _replaced(parents[0], {"verbalizer": rng.choice(others)}) if others else None


def _change_option_order(
    parents: Sequence[PromptGenome], material: Material, rng: random.Random
) -> PromptGenome | None:
    genome = parents[0]
    if OPTIONS not in genome.placeholders():
        return None
    orders = ("given", "reversed", f"shuffled:{rng.randrange(_SEEDS)}")
    return _replaced(genome, {"option_order": rng.choice([order for order in orders if order != genome.option_order])})


def _change_soft_prompt(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> PromptGenome | None:
    others = [source for source in dict.fromkeys(material.soft_prompts) if source != parents[0].soft_prompt]
    return _replaced(parents[0], {"soft_prompt": rng.choice(others)}) if others else None


def _infill_span(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> Pending | None:
    chosen = _choose(parents[0], rng, 1)
    if chosen is None:
        return None
    part, phrases = chosen
    # A text of one phrase keeps it: a gap that is all there is says nothing about what to write.
    first = rng.randint(0, len(phrases))
    if len(phrases) > 1 and first < len(phrases) and rng.random() < 0.5:
        before, behind = phrases.around(first, first + 1)
    else:
        before, behind = phrases.opened(first)

    def finish(text: str) -> PromptGenome:
        return parents[0].with_literal(part, before + text + behind)

    return Pending(TextRequest(before, behind), finish)


def _rewrite(parents: Sequence[PromptGenome], material: Material, rng: random.Random) -> Pending | None:
    genome = parents[0]
    if not genome.literals():
        return None
    # Most words say what to do, also where that stands between placeholders.
    part = max(genome.literals(), key=lambda part: len(part.text.split()))
    core = part.text.strip().strip(_QUOTES).strip()
    if not core:
        return None
    lead, _, tail = part.text.partition(core)

    def finish(text: str) -> PromptGenome:
        return genome.with_literal(part, lead + text + tail)

    return Pending(TextRequest(core), finish)


OPERATORS: tuple[Operator, ...] = (
    Operator("crossover", 2, _crossover),
    Operator("delete_phrase", 1, _delete_phrase),
    Operator("swap_phrases", 1, _swap_phrases),
    Operator("duplicate_phrase", 1, _duplicate_phrase),
    Operator("reinsert_phrase", 1, _reinsert_phrase),
    Operator("borrow_slot", 1, _borrow_slot),
    Operator("change_verbalizer", 1, _change_verbalizer),
    Operator("change_option_order", 1, _change_option_order),
    Operator("change_soft_prompt", 1, _change_soft_prompt),
    Operator("infill_span", 1, _infill_span, "infilling"),
    Operator("continue_sentence", 1, _rewrite, "continuation"),
    Operator("back_translate", 1, _rewrite, "back_translation"),
)
"""All operators."""

DEFAULT_WEIGHTS: dict[str, float] = {
    "crossover": 4.0,
    "delete_phrase": 1.0,
    "swap_phrases": 1.0,
    "duplicate_phrase": 0.5,
    "reinsert_phrase": 1.0,
    "borrow_slot": 2.0,
    "change_verbalizer": 0.5,
    "change_option_order": 0.5,
    "change_soft_prompt": 0.5,
    "infill_span": 1.0,
}
"""Weights without a second model; ``infill_span`` asks the model that is being trained."""


class OperatorSet:
    """Operators with weights and the text models that they ask.

    Args:
        weights: Operator name to weight; operators that are not named have weight 0.
        generators: Text models by the names that operators need: ``"infilling"``, ``"continuation"``,
            ``"back_translation"``.
        operators: The operators there are; more than :data:`OPERATORS` for one's own.

    Raises:
        ValueError: An unknown name, a negative weight, no weight above 0, two operators of one name, or an operator
            with weight whose text model is missing.
    """

    def __init__(
        self,
        weights: Mapping[str, float] = DEFAULT_WEIGHTS,
        *,
        generators: Mapping[str, TextGenerator] | None = None,
        operators: Collection[Operator] = OPERATORS,
    ) -> None:
        names = [operator.name for operator in operators]
        if len(set(names)) < len(names):
            raise ValueError(f"two operators have one name: {sorted(names)}")
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ValueError(f"unknown operators {', '.join(unknown)}; there are: {', '.join(names)}")
        refused = {name: weight for name, weight in weights.items() if not 0 <= weight < float("inf")}
        if refused:
            raise ValueError(f"operator weights {refused}: a weight is a number of at least 0")
        if not any(weights.values()):
            raise ValueError(f"no operator has a weight above 0; give some of {', '.join(names)} a weight")
        self._generators = dict(generators or {})
        self._operators = tuple(operator for operator in operators if weights.get(operator.name, 0) > 0)
        self._weights = [float(weights[operator.name]) for operator in self._operators]
        for operator in self._operators:
            if operator.needs_model and operator.needs_model not in self._generators:
                raise ValueError(
                    f"operator {operator.name!r} has the weight {weights[operator.name]} but needs a text model for "
                    f"{operator.needs_model!r}; name one, or give the operator the weight 0"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Operators with a weight above 0."""
        return tuple(operator.name for operator in self._operators)

    def breed(self, couples: Sequence[Couple], rng: random.Random) -> list[Candidate | None]:
        """One child of every couple; each text model is called at most once.

        An operator that does not apply to a couple, or leaves the prompt reading as a parent does, gives way to another
        one, drawn by the weights that are left.

        Args:
            couples: Chosen parents, of any tasks.
            rng: Every random decision; the seeds of text models too.

        Returns:
            A child for each couple, None where no operator applies or the text model found nothing usable. It has been
            compared with its parents, not checked for length (:meth:`PromptGenome.check`).
        """
        children: list[Candidate | None] = [None] * len(couples)
        waiting: dict[str, list[tuple[int, Operator, Pending]]] = {}
        for index, couple in enumerate(couples):
            operator, change = self._draw(couple, rng)
            if isinstance(change, PromptGenome):
                children[index] = _candidate(change, operator, couple)
            elif change is not None:
                waiting.setdefault(operator.needs_model, []).append((index, operator, change))
        for model in sorted(waiting):
            requests = [pending.request for _, _, pending in waiting[model]]
            texts = self._generators[model](requests, seed=rng.getrandbits(63))
            for (index, operator, pending), found in zip(waiting[model], texts, strict=True):
                parents = _parent_fingerprints(couples[index])
                usable = (pending.finish(text) for text in found if text.strip())
                child = next((genome for genome in usable if genome.fingerprint not in parents), None)
                children[index] = None if child is None else _candidate(child, operator, couples[index])
        return children

    def _draw(self, couple: Couple, rng: random.Random) -> tuple[Operator, PromptGenome | Pending | None]:
        parents = _parent_fingerprints(couple)
        operators, weights = list(self._operators), list(self._weights)
        while True:
            place = rng.choices(range(len(operators)), weights)[0]
            operator = operators.pop(place)
            weights.pop(place)
            if operator.arity <= len(couple.parents):
                change = operator.change(couple.parents[: operator.arity], couple.material, rng)
                if isinstance(change, Pending) or (change is not None and change.fingerprint not in parents):
                    return operator, change
            if not operators:
                return operator, None


def _parent_fingerprints(couple: Couple) -> set[str]:
    return {parent.fingerprint for parent in couple.parents}


def _candidate(genome: PromptGenome, operator: Operator, couple: Couple) -> Candidate:
    read = couple.parents[: operator.arity]
    return Candidate(genome, operator.name, tuple(parent.fingerprint for parent in read))
