# SPDX-License-Identifier: Apache-2.0
"""(prompt, example) pairs -> batches of tokens, joined as the compiler's corpus joins its templates.

A pool and the prompts of a search are laid out like a small corpus (:class:`PromptEncoder`): the literal texts of a
prompt are tokenised once, whatever the number of examples, and a text that several prompts share once for all of them;
after that a batch is arithmetic on ranges and one gather (:mod:`~lightning_zeroprompt.data.join`). So a prompt gives
the very tokens that training and evaluation would give its template, cuts of long inputs included.

Pairs are sorted by the length of their answers and inputs and cut into batches under a budget of padded tokens
(:class:`PairBatches`), as evaluation does. A batch is a dictionary that :func:`~lightning_zeroprompt.models.scoring.
score_choice` can read (B pairs, N options)::

    kind              "choice" or "generation"
    input_ids         int64 [B, L], 0 = padding
    input_segments    int32 [B, L], 1 = token, 0 = padding
    task_ids          int32 [B, L], only with soft prompts: number of the prompt, 0 = none
    option_labels     int64 [N, T], -100 = padding: the options with end marks; of free answers the first right output
    option_example    int64 [N], sorted
    option_correct    bool [N]                                                                           choice
    answer_limit      int64 [B]: tokens that an answer may have, end mark included                       generation
    max_new_tokens    int: the largest of them                                                           generation

Alternative: rendering and tokenising each pair as text, which tokenises every input once a prompt and splits words at
the borders of pieces otherwise than training did. Cost: 0.14 ms a prompt, and a pair of 50 tokens 2.7 microseconds to
lay out and 1.4 to gather and pad (processor time, one busy core).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from lightning_zeroprompt.data.evaluation import EvaluationBatch, batch_bounds, padded
from lightning_zeroprompt.data.join import Pieces, ranges, template_pieces
from lightning_zeroprompt.data.permutation import SHORT, mix64, permute, stream_key
from lightning_zeroprompt.data.task import OPTIONS
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.pool import ExamplePool

__all__ = ["EncodingSettings", "PairBatches", "PreparedPrompt", "PromptEncoder"]

_Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSettings:
    """Limits of a pair, and the soft prompts there are.

    Attributes:
        encoder_length: Most encoder tokens, soft prompt and end mark included; longer inputs lose the end of their
            fields. A prompt that leaves no room for a field beside an example's options is refused.
        decoder_length: Most tokens of an option or answer, end mark included.
        max_prompt_tokens: Most tokens of a prompt's literal text; None: no limit of its own.
        max_new_tokens: Most tokens that are generated.
        soft_prompt_length: Prompt positions in front of every input.
        soft_prompts: Number of the soft prompt (0 = none) behind each name that a genome may carry; ``""`` is the
            run's default.

    Raises:
        ValueError: A limit without room, or no default soft prompt.
    """

    encoder_length: int = 512
    decoder_length: int = 128
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 128
    soft_prompt_length: int = 0
    soft_prompts: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"": 0})

    def __post_init__(self) -> None:
        if self.encoder_length - self.soft_prompt_length < 2 or self.decoder_length < 2 or self.max_new_tokens < 1:
            raise ValueError(
                f"encoder_length={self.encoder_length} less soft_prompt_length={self.soft_prompt_length}, "
                f"decoder_length={self.decoder_length}, max_new_tokens={self.max_new_tokens}: a text needs 2 tokens "
                "(content and end mark), an answer 1"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens={self.max_prompt_tokens}: give at least 1, or None for no limit")
        if "" not in self.soft_prompts:
            raise ValueError(f"soft_prompts name {sorted(self.soft_prompts)}; the run's default '' is missing, add it")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPrompt:
    """A prompt as pieces of a :class:`PromptEncoder`.

    Attributes:
        key: Sha256 hex of all that the model reads and writes with it: prompts of one key have one score.
        codes: Pieces of the text; negative ones are placeholders, as in the corpus.
        separator: Piece between two options.
        verbalizer: Piece of the first label word, or -1.
        order: Order of the options; ``"given"`` where none are shown.
        soft_prompt: Number of the soft prompt.
        num_tokens: Tokens of the literal text.
    """

    key: str
    codes: tuple[int, ...]
    separator: int
    verbalizer: int
    order: str
    soft_prompt: int
    num_tokens: int


@dataclasses.dataclass(slots=True)
class _Table:
    """Rows and prompts in the corpus' layout."""

    template_codes: _Ints
    template_offsets: _Ints
    template_separator: _Ints
    template_verbalizer: _Ints
    row_first_segment: npt.NDArray[np.signedinteger[Any]]
    row_option_segment: npt.NDArray[np.signedinteger[Any]]
    row_num_options: npt.NDArray[np.signedinteger[Any]]
    segment_offsets: npt.NDArray[np.signedinteger[Any]]


