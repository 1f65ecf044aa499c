# SPDX-License-Identifier: Apache-2.0
"""How the built-in tasks are worded: sentence frames around the phrases that say what an operation asks for.

A wording is a frame around a phrase ("give" + "the word at the start"). Each task has its own eight training wordings,
drawn from all combinations of training phrases and frames, and four held-out wordings: two of them put a phrase that
training never shows into a known frame, one puts a known phrase into an unknown frame, and one is unknown in both.
Held-out wordings use only words that training wordings use somewhere, so they test reading, not vocabulary. Writing
every sentence by hand instead would read better and give a fifth of the variety.
"""

import itertools
import random

from lightning_zeroprompt.data.sources.builtin_operations import Form, rule_labels
from lightning_zeroprompt.data.sources.builtin_phrases import HELDOUT_PHRASES, PHRASES
from lightning_zeroprompt.data.sources.builtin_scenes import partner
from lightning_zeroprompt.data.sources.builtin_words import DOMAINS, with_article
from lightning_zeroprompt.data.task import PromptTemplate

__all__ = ["FRAMES", "HELDOUT_FRAMES", "build_templates"]

FRAMES: dict[Form, tuple[str, ...]] = {
    "free": (
        "what is {phrase} ?",
        "give {phrase}",
        "write {phrase}",
        "find {phrase}",
        "tell me {phrase}",
        "please say {phrase}",
        "can you give {phrase} ?",
        "answer with {phrase}",
    ),
    "options": (
        "which one is {phrase} ?",
        "choose {phrase}",
        "pick {phrase}",
        "what is {phrase} ?",
        "please choose {phrase}",
        "can you find {phrase} ?",
        "answer with {phrase}",
        "tell me which is {phrase}",
    ),
    "verify": (
        "is it {phrase} ?",
        "is this {phrase} ?",
        "tell me if it is {phrase}",
        "answer yes if it is {phrase}",
        "say yes or no if this is {phrase}",
        "please say if it is {phrase}",
    ),
}
"""Answer form -> the sentence frames of training wordings."""

HELDOUT_FRAMES: dict[Form, tuple[str, ...]] = {
    "free": ("can you tell me {phrase} ?", "please write {phrase}", "the answer is {phrase}"),
    "options": ("can you choose {phrase} ?", "please pick {phrase}", "which is {phrase} ?"),
    "verify": (
        "can you say if this is {phrase} ?",
        "please answer yes or no if it is {phrase}",
        "yes or no is it {phrase} ?",
    ),
}
"""Answer form -> the sentence frames that only held-out wordings use."""

NUM_TRAIN_WORDINGS = 8
"""Training wordings of a task."""


_SEVERAL = frozenset(
    {
        "copy",
        "first_two",
        "last_two",
        "first_three",
        "last_three",
        "ends",
        "all_of_kind",
        "reverse",
        "swap_ends",
        "first_to_end",
        "last_to_start",
        "sort_up",
        "sort_down",
        "replace_first",
        "replace_last",
    }
)


def _frames(operation: str, form: Form) -> tuple[str, ...]:
    """Training frames; those with "is" do not suit an answer of several words."""
    return tuple(frame for frame in FRAMES[form] if operation not in _SEVERAL or " is " not in frame)


def _fill(phrase: str, domain: str) -> str:
    if domain not in DOMAINS:
        return phrase.format(kind=domain)
    label, other_label = rule_labels(domain)
    return phrase.format(
        kind=domain,
        a_kind=with_article(domain),
        a_partner=with_article(partner(domain)),
        label=label,
        other_label=other_label,
    )


def _template(name: str, sentence: str, *, form: Form, input_first: bool, heldout: bool) -> PromptTemplate:
    text = f"{{input}} : {sentence}" if input_first else f"{sentence} : {{input}}"
    if form == "options":
        text += " : {options}"
    return PromptTemplate(
        name=name,
        text=text,
        option_separator=" or ",
        role="heldout" if heldout else "train",
        instruction=sentence,
    )


def build_templates(operation: str, domain: str, form: Form, rng: random.Random) -> tuple[PromptTemplate, ...]:
    """Eight training wordings and four held-out ones for one task; one in eight puts the instruction before the input.

    Args:
        operation: Key of ``PHRASES``.
        domain: Content domain of the task; phrases that name kinds are filled in with it.
        form: Answer form; multiple choice shows the options at the end.
        rng: Draws the wordings; the same generator state gives the same wordings.

    Example:
        >>> wordings = build_templates("first", "animal", "free", random.Random(0))
        >>> [sum(wording.role == role for wording in wordings) for role in ("train", "heldout")]
        [8, 4]
    """
    frames = _frames(operation, form)
    known = [_fill(phrase, domain) for phrase in PHRASES[operation]]
    unknown = [_fill(phrase, domain) for phrase in HELDOUT_PHRASES[operation]]
    pairs = rng.sample(list(itertools.product(known, frames)), NUM_TRAIN_WORDINGS)
    swapped = rng.randrange(NUM_TRAIN_WORDINGS)
    templates = [
        _template(f"t{i}", frame.format(phrase=phrase), form=form, input_first=i != swapped, heldout=False)
        for i, (phrase, frame) in enumerate(pairs)
    ]
    near, mid, far = rng.sample(unknown, len(unknown))
    held = (
        (near, rng.choice(frames)),
        (mid, rng.choice(frames)),
        (rng.choice(known), rng.choice(HELDOUT_FRAMES[form])),
        (far, rng.choice(HELDOUT_FRAMES[form])),
    )
    templates += [
        _template(f"h{i}", frame.format(phrase=phrase), form=form, input_first=True, heldout=True)
        for i, (phrase, frame) in enumerate(held)
    ]
    return tuple(templates)
