# SPDX-License-Identifier: Apache-2.0
"""The text operations of the built-in tasks: what each asks of a scene, in which answer forms, at which list lengths.

An operation is a pure function from a scene to its answer, or to None where the scene does not define one (the word
after the last word); such scenes are drawn again. Distractors of the multiple-choice form come from the same list where
the list has them, so that "some word of the input" is no better than chance. ``stage`` orders operations by how soon a
model of 0.2 million parameters learns them, measured, not guessed: copying and position first, then aggregation and
membership, then everything else.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from lightning_zeroprompt.data.sources.builtin_scenes import Scene
from lightning_zeroprompt.data.sources.builtin_words import DAYS, DOMAINS, LABEL_PAIRS, MONTHS, NAMES, NUMBERS

__all__ = ["OPERATIONS", "Answer", "Form", "Operation", "Wrong", "rule_labels"]

Form = Literal["free", "options", "verify"]
"""Answer forms: a free answer, a choice from three options, or yes / no about a proposed answer."""
Answer = Callable[[Scene, str], str | None]
"""(scene, domain of the task) -> answer."""
Wrong = Callable[[Scene, str], tuple[str, ...]]
"""(scene, domain of the task) -> words to draw wrong options from; the right answer may be among them."""

_ALL = tuple(DOMAINS)
_FEW = _ALL[:4]
_EVEN = _ALL[::2]
_NUMBER = ("number",)
_DATES = ("day", "month")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One text operation.

    Attributes:
        name: Unique; the first part of a task's id.
        category: Task type of its free and multiple-choice tasks (``verify`` tasks are all in "verification").
        sampler: Name of the input distribution.
        answer: The right answer.
        wrong: Where wrong options come from.
        lengths: List lengths; each makes its own tasks.
        forms: Answer forms; each makes its own tasks.
        variants: Variants of the sampler; each makes its own tasks.
        domains: Content domains; each makes its own tasks.
        stage: 0, 1 or 2: when a curriculum lets it in.
    """

    name: str
    category: str
    sampler: str
    answer: Answer
    wrong: Wrong
    stage: int
    lengths: tuple[int, ...] = (3, 4)
    forms: tuple[Form, ...] = ("free", "options")
    variants: tuple[int, ...] = (0,)
    domains: tuple[str, ...] = _ALL


def _from_list(scene: Scene, domain: str) -> tuple[str, ...]:
    """The list's own words; strangers only where the list has fewer than three different ones."""
    words = tuple(dict.fromkeys(scene.items))
    return words if len(words) >= 3 else (*words, *scene.outside[: 3 - len(words)])


def _from_names(scene: Scene, domain: str) -> tuple[str, ...]:
    return (*scene.keys, *[name for name in NAMES if name not in scene.keys])[:3]


def _from_amounts(scene: Scene, domain: str) -> tuple[str, ...]:
    return (*scene.keys, *[number for number in NUMBERS if number not in scene.keys])[:3]


def _from_kinds(scene: Scene, domain: str) -> tuple[str, ...]:
    """The kinds in the list, and one that no list with words of the task's domain and one other kind has."""
    return (*dict.fromkeys(scene.kinds), _ALL[(_ALL.index(domain) + 3) % len(_ALL)])


def _from_outside(scene: Scene, domain: str) -> tuple[str, ...]:
    return scene.outside


def _from_counts(scene: Scene, domain: str) -> tuple[str, ...]:
    return NUMBERS[:5]


def _from_numbers(scene: Scene, domain: str) -> tuple[str, ...]:
    return NUMBERS


def _from_dates(scene: Scene, domain: str) -> tuple[str, ...]:
    return DAYS if domain == "day" else MONTHS


def _from_query(scene: Scene, domain: str) -> tuple[str, ...]:
    """The second list, and one word that only the first list has."""
    return (*scene.query, next(word for word in scene.items if word not in scene.query))


def _join(words: tuple[str, ...]) -> str:
    return " ".join(words)


def _at(position: int) -> Answer:
    return lambda scene, domain: scene.items[position]


def _part(start: int | None, stop: int | None, step: int | None = None) -> Answer:
    return lambda scene, domain: _join(scene.items[start:stop:step])


def _beside(step: int) -> Answer:
    def answer(scene: Scene, domain: str) -> str | None:
        position = scene.items.index(scene.query[0]) + step
        return scene.items[position] if 0 <= position < len(scene.items) else None

    return answer