class PromptEncoder:
    """Turns prompts over one pool into pieces and batches.

    Args:
        pool: The examples.
        settings: Limits and soft prompts.

    Attributes:
        slots: int64 [R], targets a row: its options, or 1 for a free answer.
    """

    def __init__(self, pool: ExamplePool, settings: EncodingSettings | None = None) -> None:
        self.pool, self.settings = pool, settings or EncodingSettings()
        self.slots = pool.num_options if pool.kind == "choice" else np.ones(len(pool), dtype=np.int64)
        self._tokens, self._offsets = pool.tokens, pool.offsets
        self._words: dict[tuple[str, ...], int] = {}
        sizes = np.diff(pool.offsets)
        count = pool.num_options
        starts = np.cumsum(count) - count
        options = sizes[ranges(pool.first_option, count)]
        sums = np.add.reduceat(np.append(options, 0), starts) if len(options) else np.zeros_like(count)
        self._option_tokens = np.where(count > 0, sums, 0)
        first_answer = pool.first_piece + len(pool.fields)
        longest = sizes[ranges(first_answer, pool.num_outputs)].max(initial=0)
        self.answer_limit = min(int(longest) + 1, self.settings.max_new_tokens)
        # Random words that belong to the input, not to its place in a pool.
        self._keys = np.array([int.from_bytes(key[:8], "little") for key in pool.input_keys()], dtype=np.uint64)

    def option_key(self, row: int) -> int:
        """The key of a row for :func:`~lightning_zeroprompt.prompts.genome.option_permutation`."""
        return int(self._keys[row])

    def prepare(self, prompts: Sequence[PromptGenome]) -> list[PreparedPrompt | str]:
        """Tokenise prompts, all new texts in one call; in place of a prompt that cannot be used stands the reason."""
        allowed = {*self.pool.fields, OPTIONS} if self.pool.kind == "choice" else set(self.pool.fields)
        reasons = [self._refusal(prompt, allowed) for prompt in prompts]
        usable = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if reason is None]
        texts = [part.text for prompt in usable for part in prompt.segments if not part.is_placeholder]
        self._add([(text,) for text in (*texts, *(prompt.option_separator for prompt in usable))])
        self._add([prompt.verbalizer for prompt in usable if prompt.verbalizer is not None])
        prepared: list[PreparedPrompt | str] = []
        for prompt, reason in zip(prompts, reasons, strict=True):
            if reason is not None:
                prepared.append(reason)
                continue
            codes = tuple(
                self._words[(part.text,)]
                if not part.is_placeholder
                else -1
                if part.text == OPTIONS
                else -2 - self.pool.fields.index(part.text)
                for part in prompt.segments
            )
            verbalizer = -1 if prompt.verbalizer is None else self._words[prompt.verbalizer]
            prepared.append(self._finish(prompt, codes, self._words[(prompt.option_separator,)], verbalizer))
        return prepared

    def _refusal(self, prompt: PromptGenome, allowed: Iterable[str]) -> str | None:
        num_labels = None if self.pool.labels is None else len(self.pool.labels)
        reasons = prompt.check(fields=set(allowed), num_labels=num_labels)
        if reasons:
            return reasons[0]
        if not set(prompt.placeholders()) - {OPTIONS}:
            return "lost placeholder input"
        if prompt.soft_prompt not in self.settings.soft_prompts:
            return f"unknown soft prompt {prompt.soft_prompt}"
        return None

    def _add(self, words: Sequence[tuple[str, ...]]) -> None:
        """Append new pieces; the words of one tuple lie one after another."""
        new = [entry for entry in dict.fromkeys(words) if entry not in self._words]
        if not new:
            return
        ids = iter(self.pool.tokenizer.encode_batch([text for entry in new for text in entry]))
        pieces: list[list[int]] = []
        first = len(self._offsets) - 1
        for entry in new:
            self._words[entry] = first + len(pieces)
            pieces += [next(ids) for _ in entry]
        flat = np.fromiter((token for piece in pieces for token in piece), np.int32)
        ends = self._offsets[-1] + np.cumsum([len(piece) for piece in pieces])
        self._tokens, self._offsets = np.concatenate([self._tokens, flat]), np.concatenate([self._offsets, ends])

    def _finish(
        self, prompt: PromptGenome, codes: tuple[int, ...], separator: int, verbalizer: int
    ) -> PreparedPrompt | str:
        settings, pool = self.settings, self.pool
        lists = codes.count(-1)
        literal = [code for code in codes if code >= 0]
        num_tokens = sum(self._size(code) for code in literal)
        if settings.max_prompt_tokens is not None and num_tokens > settings.max_prompt_tokens:
            return f"too long: {num_tokens} tokens of {settings.max_prompt_tokens}"
        block = np.zeros(1, dtype=np.int64)
        labels = range(verbalizer, verbalizer + len(prompt.verbalizer or ())) if verbalizer >= 0 else range(0)
        if lists:
            shown = sum(self._size(word) for word in labels) if verbalizer >= 0 else self._option_tokens
            block = lists * (shown + self._size(separator) * np.maximum(pool.num_options - 1, 0))
        fixed = num_tokens + int(np.max(block)) + settings.soft_prompt_length + 1
        if fixed >= settings.encoder_length:
            return f"too long: {fixed} tokens without the input of {settings.encoder_length}"
        order = prompt.option_order if lists else "given"
        content: list[Any] = [self._piece(code) if code >= 0 else code for code in codes]
        content += [self._piece(separator) if lists else None, [self._piece(word) for word in labels], order]
        number = settings.soft_prompts[prompt.soft_prompt] if settings.soft_prompt_length else 0
        key = hashlib.sha256(json.dumps([content, number]).encode()).hexdigest()
        return PreparedPrompt(
            key=key,
            codes=codes,
            separator=separator,
            verbalizer=verbalizer,
            order=order,
            soft_prompt=number,
            num_tokens=num_tokens,
        )

    def _size(self, piece: int) -> int:
        return int(self._offsets[piece + 1] - self._offsets[piece])

    def _piece(self, piece: int) -> list[int]:
        ids: list[int] = self._tokens[self._offsets[piece] : self._offsets[piece + 1]].tolist()
        return ids

    def batches(
        self, prompts: Sequence[PreparedPrompt], pair_prompt: _Ints, pair_row: _Ints, max_tokens: int
    ) -> "PairBatches":
        """Batches of pairs, built when they are asked for.

        Args:
            prompts: Prompts of this encoder.
            pair_prompt: int64 [n], position in ``prompts``.
            pair_row: int64 [n], row of the pool.
            max_tokens: Padded tokens a batch, of the encoder and, apart, of the targets.
        """
        pool = self.pool
        codes = [prompt.codes for prompt in prompts]
        table = _Table(
            template_codes=np.array([code for entry in codes for code in entry], dtype=np.int64),
            template_offsets=np.cumsum([0, *map(len, codes)]),
            template_separator=np.array([prompt.separator for prompt in prompts], dtype=np.int64),
            template_verbalizer=np.array([prompt.verbalizer for prompt in prompts], dtype=np.int64),
            row_first_segment=pool.first_piece,
            row_option_segment=pool.first_option,
            row_num_options=pool.num_options,
            segment_offsets=self._offsets,
        )
        orders = [prompt.order for prompt in prompts]
        is_reversed = np.array([order == "reversed" for order in orders])[pair_prompt]
        is_shuffled = np.array([order.startswith("shuffled") for order in orders])[pair_prompt]
        streams = [_order_key(int(order.partition(":")[2]) if order.startswith("shuffled") else 0) for order in orders]
        words = mix64(self._keys[pair_row] ^ np.array(streams, dtype=np.uint64)[pair_prompt])

        def shown(pair: _Ints, count: _Ints, place: _Ints) -> _Ints:
            option = np.where(is_reversed[pair], count - 1 - place, place)
            mixed = np.flatnonzero(is_shuffled[pair])
            option[mixed] = permute(count[mixed], words[pair[mixed]], place[mixed], rounds=SHORT)
            return option

        eos = pool.tokenizer.eos_id
        room = self.settings.encoder_length - self.settings.soft_prompt_length
        inputs, _ = template_pieces(table, pair_row, pair_prompt, shown, room, eos)
        if pool.kind == "choice":
            verbalizer = table.template_verbalizer[pair_prompt]
            first = np.where(verbalizer >= 0, verbalizer, pool.first_option[pair_row])
        else:
            first = pool.first_piece[pair_row] + len(pool.fields)
        target = ranges(first, self.slots[pair_row])
        start = np.stack([self._offsets[target], np.full_like(target, -1 - eos)], axis=1)
        length = np.ones_like(start)
        length[:, 0] = np.minimum(self._offsets[target + 1] - start[:, 0], self.settings.decoder_length - 1)
        targets = Pieces(start.ravel(), length.ravel(), 2 * np.arange(len(target) + 1))
        numbers = np.array([prompt.soft_prompt for prompt in prompts], dtype=np.int32)[pair_prompt]
        return PairBatches(self, self._tokens, inputs, targets, pair_row, numbers, max_tokens)


