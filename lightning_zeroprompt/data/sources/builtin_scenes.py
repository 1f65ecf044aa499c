# SPDX-License-Identifier: Apache-2.0
"""Scenes: the structured inputs of the built-in tasks, and the samplers that draw them.

A scene holds what a task's input says (``text``) and, apart, the parts that an operation computes its answer from, so
no answer is ever parsed back from text. All operations that share a sampler share one input distribution: the same
input has different answers under different instructions, and only reading the instruction tells them apart. A sampler
is a pure function of a random generator, a domain, a list length and a variant. Drawing costs about 5 microseconds a
scene.
"""

import dataclasses
import random
from collections.abc import Callable

from lightning_zeroprompt.data.sources.builtin_words import DAYS, DOMAINS, MONTHS, NAMES, NUMBERS

__all__ = ["SAMPLERS", "Sampler", "Scene", "kinds_together", "partner"]

Sampler = Callable[[random.Random, str, int, int], "Scene"]
"""(generator, domain, list length, variant) -> scene."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One structured input.

    Attributes:
        text: What the model reads: words separated by single spaces, parts separated by `` ; ``.
        items: The words of the list.
        kinds: The domain of each item, by position, where a list has several.
        keys: The name or number that goes with each item, by position, in a record.
        query: The word (or words) that the input asks about; may be empty.
        outside: Words of the domain that are not in the list, in random order: wrong options.
    """

    text: str
    items: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


