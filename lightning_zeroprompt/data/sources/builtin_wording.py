# SPDX-License-Identifier: Apache-2.0
"""How the built-in tasks are worded: what an operation asks for, as noun phrases, and sentence frames around them.

A wording is a frame around a phrase ("give" + "the word at the start"). Each task has its own eight training wordings,
drawn from all combinations of training phrases and frames, and four held-out wordings: two of them put a phrase that
training never shows into a known frame, one puts a known phrase into an unknown frame, and one is unknown in both.
Held-out wordings use only words that training wordings use somewhere, so they test reading, not vocabulary. Writing
every sentence by hand instead would read better and give a fifth of the variety.
"""

import itertools
import random

from lightning_zeroprompt.data.sources.builtin_operations import Form, rule_labels
from lightning_zeroprompt.data.sources.builtin_scenes import partner
from lightning_zeroprompt.data.sources.builtin_words import DOMAINS, with_article
from lightning_zeroprompt.data.task import PromptTemplate

__all__ = ["FRAMES", "HELDOUT_FRAMES", "HELDOUT_PHRASES", "PHRASES", "build_templates"]

PHRASES: dict[str, tuple[str, ...]] = {
    "first": ("the first word", "the word at the start", "the word in first place", "the word that comes first"),
    "second": (
        "the second word",
        "the word in second place",
        "the word that comes second",
        "the second word of the list",
    ),
    "third": ("the third word", "the word in third place", "the word that comes third", "the third word of the list"),
    "last": ("the last word", "the word at the end", "the word in last place", "the word that comes last"),
    "copy": ("the same list", "the list again", "the whole list", "all the words"),
    "count_words": ("the number of words", "the count of words", "the length of the list", "the total of words"),
    "first_two": (
        "the first two words",
        "the two words at the start",
        "both words that come first",
        "the first word pair",
    ),
    "last_two": ("the last two words", "the two words at the end", "both words that come last", "the last word pair"),
    "after": ("the word after it", "the word right after it", "the next word", "the word that follows it"),
    "before": ("the word before it", "the word right before it", "the previous word", "the word that it follows"),
    "repeated": (
        "the repeated word",
        "the most common word",
        "the word found more than once",
        "the word that is repeated",
    ),
    "single": ("the single word", "the least common word", "the word found only once", "the word that is not repeated"),
    "pick": ("the {kind}", "the word for {a_kind}", "the {kind} in the list", "the word that is {a_kind}"),
    "shared": ("the shared word", "the word in both lists", "the word that both lists have", "the known word"),
    "new": ("the new word", "the word only the second list has", "the word not in the first list", "the added word"),
    "present": ("a word from the list", "a word in the list", "a word that the list has", "a word found in the list"),
    "absent": (
        "a word not from the list",
        "a word not in the list",
        "a word that the list has not",
        "a word missing from the list",
    ),
    "value_of": ("the word for the name", "the word with the name", "the thing the name has", "what the name has"),
    "key_of": (
        "the name for the word",
        "the name with the word",
        "the name that has the thing",
        "the owner of the thing",
    ),
    "amount_of": ("the amount", "the number with it", "the amount of it", "the number before it"),
    "count_given": ("the count of it", "the number of times it comes", "the times it is repeated", "the total of it"),
    "count_kind": (
        "the number of words for {a_kind}",
        "the count of {kind} words",
        "the total of {kind} words",
        "the number of {kind} words",
    ),
    "reverse": (
        "the list in reverse",
        "the words in reverse order",
        "the list from end to start",
        "all the words from last to first",
    ),
    "swap_ends": (
        "the list with both ends swapped",
        "the words with first and last swapped",
        "the list with its ends swapped",
        "all the words with the ends swapped",
    ),
    "kind_first": (
        "the kind of the first word",
        "the type of the first word",
        "the kind of thing at the start",
        "the type of thing in first place",
    ),
    "kind_last": (
        "the kind of the last word",
        "the type of the last word",
        "the kind of thing at the end",
        "the type of thing in last place",
    ),
    "odd": ("the odd word", "the word that does not fit", "the word of another kind", "the different word"),
    "most": (
        "the word with the largest number",
        "the thing with the largest amount",
        "the word with the most",
        "the thing there is most of",
    ),
    "least": (
        "the word with the smallest number",
        "the thing with the smallest amount",
        "the word with the least",
        "the thing there is least of",
    ),
    "smallest": ("the smallest number", "the least number", "the lowest number", "the number with the least size"),
    "largest": ("the largest number", "the most of the numbers", "the highest number", "the number with the most size"),
    "sort_up": (
        "the numbers from small to large",
        "the numbers sorted from the smallest",
        "the list sorted to go higher",
        "the numbers with the lowest first",
    ),
    "sort_down": (
        "the numbers from large to small",
        "the numbers sorted from the largest",
        "the list sorted to go lower",
        "the numbers with the highest first",
    ),
    "plus": ("the sum", "the total amount", "both amounts added", "the amount of both"),
    "minus": (
        "the difference",
        "the amount left over",
        "the larger amount less the other",
        "how much more the larger is",
    ),
    "next_date": (
        "the {kind} after the first one",
        "the {kind} that follows the first one",
        "the next {kind} after the first",
        "the {kind} right after the first one",
    ),
    "previous_date": (
        "the {kind} before the last one",
        "the {kind} that the last one follows",
        "the previous {kind} before the last",
        "the {kind} right before the last one",
    ),
    "earliest": (
        "the earliest {kind}",
        "the {kind} before all others",
        "the lowest {kind}",
        "the {kind} that is early",
    ),
    "latest": ("the latest {kind}", "the {kind} after all others", "the highest {kind}", "the {kind} that is late"),
    "rule_first": (
        "{label} if the first word is {a_kind} and {other_label} if it is {a_partner}",
        "{label} for {a_kind} at the start and {other_label} for {a_partner}",
        "{label} if {a_kind} comes first and {other_label} if {a_partner}",
        "{label} with {a_kind} in first place or {other_label} with {a_partner}",
    ),
    "rule_last": (
        "{label} if the last word is {a_kind} and {other_label} if it is {a_partner}",
        "{label} for {a_kind} at the end and {other_label} for {a_partner}",
        "{label} if {a_kind} comes last and {other_label} if {a_partner}",
        "{label} with {a_kind} in last place or {other_label} with {a_partner}",
    ),
    "after_kind": (
        "the word after the {kind}",
        "the word right after the {kind}",
        "the next word from the {kind}",
        "the word that follows the {kind}",
    ),
    "before_kind": (
        "the word before the {kind}",
        "the word right before the {kind}",
        "the previous word to the {kind}",
        "the word that the {kind} follows",
    ),
    "if_last": (
        "the last word if the first word is {a_kind} and the first word if not",
        "the first word or with {a_kind} at the start the last word",
        "the word at the end if {a_kind} comes first and the first word if not",
        "the last word for {a_kind} in first place and the first word for others",
    ),
    "if_second": (
        "the second word if the first word is {a_kind} and the last word if not",
        "the last word or with {a_kind} at the start the second word",
        "the word in second place if {a_kind} comes first and the last word if not",
        "the second word for {a_kind} in first place and the last word for others",
    ),
    "other": ("the other word", "the word that is not it", "the list if not with it", "what is left if not it"),
    "replace_first": (
        "the list with the new word in place of the first",
        "the words with the first swapped for the new word",
        "all the words with the new word first",
        "the list and the new word for the first",
    ),
    "replace_last": (
        "the list with the new word in place of the last",
        "the words with the last swapped for the new word",
        "all the words with the new word last",
        "the list and the new word for the last",
    ),
}
"""Operation -> the noun phrases of its training wordings; ``{kind}`` and the like come from the task's domain."""