@functools.lru_cache(maxsize=4096)
def _order_key(seed: int) -> np.uint64:
    return stream_key(seed, "option order")


class PairBatches(Sequence[EvaluationBatch]):
    """The batches of some pairs; each is built when it is asked for, so ranks that share them build their own alone.

    Attributes:
        members: Pairs of each batch, int64.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        tokens: npt.NDArray[np.int32],
        inputs: Pieces,
        targets: Pieces,
        pair_row: _Ints,
        numbers: npt.NDArray[np.int32],
        max_tokens: int,
    ) -> None:
        self._encoder, self._tokens, self._inputs, self._targets = encoder, tokens, inputs, targets
        self._rows, self._numbers = pair_row, numbers
        self._count = encoder.slots[pair_row]
        self._first = np.cumsum(self._count) - self._count
        longest = np.maximum.reduceat(targets.totals(), self._first)
        lengths = inputs.totals() + encoder.settings.soft_prompt_length
        order = np.lexsort((np.arange(len(pair_row)), -lengths, -np.ceil(np.log2(longest))))
        sizes = zip(lengths[order].tolist(), self._count[order].tolist(), longest[order].tolist(), strict=True)
        self.members: list[_Ints] = [order[start:end] for start, end in batch_bounds(sizes, max_tokens)]

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> EvaluationBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[EvaluationBatch]: ...
    def __getitem__(self, index: int | slice) -> EvaluationBatch | list[EvaluationBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        pairs = self.members[index]
        rows, count = self._rows[pairs], self._count[pairs]
        pool, settings = self._encoder.pool, self._encoder.settings
        joined = self._inputs.gather(self._tokens, pairs)
        ids = padded(joined, 0)
        segments = torch.from_numpy(np.arange(ids.shape[1]) < joined.lengths[:, None]).int()
        batch: EvaluationBatch = {"kind": pool.kind}
        if settings.soft_prompt_length:
            vocabulary = pool.tokenizer.vocab_size
            prompt = torch.arange(vocabulary, vocabulary + settings.soft_prompt_length).expand(len(ids), -1)
            ids = torch.cat([prompt, ids], dim=1)
            segments = torch.cat([torch.ones_like(prompt, dtype=torch.int32), segments], dim=1)
            batch["task_ids"] = torch.from_numpy(self._numbers[pairs])[:, None] * segments
        batch["input_ids"], batch["input_segments"] = ids, segments
        batch["option_labels"] = padded(self._targets.gather(self._tokens, ranges(self._first[pairs], count)), -100)
        batch["option_example"] = torch.from_numpy(np.repeat(np.arange(len(rows)), count))
        if pool.kind == "choice":
            batch["option_correct"] = torch.from_numpy(pool.right[ranges(pool.option_offsets[rows], count)])
        else:
            batch["max_new_tokens"] = self._encoder.answer_limit
            batch["answer_limit"] = torch.full((len(rows),), self._encoder.answer_limit)
        return batch
