# SPDX-License-Identifier: Apache-2.0
"""Text cut into phrases, and edits of one phrase (the operations of GrIPS, arXiv 2203.07281).

A phrase ends at punctuation, before a word that opens one (a preposition, a conjunction, a question word), or after
four words; text in scripts without spaces, after punctuation or four characters. GrIPS takes the phrases of a
constituency parser, a second model that knows English only and parses templates with placeholders badly; the cuts here
are less apt, in any language, and cost about 20 microseconds a sentence. What is cut apart joins to the same text, and
blank space at both ends stays where it is, so that a text keeps its distance to the placeholders around it.
"""

import dataclasses
import functools
import unicodedata

__all__ = ["Phrases", "split_phrases"]

_LONGEST = 4
_OPENING = (
    {"about", "after", "and", "as", "at", "because", "before", "between", "but", "by", "does", "for", "from", "given"}
    | {"how", "if", "in", "into", "is", "of", "on", "or", "so", "than", "that", "then", "to", "what", "when", "where"}
    | {"whether", "which", "while", "who", "why", "with", "without"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Phrases:
    """A text in phrases.

    Attributes:
        lead: Blank space before the first phrase.
        parts: The phrases, none empty.
        gaps: What stands between two phrases, blank or nothing, one fewer than ``parts``.
        tail: Blank space behind the last phrase.
    """

    lead: str
    parts: tuple[str, ...]
    gaps: tuple[str, ...]
    tail: str

    def __len__(self) -> int:
        return len(self.parts)

    def around(self, first: int, end: int) -> tuple[str, str]:
        """The text before phrase ``first`` and behind phrase ``end - 1``, with the blank space that adjoins them."""
        before = self.lead + "".join(part + gap for part, gap in zip(self.parts[:first], self.gaps, strict=False))
        behind = "".join(gap + part for gap, part in zip(self.gaps[end - 1 :], self.parts[end:], strict=False))
        return before, behind + self.tail

    def text(self) -> str:
        """The whole text."""
        first = "".join(self.parts[:1])
        rest = "".join(gap + part for gap, part in zip(self.gaps, self.parts[1:], strict=True))
        return self.lead + first + rest + self.tail

    def without(self, index: int) -> str:
        """The text less one phrase and one of the gaps beside it."""
        parts = self.parts[:index] + self.parts[index + 1 :]
        gaps = self.gaps[: max(index - 1, 0)] + self.gaps[max(index, 1) :]
        return Phrases(self.lead, parts, gaps, self.tail).text()

    def swapped(self, first: int, second: int) -> str:
        """The text with two phrases exchanged."""
        parts = list(self.parts)
        parts[first], parts[second] = parts[second], parts[first]
        return Phrases(self.lead, tuple(parts), self.gaps, self.tail).text()

    def opened(self, place: int) -> tuple[str, str]:
        """The text on both sides of an opening before phrase ``place``, or behind the last one for ``place == len``."""
        if not self.parts:
            return self.lead, self.tail
        gap = self.gaps[min(max(place - 1, 0), len(self.gaps) - 1)] if self.gaps else _usual_gap(self.parts)
        before = "".join(p + g for p, g in zip(self.parts[:place], (*self.gaps, gap), strict=False))
        behind = "".join(g + p for g, p in zip((gap, *self.gaps)[place:], self.parts[place:], strict=False))
        return self.lead + before, behind + self.tail

    def inserted(self, phrase: str, place: int) -> str:
        """The text with another phrase at :meth:`opened`."""
        before, behind = self.opened(place)
        return before + phrase + behind


@functools.lru_cache(maxsize=1 << 14)
def split_phrases(text: str) -> Phrases:
    """Cut a text into phrases.

    Args:
        text: Any text.

    Returns:
        Phrases whose :meth:`Phrases.text` is ``text``.

    Example:
        >>> split_phrases("Read the list, then give the word that comes last.").parts
        ('Read the list,', 'then give the word', 'that comes last.')
    """
    words, gaps = _words(text)
    parts: list[str] = []
    between: list[str] = []
    length = 0
    for index, word in enumerate(words):
        gap = gaps[index]
        if parts and not _begins(words[index - 1], word, length):
            parts[-1] += gap + word
            length += 1
            continue
        if parts:
            between.append(gap)
        parts.append(word)
        length = 1
    if not words:
        return Phrases(text, (), (), "")
    return Phrases(gaps[0], tuple(parts), tuple(between), gaps[-1])


def _begins(previous: str, word: str, length: int) -> bool:
    closes = unicodedata.category(previous[-1])[0] == "P" and previous[-1] not in "'\"-_"
    return closes or length >= _LONGEST or (length > 1 and word.lower() in _OPENING)


def _is_unspaced(char: str) -> bool:
    """Whether a character is of a script whose words have no spaces between them; Korean is wide and has."""
    return unicodedata.east_asian_width(char) in "WF" and not "\uac00" <= char <= "\ud7a3"


def _words(text: str) -> tuple[list[str], list[str]]:
    """Words, and the blank space before each and behind the last; a letter of an unspaced script is a word."""
    words: list[str] = []
    gaps = [""]
    is_open = False
    for char in text:
        if char.isspace():
            gaps[-1] += char
            is_open = False
            continue
        unspaced, sign = _is_unspaced(char), unicodedata.category(char)[0] == "P"
        if is_open and (sign or not unspaced):
            words[-1] += char
        else:
            words.append(char)
            gaps.append("")
        is_open = not (unspaced and sign)
    return words, gaps


def _usual_gap(parts: tuple[str, ...]) -> str:
    """The gap between phrases of a text that has none so far: a space, but for scripts without spaces."""
    return "" if parts and _is_unspaced(parts[-1][-1]) else " "
