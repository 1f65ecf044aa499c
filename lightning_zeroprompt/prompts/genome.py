# SPDX-License-Identifier: Apache-2.0
"""PromptGenome: a prompt as typed slots, so that any exchange of slots between two prompts is a prompt again.

GPS (arXiv 2210.17041) evolves free strings and repairs them with hand-written filters; GrIPS and EvoPrompt edit or
rewrite one instruction. Here a prompt is an instruction, a frame around the example's fields, a frame around its
options, an answer cue, the layout that joins them, the words of the labels, the order of the options and the source of
the soft prompt. Placeholders live in the two frames only and are parsed, never searched for: no operator can lose,
double or damage one. Any of our templates has a genome that renders the same, cut by the rules of
:mod:`~lightning_zeroprompt.prompts.slots`, and a genome gives a template back.

A genome that cannot be built (braces that do not balance, an unknown option order) raises; one that is merely no good
(empty, too long, a placeholder lost) says so by :meth:`PromptGenome.check`, so that a search can discard and count it.

What a search reads of a prompt again and again (its text, segments, literal parts and fingerprint) is worked out once
a genome and kept on it.

Cost (one core): 30 microseconds to cut a template, 4 to join one, 13 for a fingerprint.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from lightning_zeroprompt.data.permutation import SHORT, mix64, permute, stream_key
from lightning_zeroprompt.data.task import OPTIONS, PromptTemplate, Role, Segment, TaskError
from lightning_zeroprompt.prompts.slots import SLOTS, cut_template, escape, join_slots, layout_order

__all__ = ["SLOTS", "LiteralPart", "PromptGenome", "option_permutation"]

_FRAMES = ("input_frame", "option_frame")
_SHUFFLED = "shuffled:"


@functools.lru_cache(maxsize=4096)
def _segments(text: str) -> tuple[Segment, ...]:
    return PromptTemplate(name="genome", text=text).segments()


_order = functools.lru_cache(maxsize=1024)(layout_order)


def _shuffle_seed(order: str) -> int | None:
    """The seed of a shuffled order; None for the two fixed ones.

    Raises:
        TaskError: Neither.
    """
    if order in ("given", "reversed"):
        return None
    seed = order.removeprefix(_SHUFFLED)
    if not (order.startswith(_SHUFFLED) and seed.isascii() and seed.isdecimal()):
        raise TaskError(f"option order {order!r}: give 'given', 'reversed' or 'shuffled:SEED' with a number for SEED")
    return int(seed)


@functools.lru_cache(maxsize=1 << 16)
def option_permutation(order: str, count: int, key: int) -> tuple[int, ...]:
    """Which option stands at each place: a pure function of its arguments.

    Args:
        order: ``"given"``, ``"reversed"``, or ``"shuffled:SEED"``: another order for every example.
        count: Number of options.
        key: Any integer that belongs to the example alone, such as its row; only a shuffled order reads it.

    Returns:
        The option at place 0, 1, ...

    Raises:
        TaskError: An unknown order.

    Example:
        >>> option_permutation("reversed", 3, key=0)
        (2, 1, 0)
    """
    seed = _shuffle_seed(order)
    if seed is None:
        return tuple(range(count)) if order == "given" else tuple(reversed(range(count)))
    word = np.array([key % 2**64], dtype=np.uint64) ^ stream_key(seed, "option order")
    return tuple(permute(count, mix64(word), np.arange(count), rounds=SHORT).tolist())


@dataclasses.dataclass(frozen=True, slots=True)
class LiteralPart:
    """A stretch of literal text in a genome: what text operators may change.

    Attributes:
        slot: The slot that it stands in.
        index: Its segment in a frame; 0 in a literal slot.
        text: The text, braces as they are read.
    """

    slot: str
    index: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptGenome:
    r"""A prompt as slots.

    Attributes:
        instruction: What to do, literal text.
        input_frame: Template text with the placeholders of the example's fields. Holds ``{options}`` only where the
            template shows them between fields; ``option_frame`` is then not shown.
        option_frame: Template text with ``{options}``, or empty: the options are not shown.
        answer_cue: Literal text.
        layout: Order of the four slots above and the joints between them, template text over their names. The text
            before a slot is its joint; it is left out where the slot is empty or nothing is shown before it.
        verbalizer: Words that replace the task's labels, as in
            :class:`~lightning_zeroprompt.data.task.PromptTemplate`.
        option_order: ``"given"``, ``"reversed"`` or ``"shuffled:SEED"`` (see :func:`option_permutation`).
        option_separator: Text between two options.
        soft_prompt: Name of a source of soft prompts; empty for the run's default.

    Raises:
        TaskError: A frame or the layout does not parse, or the option order is unknown.

    Example:
        >>> PromptGenome(instruction="Is it good?", input_frame="{input}", answer_cue="Answer:").text
        'Is it good?\n{input}\nAnswer:'
    """

    instruction: str = ""
    input_frame: str = "{input}"
    option_frame: str = ""
    answer_cue: str = ""
    layout: str = "{instruction}\n{input_frame}\n{option_frame}\n{answer_cue}"
    verbalizer: tuple[str, ...] | None = None
    option_order: str = "given"
    option_separator: str = ", "
    soft_prompt: str = ""

    def __post_init__(self) -> None:
        for frame in (self.input_frame, self.option_frame):
            _segments(frame)
        _order(self.layout)
        _shuffle_seed(self.option_order)

    @classmethod
    def from_template(
        cls, template: PromptTemplate, *, option_order: str = "given", soft_prompt: str = ""
    ) -> "PromptGenome":
        """Cut a template into slots.

        Args:
            template: Any template; ``genome.template(name)`` renders every example as it does.
            option_order: Order of the options.
            soft_prompt: Source of soft prompts.

        Raises:
            TaskError: The template does not parse or has no placeholder.
        """
        return cls(
            **dataclasses.asdict(cut_template(template)),
            verbalizer=template.verbalizer,
            option_separator=template.option_separator,
            option_order=option_order,
            soft_prompt=soft_prompt,
        )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "PromptGenome":
        """Build a genome from :meth:`to_dict`'s record.

        Raises:
            TaskError: A slot is unknown, missing or of another type, or the genome is not valid.
        """
        names = set(_NAMES)
        if set(record) != names:
            unknown, missing = sorted(set(record) - names), sorted(names - set(record))
            raise TaskError(f"a prompt's record has the unknown slots {unknown} and lacks {missing}")
        values = dict(record)
        verbalizer = values["verbalizer"]
        if verbalizer is not None:
            if not isinstance(verbalizer, list | tuple) or not all(isinstance(word, str) for word in verbalizer):
                raise TaskError(f"a prompt's verbalizer is {verbalizer!r}; give a list of words, or null")
            values["verbalizer"] = tuple(verbalizer)
        for name in sorted(names - {"verbalizer"}):
            if not isinstance(values[name], str):
                raise TaskError(f"a prompt's {name} is {values[name]!r}; give text")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        record = {name: getattr(self, name) for name in _NAMES}
        record["verbalizer"] = None if self.verbalizer is None else list(self.verbalizer)
        return record

    @functools.cached_property
    def text(self) -> str:
        """The prompt as template text."""
        texts = {
            "instruction": escape(self.instruction),
            "input_frame": self.input_frame,
            "option_frame": "" if _shows_options(self.input_frame) else self.option_frame,
            "answer_cue": escape(self.answer_cue),
        }
        return join_slots(_order(self.layout), texts)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The prompt's text, parsed."""
        return _segments(self.text)

    def template(self, name: str, role: Role = "heldout") -> PromptTemplate:
        """The prompt as a template.

        Args:
            name: Unique within the task.
            role: Whether training may draw it.
        """
        return PromptTemplate(
            name=name,
            text=self.text,
            verbalizer=self.verbalizer,
            option_separator=self.option_separator,
            role=role,
            instruction=self.instruction.strip(),
        )

    def placeholders(self) -> tuple[str, ...]:
        """Names of the placeholders in the order they stand in."""
        return tuple(segment.text for segment in self.segments if segment.is_placeholder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 hex of what a model reads and is asked to write: equal for two genomes that read the same.

        Runs of blank space count as one space, or as one line break where they hold one; case counts. How the text is
        spread over slots does not, nor do the order and separator of options that are not shown.
        """
        return _fingerprint(self)

    def literals(self) -> tuple[LiteralPart, ...]:
        """All literal text in the four slots, in the slots' order; empty stretches are left out."""
        return self._literals

    @functools.cached_property
    def _literals(self) -> tuple[LiteralPart, ...]:
        parts: list[LiteralPart] = []
        for slot in SLOTS:
            value: str = getattr(self, slot)
            segments = _segments(value) if slot in _FRAMES else (Segment(value, False),)
            parts += [
                LiteralPart(slot, index, segment.text)
                for index, segment in enumerate(segments)
                if segment.text and not segment.is_placeholder
            ]
        return tuple(parts)

    def with_literal(self, part: LiteralPart, text: str) -> "PromptGenome":
        """The genome with other text in place of one stretch of literal text; braces in it are literal.

        Args:
            part: One of :meth:`literals`.
            text: Any text.

        Raises:
            TaskError: The genome has no such part.
        """
        if part not in self.literals():
            raise TaskError(f"the prompt {self.text!r} has no literal text {part.text!r} in its {part.slot}")
        if part.slot not in _FRAMES:
            return dataclasses.replace(self, **_change(part.slot, text))
        segments = list(_segments(getattr(self, part.slot)))
        segments[part.index] = Segment(text, False)
        frame = "".join(f"{{{s.text}}}" if s.is_placeholder else escape(s.text) for s in segments)
        return dataclasses.replace(self, **_change(part.slot, frame))

    def check(
        self,
        *,
        required: Collection[str] = (),
        fields: Collection[str] | None = None,
        num_labels: int | None = None,
        count_tokens: Callable[[str], int] | None = None,
        max_tokens: int | None = None,
    ) -> tuple[str, ...]:
        """Why the prompt is no candidate for a task; empty if it is one.

        Args:
            required: Placeholders that have to be there.
            fields: The task's fields (and ``options`` where its examples have some); any other placeholder is refused.
            num_labels: Size of the task's closed label set, or None where it has none: a verbalizer has to fit it.
            count_tokens: Tokens of a text; needed with ``max_tokens``.
            max_tokens: Most tokens of the prompt's literal text, without the example.

        Returns:
            Reasons, such as ``"empty"``, ``"lost placeholder input"``, ``"too long: 70 tokens of 64"``.

        Raises:
            ValueError: ``max_tokens`` without ``count_tokens``.

        Example:
            >>> PromptGenome(instruction="Why?", input_frame="").check(required=["input"])
            ('lost placeholder input',)
        """
        if max_tokens is not None and count_tokens is None:
            raise ValueError(f"max_tokens={max_tokens} needs count_tokens, a function that counts a text's tokens")
        placeholders = self.placeholders()
        literal = [segment.text for segment in self.segments if not segment.is_placeholder]
        if not placeholders and not "".join(literal).strip():
            return ("empty",)
        reasons = [f"lost placeholder {name}" for name in required if name not in placeholders]
        if fields is not None:
            reasons += [f"unknown placeholder {name}" for name in dict.fromkeys(placeholders) if name not in fields]
        reasons += self._check_verbalizer(num_labels)
        if max_tokens is not None and count_tokens is not None:
            tokens = sum(count_tokens(text) for text in literal)
            if tokens > max_tokens:
                reasons.append(f"too long: {tokens} tokens of {max_tokens}")
        return tuple(reasons)

    def _check_verbalizer(self, num_labels: int | None) -> list[str]:
        if self.verbalizer is None:
            return []
        reasons = []
        if len(self.verbalizer) != (num_labels or 0):
            reasons.append(f"verbalizer of {len(self.verbalizer)} words for {num_labels or 0} labels")
        if any(not word.strip() for word in self.verbalizer):
            reasons.append("empty word in the verbalizer")
        if len(set(self.verbalizer)) < len(self.verbalizer):
            reasons.append("one word for two labels")
        return reasons


_NAMES = tuple(field.name for field in dataclasses.fields(PromptGenome))


def _change(slot: str, text: str) -> dict[str, Any]:
    return {slot: text}


@functools.lru_cache(maxsize=1 << 12)
def _shows_options(frame: str) -> bool:
    return any(segment.is_placeholder and segment.text == OPTIONS for segment in _segments(frame))


@functools.lru_cache(maxsize=1 << 12)
def _normalised(text: str) -> str:
    """Runs of blank space as one space, or one line break where they hold one."""
    lines = [" ".join(line.split()) for line in text.splitlines() or [text]]
    inner = "\n".join(line for line in lines if line)
    start = text[: len(text) - len(text.lstrip())]
    end = text[len(text.rstrip()) :]
    if not inner:
        return _blank(text)
    return _blank(start) + inner + _blank(end)


def _blank(space: str) -> Literal["", " ", "\n"]:
    return "\n" if len((space + ".").splitlines()) > 1 else " " if space else ""


@functools.lru_cache(maxsize=1 << 14)
def _fingerprint(genome: PromptGenome) -> str:
    content: list[Any] = [[s.text] if s.is_placeholder else _normalised(s.text) for s in genome.segments]
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if content and isinstance(content[end], str):
            content[end] = strip(content[end])
    shown = [genome.option_order, genome.option_separator] if [OPTIONS] in content else []
    record = [[part for part in content if part], genome.verbalizer, shown, genome.soft_prompt]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
