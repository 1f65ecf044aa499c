# SPDX-License-Identifier: Apache-2.0
"""The records that every task source yields: Example, PromptTemplate, Task.

A *task* is a set of examples that one instruction describes. An *example* holds the text of its input (and, where a
source has more columns than one, named *fields*), every right output, and the answer options where the answer is a
choice. A *template* turns an example into the text that a model reads: literal text around placeholders in
``str.format`` syntax, parsed once with :class:`string.Formatter`, never with regular expressions, and never evaluated
(no attribute access, no indexing, no format specifications), so that a template from outside, or one that a search
has evolved, is data and not code.
"""

import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

__all__ = [
    "INPUT",
    "OPTIONS",
    "Example",
    "Metric",
    "Origin",
    "PromptTemplate",
    "Role",
    "Segment",
    "Task",
    "TaskError",
]

INPUT = "input"
"""Name of the field that every example has."""
OPTIONS = "options"
"""Name of the placeholder for the example's answer options, joined with the template's separator."""


Role = Literal["train", "heldout"]
"""What a task or template is for: training, or evaluation only."""
Metric = Literal["exact_match", "rouge_l"]
"""How free answers are scored."""
Origin = Literal["academic", "production", "synthetic"]
"""Where tasks come from, in ZeroPrompt's task-scaling study."""


class TaskError(ValueError):
    """A task, template or example that cannot be used; the message says which, why, and what to do."""