def _beside_kind(step: int) -> Answer:
    def answer(scene: Scene, domain: str) -> str | None:
        position = scene.kinds.index(domain) + step
        return scene.items[position] if 0 <= position < len(scene.items) else None

    return answer


def _by_frequency(rank: int) -> Answer:
    return lambda scene, domain: Counter(scene.items).most_common()[rank][0]


def _count_list(scene: Scene, domain: str) -> str:
    return NUMBERS[len(scene.items) - 1]


def _count_query(scene: Scene, domain: str) -> str:
    return NUMBERS[scene.items.count(scene.query[0]) - 1]


def _count_kind(scene: Scene, domain: str) -> str:
    return NUMBERS[scene.kinds.count(domain) - 1]


def _of_kind(scene: Scene, domain: str) -> str:
    return scene.items[scene.kinds.index(domain)]


def _edge_of_kind(position: int) -> Answer:
    return lambda scene, domain: [w for w, kind in zip(scene.items, scene.kinds, strict=True) if kind == domain][
        position
    ]


def _all_of_kind(scene: Scene, domain: str) -> str:
    return _join(tuple(word for word, kind in zip(scene.items, scene.kinds, strict=True) if kind == domain))


def _place_of_kind(scene: Scene, domain: str) -> str:
    return NUMBERS[scene.kinds.index(domain)]


def _key_of_kind(scene: Scene, domain: str) -> str:
    return scene.keys[scene.kinds.index(domain)]


def _kind_by_frequency(rank: int) -> Answer:
    return lambda scene, domain: Counter(scene.kinds).most_common()[rank][0]


def _odd(scene: Scene, domain: str) -> str:
    return next(item for item, kind in zip(scene.items, scene.kinds, strict=True) if kind != domain)


def _kind_at(position: int) -> Answer:
    return lambda scene, domain: scene.kinds[position]


def _shared(scene: Scene, domain: str) -> str:
    return next(word for word in scene.query if word in scene.items)


def _new(scene: Scene, domain: str) -> str:
    return next(word for word in scene.query if word not in scene.items)


def _query(scene: Scene, domain: str) -> str:
    return scene.query[0]


def _first_outside(scene: Scene, domain: str) -> str:
    return scene.outside[0]


def _value_of(scene: Scene, domain: str) -> str | None:
    return scene.items[scene.keys.index(scene.query[0])] if scene.query[0] in scene.keys else None


def _key_of(scene: Scene, domain: str) -> str | None:
    return scene.keys[scene.items.index(scene.query[0])] if scene.query[0] in scene.items else None


def _value_of_item(scene: Scene, domain: str) -> str:
    return scene.keys[scene.items.index(scene.query[0])]


def _extreme(choose: Callable[..., str]) -> Answer:
    def answer(scene: Scene, domain: str) -> str:
        return scene.items[scene.keys.index(choose(scene.keys, key=NUMBERS.index))]

    return answer


def _number_extreme(choose: Callable[..., str]) -> Answer:
    return lambda scene, domain: choose(scene.items, key=NUMBERS.index)


def _sorted(reverse: bool) -> Answer:
    return lambda scene, domain: _join(tuple(sorted(scene.items, key=NUMBERS.index, reverse=reverse)))


def _arithmetic(sign: int) -> Answer:
    def answer(scene: Scene, domain: str) -> str:
        return NUMBERS[NUMBERS.index(scene.keys[0]) + sign * (NUMBERS.index(scene.keys[1]) + 1)]

    return answer


def _shift_date(position: int, step: int) -> Answer:
    def answer(scene: Scene, domain: str) -> str:
        words = DAYS if domain == "day" else MONTHS
        return words[(words.index(scene.items[position]) + step) % len(words)]

    return answer


def _date_extreme(choose: Callable[..., str]) -> Answer:
    return lambda scene, domain: choose(scene.items, key=(DAYS if domain == "day" else MONTHS).index)


