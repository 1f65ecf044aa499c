# SPDX-License-Identifier: Apache-2.0
"""Evaluation plans as batches: a map-style dataset of whole batches, joined from the compiled corpus.

Items are sorted by the length of their targets, in classes of powers of two, and by the length of their input, longest
first (so a batch that does not fit in memory fails early), and cut into batches under two budgets of padded tokens,
one for the encoder and one for the targets. Sorting by inputs alone leaves three quarters of the targets' positions
to padding on the real tasks, and lets one long answer hold up the generation of a whole batch. Items of one kind stay
together, and the list of either kind is filled up to a multiple of the ranks with repeated batches whose cells are
-1, so that at every step all ranks run the same kind of batch with the same number of generation steps at most: ranks
that share a sharded model must meet in the same collectives. Nothing depends on the number of ranks but those
repeats.

A batch is a dictionary (B examples, N options)::

    kind              "choice" or "generation"
    input_ids         int64 [B, L], 0 = padding; the template joined with the row's fields and stored options, end mark
    input_segments    int32 [B, L], 1 = token, 0 = padding
    cell, row         int64 [B]; cell -1: a repeat that counts for nothing
    task_ids          int32 [B, L], only with soft prompts: 0 = no task's prompt
    option_labels     int64 [N, T], -100 = padding; the options' tokens with end marks (verbalised)        choice
    option_example    int64 [N], sorted                                                                   choice
    option_correct    bool [N], whether the option equals any right output                                choice
    references        list of B lists of texts: every right output                                        generation
    target_labels     int64 [B, T], -100 = padding; the first right output with its end mark               generation
    answer_limit      int64 [B]: tokens an answer may have, that of the longest right output in the        generation
                      task's sample, end mark included, within a cap
    max_new_tokens    int: the largest answer_limit of the step, over all ranks                            generation

Cost, one core: 10 ms to lay out 3,000 items of the real tasks, 4 ms a batch of 50 of them, 9 ms one of 400 short items.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo, take
from lightning_zeroprompt.data.evaluation_plan import (
    EvaluationCell,
    EvaluationPlan,
    EvaluationSettings,
    TaskSample,
    plan_evaluation,
    right_options,
    split_tasks,
)
from lightning_zeroprompt.data.join import Pieces, Ragged, join_templates, ranges

__all__ = [
    "EvaluationBatch",
    "EvaluationCell",
    "EvaluationDataset",
    "EvaluationPlan",
    "EvaluationSettings",
    "TaskSample",
    "plan_evaluation",
    "split_tasks",
]

EvaluationBatch = dict[str, Any]
"""One batch; its entries are in the module's text."""

_Ints = npt.NDArray[np.int64]
_CHUNK = 8192