def _check_kind(where: str, name: str, value: object, kind: Any) -> None:
    if value not in get_args(kind):
        raise TaskError(f"{where} has the {name} {value!r}; give one of {', '.join(get_args(kind))}")


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One piece of a parsed template: literal text, or the name of a placeholder."""

    text: str
    is_placeholder: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """A prompt with placeholders: ``{input}``, ``{options}``, or the name of one of the example's fields.

    Attributes:
        name: Unique within the task.
        text: Literal text and placeholders; ``{{`` and ``}}`` stand for braces.
        verbalizer: Words that replace the task's labels, position by position, where the task has a closed label set.
        option_separator: Text between two options where ``{options}`` stands.
        role: ``"train"`` templates are drawn in training and evaluated; ``"heldout"`` wordings are evaluated only.
        instruction: The part of ``text`` that says what to do, where the source knows it (for shuffled-instruction
        checks
            and for prompt search); empty otherwise.
    """

    name: str
    text: str
    verbalizer: tuple[str, ...] | None = None
    option_separator: str = ", "
    role: Role = "train"
    instruction: str = ""

    @classmethod
    def from_instruction(
        cls,
        instruction: str,
        *,
        name: str,
        with_options: bool = False,
        role: Role = "train",
    ) -> "PromptTemplate":
        r"""Build the plain frame: the instruction (braces in it are literal), the input below it, then the options.

        Args:
            instruction: What to do, any text.
            name: The template's name.
            with_options: Whether a last line lists the answer options.
            role: Whether training draws the template.

        Example:
            >>> PromptTemplate.from_instruction("Is it {good}?", name="a", with_options=True).text
            'Is it {{good}}?\n{input}\nOptions: {options}'
        """
        literal = instruction.strip().replace("{", "{{").replace("}", "}}")
        tail = "\nOptions: {options}" if with_options else ""
        return cls(name=name, text=f"{literal}\n{{input}}{tail}", role=role, instruction=instruction.strip())

    def segments(self) -> tuple[Segment, ...]:
        """Parse ``text``; neighbouring literals are merged and empty ones left out.

        Raises:
            TaskError: The braces do not balance, a placeholder is empty, or one asks for an attribute, an index, a
                conversion or a format specification.

        Example:
            >>> [s.text for s in PromptTemplate(name="a", text="Q: {input} {{x}} A:").segments()]
            ['Q: ', 'input', ' {x} A:']
        """
        parts: list[Segment] = []
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise TaskError(
                f"template {self.name!r}: {error} in {self.text!r}; write '{{{{' and '}}}}' for literal braces"
            ) from None
        literal = ""
        for text, field, spec, conversion in parsed:
            literal += text
            if field is None:
                continue
            if not field.isidentifier() or spec or conversion:
                raise TaskError(
                    f"template {self.name!r}: placeholder {field!r} is not a plain name; a placeholder is the name of "
                    "a field and nothing else (no attributes, indices or formats)"
                )
            if literal:
                parts.append(Segment(literal, False))
                literal = ""
            parts.append(Segment(field, True))
        if literal:
            parts.append(Segment(literal, False))
        return tuple(parts)

    def placeholders(self) -> tuple[str, ...]:
        """Names of the placeholders in the order they stand in."""
        return tuple(segment.text for segment in self.segments() if segment.is_placeholder)

    def render(self, example: "Example", options: tuple[str, ...] | None = None) -> str:
        """The text that a model would read for ``example``.

        Args:
            example: Where the fields come from.
            options: Options in the order to show; those of the example when None.

        Raises:
            TaskError: A placeholder names no field of the example, or asks for options where there are none.
        """
        shown = example.options if options is None else options
        pieces: list[str] = []
        for segment in self.segments():
            if not segment.is_placeholder:
                pieces.append(segment.text)
            elif segment.text == OPTIONS:
                if shown is None:
                    raise TaskError(f"template {self.name!r} shows options but the example has none")
                pieces.append(self.option_separator.join(shown))
            else:
                pieces.append(example.field(segment.text, template=self.name))
        return "".join(pieces)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One instance of a task.

    Attributes:
        input: The text to work on, without the instruction.
        outputs: Every right output; the first is the one trained on. Not empty, and no output is empty.
        options: The answer choices, one of which is the first output; None for free answers.
        fields: Further named texts that templates may use (a source's original columns).
    """

    input: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def field(self, name: str, *, template: str = "") -> str:
        """Text of the field ``name``.

        Raises:
            TaskError: There is no such field.
        """
        if name == INPUT:
            return self.input
        if name not in self.fields:
            known = ", ".join(sorted({INPUT, OPTIONS, *self.fields}))
            raise TaskError(f"template {template!r} has the unknown placeholder {name!r}; this example has: {known}")
        return self.fields[name]

    def check(self, task_id: str, row: int) -> None:
        """Refuse what no training or evaluation can use.

        Raises:
            TaskError: No output, an empty output, fewer than two options, or options without the answer.
        """
        where = f"task {task_id!r}, example {row}"
        if not self.outputs:
            raise TaskError(f"{where}: no output; give at least one right output")
        if any(not output.strip() for output in self.outputs):
            raise TaskError(f"{where}: an output is empty; remove the example or name its answer")
        if self.options is None:
            return
        if len(self.options) < 2:
            raise TaskError(
                f"{where}: {len(self.options)} option(s); a choice needs at least two, or null for free answers"
            )
        if self.outputs[0] not in self.options:
            raise TaskError(
                f"{where}: the options {list(self.options[:6])!r} do not contain the answer {self.outputs[0]!r}"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompted task: what it is, how it is worded, and where its examples come from.

    Attributes:
        task_id: Unique over all sources of a corpus.
        category: Task type; whole categories can be held out.
        family: Tasks made from one corpus share it; training and held-out tasks never do.
        templates: At least one.
        examples: Called to iterate over the examples from the start; nothing is read before.
        role: Whether the source meant the task for training or for zero-shot evaluation.
        metric: How free answers are scored: ``"exact_match"`` or ``"rouge_l"``. Choices are always scored by accuracy.
        source: Where the task comes from, for people.
        origin: ``"academic"``, ``"production"`` or ``"synthetic"`` (ZeroPrompt's task-scaling study adds production
        tasks).
        domain: Content domain, where known.
        language: Language tag of the input.
        licence: Licence of the examples.
        tier: Tasks of tier 0 are chosen before those of tier 1 when a number of tasks is asked for.
        benchmark: Name of the evaluation set that the task belongs to, or empty.
        cluster: Near-duplicate cluster, where known; empty means unknown.
        training_allowed: False where the source forbids training on it; BIG-bench, which asks for that, is recognised
        by
            its name.
    """

    task_id: str
    category: str
    family: str
    templates: tuple[PromptTemplate, ...]
    examples: Callable[[], Iterator[Example]]
    role: Role = "train"
    metric: Metric = "rouge_l"
    source: str = ""
    origin: Origin = "academic"
    domain: str = ""
    language: str = "en"
    licence: str = "unstated"
    tier: int = 0
    benchmark: str = ""
    cluster: str = ""
    training_allowed: bool = True

    def check(self) -> None:
        """Refuse a task without id or templates, of an unknown kind, or that may not be trained on.

        Raises:
            TaskError: With the task's id and the remedy.
        """
        if not self.task_id.strip():
            raise TaskError("a task has an empty id; every task needs its own")
        for name, kinds in (("role", Role), ("metric", Metric), ("origin", Origin)):
            _check_kind(f"task {self.task_id!r}", name, getattr(self, name), kinds)
        if not self.templates:
            raise TaskError(f"task {self.task_id!r} has no template; give at least one, such as '{{input}}'")
        names = [template.name for template in self.templates]
        if len(set(names)) < len(names):
            raise TaskError(f"task {self.task_id!r} has two templates of one name: {sorted(names)}")
        for template in self.templates:
            _check_kind(f"task {self.task_id!r}: template {template.name!r}", "role", template.role, Role)
            if not template.placeholders():
                raise TaskError(
                    f"task {self.task_id!r}: template {template.name!r} has no placeholder, so every example would "
                    "read the same"
                )
        named = "".join((self.source, self.benchmark, self.task_id, self.family)).lower()
        is_bigbench = "bigbench" in named.replace("-", "").replace("_", "").replace(" ", "")
        if self.role == "train" and (is_bigbench or not self.training_allowed):
            raise TaskError(
                f"task {self.task_id!r} ({self.source or 'source unstated'}) may not be used for training; "
                "give it role 'heldout'"
            )