HELDOUT_PHRASES: dict[str, tuple[str, ...]] = {
    "first": ("the word the list has at the start", "the start of the list", "the word before all others"),
    "second": ("the word that is in second place", "the word after the first one", "the second of all the words"),
    "third": ("the word that is in third place", "the word after the second one", "the third of all the words"),
    "last": ("the word the list has at the end", "the end of the list", "the word after all others"),
    "copy": ("all the words again", "the same words in the same order", "the whole list again"),
    "count_words": ("the count of all the words", "the total number of words", "how much the list has"),
    "first_two": ("the first pair of words", "two words from the start", "the first word and the second word"),
    "last_two": ("the last pair of words", "two words from the end", "the last word and the word before it"),
    "after": ("the one right after it", "the word that comes next", "what follows it"),
    "before": ("the one right before it", "the word that comes before it", "what it follows"),
    "repeated": ("the word that is most common", "the word that comes more than once", "the one repeated most"),
    "single": ("the word that is least common", "the word that comes only once", "the one not repeated"),
    "pick": ("the one word for {a_kind}", "what is {a_kind} in the list", "the word of the {kind} type"),
    "shared": ("the word shared in both lists", "the word found in both", "the one that is not new"),
    "new": ("the word that is new", "the word missing from the first list", "the one added in the second list"),
    "present": ("one of the words in the list", "one found in the list", "the one the list has"),
    "absent": ("not one of the words in the list", "one missing from the list", "the one the list has not"),
    "value_of": ("the word next to the name", "the thing for the name", "what there is for the name"),
    "key_of": ("the name next to the word", "the name of the owner", "the one that has the thing"),
    "amount_of": ("the amount with it", "the number for it", "how much of it there is"),
    "count_given": (
        "the number of times it is repeated",
        "the total times it comes",
        "how much of it there is in the list",
    ),
    "count_kind": ("the total number of {kind} words", "the count of words for {a_kind}", "how much is {a_kind}"),
    "reverse": ("the whole list in reverse", "the words from end to start", "the order from last to first"),
    "swap_ends": (
        "the list with first and last swapped",
        "all the words with both ends swapped",
        "the list and its ends swapped",
    ),
    "kind_first": ("the type of thing at the start", "the kind of word in first place", "what the first word is"),
    "kind_last": ("the type of thing at the end", "the kind of word in last place", "what the last word is"),
    "odd": ("the one that does not fit", "the word of a different kind", "the only one of another type"),
    "most": ("the word with the largest amount", "the thing with the highest number", "what there is most of"),
    "least": ("the word with the smallest amount", "the thing with the lowest number", "what there is least of"),
    "smallest": ("the number that is smallest", "the lowest of the numbers", "the least of all"),
    "largest": ("the number that is largest", "the highest of the numbers", "the most of all"),
    "sort_up": (
        "the list from small to large",
        "the numbers with the smallest first",
        "the numbers sorted with the lowest first",
    ),
    "sort_down": (
        "the list from large to small",
        "the numbers with the largest first",
        "the numbers sorted with the highest first",
    ),
    "plus": ("the sum of both", "the total of both amounts", "how much there is of both"),
    "minus": ("the difference of both", "how much is left over", "the larger less the other amount"),
    "next_date": (
        "the next {kind} from the first one",
        "the {kind} after the start of the list",
        "what follows the first {kind}",
    ),
    "previous_date": (
        "the previous {kind} from the last one",
        "the {kind} before the end of the list",
        "what the last {kind} follows",
    ),
    "earliest": ("the {kind} that is earliest", "the most early {kind}", "the {kind} that comes before the others"),
    "latest": ("the {kind} that is latest", "the most late {kind}", "the {kind} that comes after the others"),
    "rule_first": (
        "{label} if {a_kind} is at the start and {other_label} if {a_partner} is",
        "{label} if it is {a_kind} in first place and {other_label} for {a_partner}",
        "{other_label} if the first word is {a_partner} and {label} if it is {a_kind}",
    ),
    "rule_last": (
        "{label} if {a_kind} is at the end and {other_label} if {a_partner} is",
        "{label} if it is {a_kind} in last place and {other_label} for {a_partner}",
        "{other_label} if the last word is {a_partner} and {label} if it is {a_kind}",
    ),
    "after_kind": ("the one right after the {kind}", "the word that comes after the {kind}", "what follows the {kind}"),
    "before_kind": (
        "the one right before the {kind}",
        "the word that comes before the {kind}",
        "what the {kind} follows",
    ),
    "if_last": (
        "the first word or the last word if the first is {a_kind}",
        "the end of the list if {a_kind} is at the start and the start if not",
        "the word in last place if {a_kind} comes first and the first word for others",
    ),
    "if_second": (
        "the last word or the second word if the first is {a_kind}",
        "the second word if {a_kind} is at the start and the end of the list if not",
        "the word in second place if {a_kind} comes first and the last word for others",
    ),
    "other": ("the one that is not it", "the only other word", "what the list has left if not it"),
    "replace_first": (
        "the list with the new word at the start",
        "the same words if the first is the new word",
        "the list with the new word swapped for the first",
    ),
    "replace_last": (
        "the list with the new word at the end",
        "the same words if the last is the new word",
        "the list with the new word swapped for the last",
    ),
}
"""Operation -> the noun phrases that only held-out wordings use."""

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
    {"copy", "first_two", "last_two", "reverse", "swap_ends", "sort_up", "sort_down", "replace_first", "replace_last"}
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