class EvaluationDataset(Dataset[EvaluationBatch]):
    """The batches that one rank evaluates; give it to a ``DataLoader`` with ``batch_size=None``.

    Args:
        corpus: The corpus that the plan was made for.
        plan: What to evaluate.
        encoder_length: Largest number of encoder tokens, end mark and soft prompt included; longer inputs are cut as in
            training.
        decoder_length: Largest number of target tokens, end mark included.
        max_tokens: Padded tokens a batch, of the encoder and, apart, of the targets; an item above it is a batch of its
            own.
        max_new_tokens: Cap of the generated tokens.
        soft_prompt_length: Prompt positions in front of every input.
        prompt_ids: For soft prompts a task: the number of the prompt for a task (index in the corpus); others have none
            (0).
        rank: Which share of the batches.
        num_ranks: Into how many shares.

    Attributes:
        num_truncated: Items of all ranks whose input was cut.

    Raises:
        ValueError: A limit without room for content and end mark, or an impossible rank.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: EvaluationPlan,
        *,
        encoder_length: int = 512,
        decoder_length: int = 128,
        max_tokens: int = 8192,
        max_new_tokens: int = 128,
        soft_prompt_length: int = 0,
        prompt_ids: Mapping[int, int] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        room = encoder_length - soft_prompt_length
        if room < 2 or decoder_length < 2 or max_new_tokens < 1:
            raise ValueError(
                f"encoder_length={encoder_length} less soft_prompt_length={soft_prompt_length} is {room}, "
                f"decoder_length={decoder_length}, max_new_tokens={max_new_tokens}; a text needs 2 tokens "
                "at least (content and end mark)"
            )
        self.corpus, self.plan = corpus, plan
        self._room, self._decoder_length, self._max_new_tokens = room, decoder_length, max_new_tokens
        self._soft_prompt_length, self._prompt_ids = soft_prompt_length, dict(prompt_ids or {})
        self._eos, self._vocab_size = corpus.eos_id, corpus.vocab_size
        self._tasks = [plan.samples[cell.sample].task for cell in plan.cells]
        self._answer_limits = self._limits_of_cells()
        self._shown = np.array([cell.shown_template for cell in plan.cells], dtype=np.int64)
        lengths = self._input_lengths()
        self.num_truncated = int((lengths > room).sum())
        self._batches: dict[str, list[_Ints]] = {"choice": [], "generation": []}
        is_choice = np.array([task.kind == "choice" for task in self._tasks])[plan.item_cell]
        longest, options = self._target_sizes(is_choice)
        for kind, members in (("choice", np.flatnonzero(is_choice)), ("generation", np.flatnonzero(~is_choice))):
            inputs = np.minimum(lengths[members], room) + soft_prompt_length
            order = np.lexsort((members, -inputs, -np.ceil(np.log2(longest[members]))))
            chosen = members[order]
            sizes = zip(inputs[order].tolist(), options[chosen].tolist(), longest[chosen].tolist(), strict=True)
            self._batches[kind] = [chosen[start:end] for start, end in batch_bounds(sizes, max_tokens)]
        self._place(rank, num_ranks)

    def for_rank(self, rank: int, num_ranks: int) -> "EvaluationDataset":
        """The share of another rank; shares all arrays with this one.

        Raises:
            ValueError: An impossible rank.
        """
        other = copy.copy(self)
        other._place(rank, num_ranks)
        return other

    def _place(self, rank: int, num_ranks: int) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} ranks: give 0 to {num_ranks - 1}")
        self._rank, self._num_ranks = rank, num_ranks
        self._steps: list[tuple[Literal["choice", "generation"], int]] = []
        for kind in ("choice", "generation"):
            self._steps += [(kind, start) for start in range(0, len(self._batches[kind]), num_ranks)]

    def __len__(self) -> int:
        """Steps; the same on every rank."""
        return len(self._steps)

    def __getitem__(self, step: int) -> EvaluationBatch:
        """The rank's batch of a step.

        Raises:
            IndexError: There are fewer steps.
        """
        kind, start = self._steps[step]
        batches = self._batches[kind]
        index = start + self._rank
        items = batches[index % len(batches)]
        cells, rows = self.plan.item_cell[items], self.plan.item_row[items]
        tasks = [self._tasks[cell] for cell in cells.tolist()]
        batch: EvaluationBatch = {
            "kind": kind,
            "cell": torch.from_numpy(cells if index < len(batches) else np.full_like(cells, -1)),
            "row": torch.from_numpy(rows),
        }
        joined = join_templates(self.corpus, rows, self._shown[cells], max_tokens=self._room)
        self._add_inputs(batch, joined, tasks)
        if kind == "choice":
            self._add_options(batch, cells, rows, tasks)
        else:
            step_items = np.concatenate(batches[start : start + self._num_ranks])
            self._add_references(batch, rows, tasks)
            batch["answer_limit"] = torch.from_numpy(self._answer_limits[cells])
            batch["max_new_tokens"] = int(self._answer_limits[self.plan.item_cell[step_items]].max())
        return batch

    def _add_inputs(self, batch: EvaluationBatch, joined: Ragged, tasks: list[TaskInfo]) -> None:
        ids = padded(joined, 0)
        segments = torch.from_numpy(np.arange(ids.shape[1]) < joined.lengths[:, None]).int()
        if self._soft_prompt_length:
            prompt = torch.arange(self._vocab_size, self._vocab_size + self._soft_prompt_length).expand(len(ids), -1)
            ids = torch.cat([prompt, ids], dim=1)
            segments = torch.cat([torch.ones_like(prompt, dtype=torch.int32), segments], dim=1)
            numbers = torch.tensor([self._prompt_ids.get(task.index, 0) for task in tasks], dtype=torch.int32)
            batch["task_ids"] = numbers[:, None] * segments
        batch["input_ids"], batch["input_segments"] = ids, segments

    def _add_options(self, batch: EvaluationBatch, cells: _Ints, rows: _Ints, tasks: list[TaskInfo]) -> None:
        first, count = self._options(cells, rows)
        batch["option_labels"] = padded(self._targets(ranges(first, count)), -100)
        batch["option_example"] = torch.from_numpy(np.repeat(np.arange(len(rows)), count))
        right = [right_options(self.corpus, task, row) for task, row in zip(tasks, rows.tolist(), strict=True)]
        batch["option_correct"] = torch.tensor([flag for flags in right for flag in flags])

    def _add_references(self, batch: EvaluationBatch, rows: _Ints, tasks: list[TaskInfo]) -> None:
        first, count = self._outputs(rows, tasks)
        batch["target_labels"] = padded(self._targets(first), -100)
        decode = self.corpus.tokenizer.decode
        batch["references"] = [
            [decode(self.corpus.segment(segment).tolist()) for segment in range(start, start + number)]
            for start, number in zip(first.tolist(), count.tolist(), strict=True)
        ]

    def _targets(self, segments: _Ints) -> Ragged:
        """Tokens of segments with end marks, within the decoder's length."""
        start = np.stack([take(self.corpus.segment_offsets, segments), np.full_like(segments, -1 - self._eos)], axis=1)
        length = np.ones_like(start)
        length[:, 0] = np.minimum(self._lengths(segments), self._decoder_length - 1)
        pieces = Pieces(start.ravel(), length.ravel(), 2 * np.arange(len(segments) + 1))
        return pieces.gather(self.corpus.tokens)

    def _options(self, cells: _Ints, rows: _Ints) -> tuple[_Ints, _Ints]:
        """First segment and number of the options that each item chooses from."""
        verbalizer = self.corpus.template_verbalizer[self._shown[cells]]
        first = np.where(verbalizer >= 0, verbalizer, take(self.corpus.row_option_segment, rows))
        return first, take(self.corpus.row_num_options, rows)

    def _outputs(self, rows: _Ints, tasks: list[TaskInfo]) -> tuple[_Ints, _Ints]:
        """First segment and number of the right outputs of each row."""
        fields = np.array([len(task.fields) for task in tasks], dtype=np.int64)
        return take(self.corpus.row_first_segment, rows) + fields, take(self.corpus.row_num_outputs, rows)

    def _input_lengths(self) -> _Ints:
        """Tokens of every item's joined input before any cut; joined in chunks, so that memory stays small."""
        shown = self._shown[self.plan.item_cell]
        rows = self.plan.item_row
        parts = [
            join_templates(self.corpus, rows[start : start + _CHUNK], shown[start : start + _CHUNK]).lengths
            for start in range(0, len(rows), _CHUNK)
        ]
        return np.concatenate(parts)

    def _target_sizes(self, is_choice: npt.NDArray[np.bool_]) -> tuple[_Ints, _Ints]:
        """Longest option or right output of every item, within the decoder's length, and its number of targets."""
        cells, rows, free = self.plan.item_cell, self.plan.item_row, np.flatnonzero(~is_choice)
        first, count = self._options(cells, rows)
        tasks = [self._tasks[cell] for cell in cells[free].tolist()]
        first[free], count[free] = self._outputs(rows[free], tasks)
        starts = np.concatenate([[0], np.cumsum(count)[:-1]])
        longest = np.maximum.reduceat(self._lengths(ranges(first, count)) + 1, starts)
        count[free] = 1
        return np.minimum(longest, self._decoder_length), count

    def _lengths(self, segments: _Ints) -> _Ints:
        offsets = self.corpus.segment_offsets
        return take(offsets, segments + 1) - take(offsets, segments)

    def _limits_of_cells(self) -> _Ints:
        """Tokens that an answer of each cell may have: a property of the task's sample, not of batch or ranks."""
        limits = []
        for sample in self.plan.samples:
            longest = self._lengths(ranges(*self._outputs(sample.rows, [sample.task] * len(sample.rows)))).max()
            limits.append(min(int(longest) + 1, self._max_new_tokens))
        return np.array([limits[cell.sample] for cell in self.plan.cells], dtype=np.int64)


def batch_bounds(sizes: Iterable[tuple[int, int, int]], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut items (input tokens, targets, tokens of the longest target) into batches under the token budget."""
    start, end, inputs, targets, longest = 0, 0, 0, 0, 0
    for input_tokens, number, tokens in sizes:
        wide, high, long = max(inputs, input_tokens), targets + number, max(longest, tokens)
        if end > start and ((end - start + 1) * wide > max_tokens or high * long > max_tokens):
            yield start, end
            start, wide, high, long = end, input_tokens, number, tokens
        inputs, targets, longest = wide, high, long
        end += 1
    if end > start:
        yield start, end


def padded(ragged: Ragged, fill: int) -> Tensor:
    """Sequences as int64 ``[n, longest]``."""
    lengths = ragged.lengths
    out = np.full((len(lengths), int(lengths.max())), fill, dtype=np.int64)
    out[np.arange(out.shape[1]) < lengths[:, None]] = ragged.tokens
    return torch.from_numpy(out)