def rule_labels(domain: str) -> tuple[str, str]:
    """The label that a rule gives words of ``domain``, then the label for its partner domain.

    Partner domains share their inputs and have the labels the other way round, so that only the stated rule decides.

    Example:
        >>> rule_labels("animal"), rule_labels("colour")
        (('left', 'right'), ('left', 'right'))
    """
    return LABEL_PAIRS[_ALL.index(domain) // 2 % len(LABEL_PAIRS)]


def _rule(position: int) -> Answer:
    return lambda scene, domain: rule_labels(domain)[scene.kinds[position] != domain]


def _from_rule(scene: Scene, domain: str) -> tuple[str, ...]:
    return rule_labels(domain)


def _if_kind(kept: int, otherwise: int) -> Answer:
    return lambda scene, domain: scene.items[kept if scene.kinds[0] == domain else otherwise]


def _others(scene: Scene, domain: str) -> str:
    return _join(tuple(word for word in scene.items if word != scene.query[0]))


def _replaced(position: int) -> Answer:
    def answer(scene: Scene, domain: str) -> str:
        words = list(scene.items)
        words[position] = scene.query[0]
        return _join(tuple(words))

    return answer


def _rotated(start: int) -> Answer:
    return lambda scene, domain: _join((*scene.items[start:], *scene.items[:start]))


def _ends(scene: Scene, domain: str) -> str:
    return _join((scene.items[0], scene.items[-1]))


def _swapped(scene: Scene, domain: str) -> str:
    return _join((scene.items[-1], *scene.items[1:-1], scene.items[0]))


def _op(
    name: str, category: str, sampler: str, answer: Answer, wrong: Wrong, stage: int, **more: Any
) -> tuple[str, Operation]:
    return name, Operation(
        name=name, category=category, sampler=sampler, answer=answer, wrong=wrong, stage=stage, **more
    )


_FREE: tuple[Form, ...] = ("free",)
_CHOICE: tuple[Form, ...] = ("options",)
_ALL_FORMS: tuple[Form, ...] = ("free", "options", "verify")

OPERATIONS: dict[str, Operation] = dict(
    (
        _op("first", "position", "plain", _at(0), _from_list, 0, forms=_ALL_FORMS, lengths=(3, 4, 5)),
        _op("second", "position", "plain", _at(1), _from_list, 0, lengths=(3, 4, 5)),
        _op("third", "position", "plain", _at(2), _from_list, 0, lengths=(4, 5)),
        _op("fourth", "position", "plain", _at(3), _from_list, 0, lengths=(5,)),
        _op("last", "position", "plain", _at(-1), _from_list, 0, forms=_ALL_FORMS, lengths=(3, 4, 5)),
        _op("copy", "copy", "plain", _part(0, None), _from_list, 0, forms=_FREE, lengths=(2, 3, 4)),
        _op("count_words", "counting", "varied", _count_list, _from_counts, 0, lengths=(5,)),
        _op("count_kind", "counting", "two_kinds", _count_kind, _from_counts, 1),
        _op("first_two", "parts", "plain", _part(0, 2), _from_list, 1, forms=_FREE),
        _op("last_two", "parts", "plain", _part(-2, None), _from_list, 1, forms=_FREE),
        _op("first_three", "parts", "plain", _part(0, 3), _from_list, 1, forms=_FREE, lengths=(4,)),
        _op("last_three", "parts", "plain", _part(-3, None), _from_list, 1, forms=_FREE, lengths=(4,)),
        _op("ends", "parts", "plain", _ends, _from_list, 1, forms=_FREE),
        _op("pick", "selection", "mixed", _of_kind, _from_list, 1, variants=(0, 1)),
        _op("first_of_kind", "selection", "two_kinds", _edge_of_kind(0), _from_list, 1),
        _op("last_of_kind", "selection", "two_kinds", _edge_of_kind(-1), _from_list, 1),
        _op("all_of_kind", "selection", "two_kinds", _all_of_kind, _from_list, 1, forms=_FREE),
        _op("kind_first", "naming", "stranger", _kind_at(0), _from_kinds, 1),
        _op("kind_last", "naming", "stranger", _kind_at(-1), _from_kinds, 1),
        _op("most_kind", "naming", "two_kinds", _kind_by_frequency(0), _from_kinds, 1, lengths=(3, 5), domains=_EVEN),
        _op("least_kind", "naming", "two_kinds", _kind_by_frequency(1), _from_kinds, 1, lengths=(3, 5), domains=_EVEN),
        _op("odd", "oddity", "stranger", _odd, _from_list, 1),
        _op("place_of_kind", "places", "mixed", _place_of_kind, _from_counts, 1, lengths=(3,)),
        _op("reverse", "order", "plain", _part(None, None, -1), _from_list, 1, forms=_FREE),
        _op("first_to_end", "order", "plain", _rotated(1), _from_list, 1, forms=_FREE),
        _op("last_to_start", "order", "plain", _rotated(-1), _from_list, 1, forms=_FREE),
        _op("swap_ends", "order", "plain", _swapped, _from_list, 1, forms=_FREE, lengths=(4,)),
        _op("sort_up", "order", "numbers", _sorted(False), _from_list, 2, forms=_FREE, domains=_NUMBER),
        _op("sort_down", "order", "numbers", _sorted(True), _from_list, 2, forms=_FREE, domains=_NUMBER),
        _op("owner_of_kind", "records", "mixed_records", _key_of_kind, _from_names, 2, lengths=(2,)),
        _op("amount_of_kind", "records", "mixed_amounts", _key_of_kind, _from_amounts, 2, lengths=(2,)),
        _op("after_kind", "two_steps", "mixed", _beside_kind(1), _from_list, 2, lengths=(3,)),
        _op("before_kind", "two_steps", "mixed", _beside_kind(-1), _from_list, 2, lengths=(3,)),
        _op("after", "neighbours", "asked", _beside(1), _from_list, 2, lengths=(3,)),
        _op("before", "neighbours", "asked", _beside(-1), _from_list, 2, lengths=(3,)),
        _op("repeated", "frequency", "repeated", _by_frequency(0), _from_list, 2, lengths=(3,)),
        _op("single", "frequency", "repeated", _by_frequency(1), _from_list, 2, lengths=(3,)),
        _op("count_given", "frequency", "tally", _count_query, _from_counts, 2, lengths=(4,), forms=_FREE),
        _op("shared", "membership", "two_lists", _shared, _from_query, 2, lengths=(3,)),
        _op("new", "membership", "two_lists", _new, _from_query, 2, lengths=(3,)),
        _op("present", "membership", "plain", _query, _from_outside, 2, forms=("options", "verify"), lengths=(3,)),
        _op("absent", "membership", "plain", _first_outside, _from_list, 2, forms=_CHOICE, lengths=(3,)),
        _op("value_of", "look_up", "records", _value_of, _from_list, 2, lengths=(2,)),
        _op("key_of", "look_up", "records", _key_of, _from_names, 2, lengths=(2,)),
        _op("amount_of", "look_up", "amounts", _value_of_item, _from_amounts, 2, lengths=(2,)),
        _op("most", "comparison", "amounts", _extreme(max), _from_list, 2, lengths=(2,)),
        _op("least", "comparison", "amounts", _extreme(min), _from_list, 2, lengths=(2,)),
        _op("smallest", "comparison", "numbers", _number_extreme(min), _from_list, 2, domains=_NUMBER),
        _op("largest", "comparison", "numbers", _number_extreme(max), _from_list, 2, domains=_NUMBER),
        _op("plus", "arithmetic", "sum", _arithmetic(1), _from_numbers, 2, lengths=(2,), domains=_FEW),
        _op("minus", "arithmetic", "sum", _arithmetic(-1), _from_numbers, 2, lengths=(2,), domains=_FEW),
        _op("next_date", "dates", "calendar", _shift_date(0, 1), _from_dates, 2, lengths=(3,), domains=_DATES),
        _op("previous_date", "dates", "calendar", _shift_date(-1, -1), _from_dates, 2, lengths=(3,), domains=_DATES),
        _op("earliest", "dates", "calendar", _date_extreme(min), _from_list, 2, lengths=(3,), domains=_DATES),
        _op("latest", "dates", "calendar", _date_extreme(max), _from_list, 2, lengths=(3,), domains=_DATES),
        _op("rule_first", "rules", "two_kinds", _rule(0), _from_rule, 2, forms=_CHOICE, lengths=(3,)),
        _op("rule_last", "rules", "two_kinds", _rule(-1), _from_rule, 2, forms=_CHOICE, lengths=(3,)),
        _op("if_last", "condition", "two_kinds", _if_kind(-1, 0), _from_list, 2, lengths=(3,)),
        _op("if_second", "condition", "two_kinds", _if_kind(1, -1), _from_list, 2, lengths=(3,)),
        _op("other", "exclusion", "asked", _others, _from_list, 2, lengths=(2,)),
        _op("replace_first", "replacement", "incoming", _replaced(0), _from_list, 2, forms=_FREE, lengths=(3,)),
        _op("replace_last", "replacement", "incoming", _replaced(-1), _from_list, 2, forms=_FREE, lengths=(3,)),
    )
)
"""Name -> operation, in the order in which tasks are listed."""