def kinds_together(domain: str, length: int, variant: int) -> tuple[str, ...]:
    """The ``length`` domains that a mixed list draws one word each from; ``domain`` is one of them.

    For fixed ``length`` and ``variant`` these sets are a partition of the domains, so every member of a set sees the
    same inputs.

    Args:
        domain: A key of ``DOMAINS``.
        length: 2, 3 or 4, a divisor of the number of domains.
        variant: 0 takes neighbouring domains, 1 takes domains at equal distances.

    Example:
        >>> kinds_together("animal", 3, 0), kinds_together("colour", 3, 1)
        (('animal', 'colour', 'fruit'), ('colour', 'food', 'sport'))
    """
    names = tuple(DOMAINS)
    groups = len(names) // length
    index = names.index(domain)
    if variant == 0:
        return names[index // length * length :][:length]
    return names[index % groups :: groups]


def partner(domain: str) -> str:
    """The domain that shares its two-kind inputs with ``domain``; partners are each other's.

    Example:
        >>> partner("animal"), partner("colour")
        ('colour', 'animal')
    """
    names = tuple(DOMAINS)
    return names[names.index(domain) ^ 1]


def _words(rng: random.Random, domain: str, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``count`` distinct words of a domain, and its other words, both in random order."""
    drawn = rng.sample(DOMAINS[domain], len(DOMAINS[domain]))
    return tuple(drawn[:count]), tuple(drawn[count:])


def _plain(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """A list of distinct words; the query, one of them, is not shown: it is what a membership question turns on."""
    items, outside = _words(rng, domain, length)
    return Scene(" ".join(items), items, query=(rng.choice(items),), outside=outside)


def _varied(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """A list of two to ``length`` words."""
    return _plain(rng, domain, rng.randint(2, length), variant)


def _asked(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """A list and one of its words."""
    items, outside = _words(rng, domain, length)
    query = rng.choice(items)
    return Scene(f"{' '.join(items)} ; {query}", items, query=(query,), outside=outside)


def _incoming(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """A list and one word that is not in it."""
    items, outside = _words(rng, domain, length)
    return Scene(f"{' '.join(items)} ; {outside[0]}", items, query=outside[:1], outside=outside[1:])


def _repeated(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """One word ``length - 1`` times and another once."""
    (many, once), outside = _words(rng, domain, 2)
    items = tuple(rng.sample([many] * (length - 1) + [once], length))
    return Scene(" ".join(items), items, outside=outside)


def _tally(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Two words, each at least once, and one of the two asked about."""
    pair, outside = _words(rng, domain, 2)
    times = rng.randint(1, length - 1)
    items = tuple(rng.sample([pair[0]] * times + [pair[1]] * (length - times), length))
    return Scene(f"{' '.join(items)} ; {pair[0]}", items, query=pair[:1], outside=outside)


def _two_lists(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """A list, then a second list of one word from the first and one new word."""
    items, outside = _words(rng, domain, length)
    query = tuple(rng.sample([rng.choice(items), outside[0]], 2))
    return Scene(f"{' '.join(items)} ; {' '.join(query)}", items, query=query, outside=outside[1:])


def _mixed(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """One word of each of ``length`` domains."""
    kinds = tuple(rng.sample(kinds_together(domain, length, variant), length))
    items = tuple(rng.choice(DOMAINS[kind]) for kind in kinds)
    return Scene(" ".join(items), items, kinds=kinds)


def _stranger(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Words of one domain and one word of the next but one."""
    # Not the partner: lists of two partner kinds are another distribution, with other operations on it.
    names = tuple(DOMAINS)
    other = names[(names.index(domain) + 2) % len(names)]
    kinds = tuple(rng.sample([domain] * (length - 1) + [other], length))
    same, _ = _words(rng, domain, length)
    items = tuple(rng.choice(DOMAINS[other]) if kind == other else word for kind, word in zip(kinds, same, strict=True))
    return Scene(" ".join(items), items, kinds=kinds)


def _two_kinds(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Distinct words of two domains, each at least once; the two domains of a pair share their inputs."""
    pair = (domain, partner(domain))
    times = rng.randint(1, length - 1)
    kinds = tuple(rng.sample([pair[0]] * times + [pair[1]] * (length - times), length))
    words = {kind: _words(rng, kind, length)[0] for kind in sorted(pair)}
    items = tuple(words[kind][position] for position, kind in enumerate(kinds))
    return Scene(" ".join(items), items, kinds=kinds)


def _records(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Names with a word each; the question is about one name or one word."""
    items, outside = _words(rng, domain, length)
    names = tuple(rng.sample(NAMES, length))
    query = rng.choice(items + names)
    return Scene(f"{_pairs(names, items)} ; {query}", items, keys=names, query=(query,), outside=outside)


def _amounts(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Words with a number each, all numbers distinct; one word is asked about."""
    items, outside = _words(rng, domain, length)
    numbers = tuple(rng.sample(NUMBERS, length))
    query = rng.choice(items)
    return Scene(f"{_pairs(numbers, items)} ; {query}", items, keys=numbers, query=(query,), outside=outside)


def _pairs(keys: tuple[str, ...], items: tuple[str, ...]) -> str:
    return " ".join(f"{key} {item}" for key, item in zip(keys, items, strict=True))


def _mixed_records(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Names with a word each, every word of another domain."""
    mixed = _mixed(rng, domain, length, variant)
    names = tuple(rng.sample(NAMES, length))
    return Scene(_pairs(names, mixed.items), mixed.items, kinds=mixed.kinds, keys=names)


def _mixed_amounts(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Numbers with a word each, every word of another domain."""
    mixed = _mixed(rng, domain, length, variant)
    numbers = tuple(rng.sample(NUMBERS, length))
    return Scene(_pairs(numbers, mixed.items), mixed.items, kinds=mixed.kinds, keys=numbers)


def _numbers(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Distinct number words."""
    items = tuple(rng.sample(NUMBERS, length))
    return Scene(" ".join(items), items, outside=tuple(rng.sample([n for n in NUMBERS if n not in items], 3)))


def _sum(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Two amounts of one thing, the first the larger, their sum at most ten."""
    small = rng.randint(1, 4)
    large = rng.randint(small + 1, 10 - small)
    thing = rng.choice(DOMAINS[domain])
    keys = (NUMBERS[large - 1], NUMBERS[small - 1])
    return Scene(f"{keys[0]} {thing} and {keys[1]} {thing}", (thing,), keys=keys)


def _calendar(rng: random.Random, domain: str, length: int, variant: int) -> Scene:
    """Distinct days of the week, or months, in random order."""
    words = DAYS if domain == "day" else MONTHS
    drawn = tuple(rng.sample(words, len(words)))
    return Scene(" ".join(drawn[:length]), drawn[:length], outside=drawn[length:])


SAMPLERS: dict[str, Sampler] = {
    "plain": _plain,
    "varied": _varied,
    "asked": _asked,
    "incoming": _incoming,
    "repeated": _repeated,
    "tally": _tally,
    "two_lists": _two_lists,
    "mixed": _mixed,
    "stranger": _stranger,
    "two_kinds": _two_kinds,
    "records": _records,
    "amounts": _amounts,
    "mixed_records": _mixed_records,
    "mixed_amounts": _mixed_amounts,
    "numbers": _numbers,
    "sum": _sum,
    "calendar": _calendar,
}
"""Name of an input distribution -> its sampler; operations name the one they work on."""
