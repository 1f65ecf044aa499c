# SPDX-License-Identifier: Apache-2.0
"""ExamplePool: what a prompt search sees of a task, as tokens.

A pool holds rows of one task in the pieces of a compiled corpus (:mod:`~lightning_zeroprompt.data.corpus`): fields,
outputs and options are tokenised apart and once, so that a new prompt joins them without reading a text again. It is
made from a task of a compiled corpus, or from :class:`~lightning_zeroprompt.data.task.Example` records, which pass
through the compiler's own encoder (:func:`~lightning_zeroprompt.data.shards.encode_task`): same checks, same tokens.

A pool is small and never changes. A search, its confirmation and its test each get a pool of their own
(:meth:`ExamplePool.select`), so that none can read another's rows. Alternatives: one pool and lists of rows, which
leaves that to care; reading the corpus in place, whose arrays are shared by all tasks and therefore grow with them.

Cost: 2 ms for 1,000 rows out of a corpus, 38 ms to tokenise as many examples of 20 words (BPE; processor time, one
core).
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo, take
from lightning_zeroprompt.data.join import Pieces, ranges
from lightning_zeroprompt.data.shards import Limits, encode_task
from lightning_zeroprompt.data.task import Example, Metric, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import TextTokenizer

__all__ = ["FREE", "UNLABELLED", "ExamplePool", "PoolError"]

FREE = -1
"""Label of a row whose answer is free text."""
UNLABELLED = -2
"""Label of a row whose right option is not known."""

_Ints = npt.NDArray[np.int64]


class PoolError(ValueError):
    """Examples that a search cannot use; the message says which, why, and what to do."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExamplePool:
    """Rows of one task (R rows, S pieces, O options of all rows together).

    Attributes:
        name: The task's id.
        kind: ``"choice"`` where every row has options, else ``"generation"``.
        metric: How free answers are scored.
        fields: Names of the fields; the first is ``input``.
        labels: The closed label set in its canonical order, or None.
        templates: The task's own templates, its manual prompts.
        tokenizer: Made the tokens.
        tokens: int32, all pieces end to end.
        offsets: int64 [S + 1], piece s is ``tokens[offsets[s]:offsets[s + 1]]``.
        first_piece: int64 [R], the row's first field; the other fields follow, then its right outputs.
        num_outputs: int64 [R].
        first_option: int64 [R], piece of the row's first option; -1 for free answers.
        num_options: int64 [R].
        label: int64 [R], index of the right option, :data:`FREE` or :data:`UNLABELLED`.
        right: bool [O], whether the option equals any right output; options lie row after row.
    """

    name: str
    kind: Literal["choice", "generation"]
    metric: Metric
    fields: tuple[str, ...]
    labels: tuple[str, ...] | None
    templates: tuple[PromptTemplate, ...]
    tokenizer: TextTokenizer
    tokens: npt.NDArray[np.int32]
    offsets: _Ints
    first_piece: _Ints
    num_outputs: _Ints
    first_option: _Ints
    num_options: _Ints
    label: _Ints
    right: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.first_piece)

    @classmethod
    def from_corpus(cls, corpus: Corpus, task: TaskInfo, rows: Sequence[int] | _Ints | None = None) -> "ExamplePool":
        """Copy rows of a compiled task.

        Args:
            corpus: The compiled corpus.
            task: One of its tasks.
            rows: Rows of the corpus that belong to the task; all of them when None.

        Raises:
            PoolError: No rows, or a row of another task.
        """
        end = task.first_row + task.num_rows
        chosen = np.arange(task.first_row, end) if rows is None else np.asarray(rows, dtype=np.int64)
        if not len(chosen) or chosen.min() < task.first_row or chosen.max() >= end:
            given = f"{chosen.min()} to {chosen.max()}" if len(chosen) else "none"
            raise PoolError(f"task {task.task_id!r} has the rows {task.first_row} to {end - 1}; given: {given}")
        num_outputs = take(corpus.row_num_outputs, chosen)
        held = len(task.fields) + num_outputs
        stored_options, num_options = take(corpus.row_option_segment, chosen), take(corpus.row_num_options, chosen)
        # A closed label set is stored once for all rows.
        lists, which = np.unique(stored_options, return_inverse=True)
        sizes = np.zeros_like(lists)
        sizes[which] = num_options
        pieces = np.concatenate([ranges(take(corpus.row_first_segment, chosen), held), ranges(lists, sizes)])
        start = take(corpus.segment_offsets, pieces)
        length = take(corpus.segment_offsets, pieces + 1) - start
        gathered = Pieces(start, length, np.arange(len(pieces) + 1)).gather(np.asarray(corpus.tokens))
        templates = corpus.templates[task.first_template : task.first_template + task.num_templates]
        return _with_right(
            cls(
                name=task.task_id,
                kind=task.kind,
                metric=task.metric,
                fields=task.fields,
                labels=task.labels,
                templates=tuple(
                    PromptTemplate(
                        name=t.name,
                        text=t.text,
                        verbalizer=t.verbalizer,
                        option_separator=t.option_separator,
                        role=t.role,
                        instruction=t.instruction,
                    )
                    for t in templates
                ),
                tokenizer=corpus.tokenizer,
                tokens=gathered.tokens,
                offsets=gathered.offsets,
                first_piece=np.cumsum(held) - held,
                num_outputs=num_outputs,
                first_option=np.where(stored_options < 0, -1, int(held.sum()) + (np.cumsum(sizes) - sizes)[which]),
                num_options=num_options,
                label=take(corpus.row_label, chosen),
                right=np.zeros(0, dtype=np.bool_),
            )
        )

    @classmethod
    def from_examples(
        cls,
        name: str,
        examples: Iterable[Example],
        templates: Sequence[PromptTemplate],
        tokenizer: TextTokenizer,
        *,
        metric: Metric = "rouge_l",
        max_input_tokens: int = 1024,
    ) -> "ExamplePool":
        """Tokenise examples, in their order; one whose options are all the same text is left out.

        Args:
            name: The task's name.
            examples: An example with options and without outputs is unlabelled (for zero-label search).
            templates: The task's manual prompts.
            tokenizer: That of the model.
            metric: How free answers are scored.
            max_input_tokens: Longer fields lose their end.

        Raises:
            TaskError: An example or template cannot be used.
        """
        kept = [e for e in examples if e.options is None or len(e.options) < 2 or len(set(e.options)) > 1]
        is_labelled = np.array([bool(example.outputs) for example in kept], dtype=np.bool_)
        # The encoder wants an answer; any option will do where it is not known.
        filled = [e if e.outputs or not e.options else dataclasses.replace(e, outputs=e.options[:1]) for e in kept]
        task = Task(
            task_id=name,
            category="search",
            family=name,
            templates=tuple(templates),
            examples=lambda: iter(filled),
            role="heldout",
            metric=metric,
        )
        task.check()
        part = encode_task(task, filled, tokenizer, Limits(max_input_tokens=max_input_tokens))
        arrays = part.arrays
        offsets = np.zeros(len(arrays["segment_lengths"]) + 1, dtype=np.int64)
        np.cumsum(arrays["segment_lengths"], out=offsets[1:])
        labels = part.info["labels"]
        pool = _with_right(
            cls(
                name=name,
                kind=part.info["kind"],
                metric=metric,
                fields=tuple(part.info["fields"]),
                labels=None if labels is None else tuple(labels),
                templates=tuple(templates),
                tokenizer=tokenizer,
                tokens=arrays["tokens"].astype(np.int32),
                offsets=offsets,
                first_piece=arrays["row_first_segment"].astype(np.int64),
                num_outputs=arrays["row_num_outputs"].astype(np.int64),
                first_option=arrays["row_option_segment"].astype(np.int64),
                num_options=arrays["row_num_options"].astype(np.int64),
                label=arrays["row_label"].astype(np.int64),
                right=np.zeros(0, dtype=np.bool_),
            )
        )
        return pool if is_labelled.all() else pool.with_labels(np.where(is_labelled, pool.label, UNLABELLED))

    @property
    def option_offsets(self) -> _Ints:
        """int64 [R + 1]: options of row r are ``option_offsets[r]:option_offsets[r + 1]`` of all options."""
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self.num_options, out=offsets[1:])
        return offsets

    @property
    def chance(self) -> float:
        """Accuracy of guessing: the mean share of right options; 0 for free answers."""
        if self.kind != "choice":
            return 0.0
        starts = self.option_offsets[:-1]
        return float((np.add.reduceat(self.right.astype(np.int64), starts) / self.num_options).mean())

    def select(self, rows: Sequence[int] | _Ints) -> "ExamplePool":
        """The pool of the given rows, in their order; tokens are shared.

        Raises:
            PoolError: No rows, or one that is not there.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= len(self):
            given = f"{chosen.min()} to {chosen.max()}" if len(chosen) else "none"
            raise PoolError(f"task {self.name!r} has the rows 0 to {len(self) - 1}; given: {given}")
        names = ("first_piece", "num_outputs", "first_option", "num_options", "label")
        right = self.right[ranges(self.option_offsets[chosen], self.num_options[chosen])]
        return dataclasses.replace(self, right=right, **{name: getattr(self, name)[chosen] for name in names})

    def with_labels(self, labels: Sequence[int] | _Ints) -> "ExamplePool":
        """The same rows under other labels, such as pseudo-labels; one option a row is right, or none.

        Args:
            labels: For each row the index of an option, or :data:`UNLABELLED`.

        Raises:
            PoolError: Free answers, another number of labels, or a label that is no option.
        """
        label = np.asarray(labels, dtype=np.int64)
        if self.kind != "choice":
            raise PoolError(f"task {self.name!r} has free answers; only options can be labelled")
        if label.shape != (len(self),):
            raise PoolError(f"task {self.name!r} has {len(self)} rows, given are {label.size} labels; give one a row")
        bad = np.flatnonzero((label >= self.num_options) | (label < UNLABELLED) | (label == FREE))
        if len(bad):
            row = int(bad[0])
            raise PoolError(
                f"task {self.name!r}, row {row}: label {label[row]} with {self.num_options[row]} options; give 0 to "
                f"{self.num_options[row] - 1}, or {UNLABELLED} for an unknown one"
            )
        offsets = self.option_offsets
        right = np.zeros(int(offsets[-1]), dtype=np.bool_)
        known = label >= 0
        right[offsets[:-1][known] + label[known]] = True
        return dataclasses.replace(self, label=label, right=right)

    def input_keys(self) -> list[bytes]:
        """What identifies each row's input: 16 bytes of a hash over its fields' tokens; equal inputs, equal keys."""
        bounds = self.offsets[self.first_piece[:, None] + np.arange(len(self.fields) + 1)].tolist()
        keys = []
        for edges in bounds:
            lengths = np.diff(edges).tobytes()
            content = self.tokens[edges[0] : edges[-1]].tobytes()
            keys.append(hashlib.blake2b(lengths + content, digest_size=16).digest())
        return keys

    def example(self, row: int) -> Example:
        """A row as text, for people; what the tokeniser or the length limit has lost is not restored."""
        first, inputs = int(self.first_piece[row]), len(self.fields)
        texts = [self._text(first + k) for k in range(inputs + int(self.num_outputs[row]))]
        count = int(self.num_options[row]) if self.kind == "choice" else 0
        options = [self._text(int(self.first_option[row]) + k) for k in range(count)]
        outputs = tuple(texts[inputs:])
        if options:
            marked = self.right[self.option_offsets[row] : self.option_offsets[row + 1]].tolist()
            outputs = tuple(text for text, is_right in zip(options, marked, strict=True) if is_right)
        return Example(
            input=texts[0],
            outputs=outputs,
            options=tuple(options) or None,
            fields=dict(zip(self.fields[1:], texts[1:inputs], strict=True)),
        )

    def _text(self, piece: int) -> str:
        return self.tokenizer.decode(self.tokens[self.offsets[piece] : self.offsets[piece + 1]].tolist())


def _with_right(pool: ExamplePool) -> ExamplePool:
    """Mark the options that equal a right output, compared as tokens."""

    def content(pieces: _Ints) -> list[bytes]:
        bounds = zip(pool.offsets[pieces].tolist(), pool.offsets[pieces + 1].tolist(), strict=True)
        return [pool.tokens[start:end].tobytes() for start, end in bounds]

    if pool.kind != "choice":
        return dataclasses.replace(pool, right=np.zeros(int(pool.num_options.sum()), dtype=np.bool_))
    outputs = content(ranges(pool.first_piece + len(pool.fields), pool.num_outputs))
    row_of_output = np.repeat(np.arange(len(pool)), pool.num_outputs).tolist()
    known = set(zip(row_of_output, outputs, strict=True))
    options = content(ranges(pool.first_option, pool.num_options))
    row_of_option = np.repeat(np.arange(len(pool)), pool.num_options).tolist()
    right = np.array([pair in known for pair in zip(row_of_option, options, strict=True)], dtype=np.bool_)
    return dataclasses.replace(pool, right=right)
