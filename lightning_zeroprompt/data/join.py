# SPDX-License-Identifier: Apache-2.0
"""Draws and a compiled corpus -> token arrays: templates joined with fields and options, targets, span corruption.

Pieces were tokenised apart, so joining is arithmetic on ranges. A :class:`JoinPlan` lists, for every example, the
ranges of the token file that make it up (*pieces*); lengths follow from the plan without touching a token, and one
gather turns any choice of its examples into tokens. Marks that stand in no file (end of text, sentinels) are pieces of
one token that carry their id.

Encoder text longer than the limit is cut by rule: first the end of the ``input`` field, then the end of other fields,
then the end of everything else, so instruction and options stay whole as long as they can. Span corruption (T5, arXiv
1910.10683, 3.1.4) takes 15 % of an input in spans of about 3 tokens. The input is cut into equal stretches, one span
at a random place in each, which fixes both lengths in closed form; T5's random segmentation has the same mean and
needs a loop or a sort an example.

Everything is vectorised over examples. Measured (processor time, one core, 1,000 tasks, a mean of 74 encoder tokens):
0.7 microseconds an example for the plan and 0.6 for the gather, after 0.7 for the draw; of 10,000 tasks, whose 870 MB
of files do not fit in the processor's caches, 0.9, 0.8 and 0.5.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_zeroprompt.data.corpus import take
from lightning_zeroprompt.data.permutation import SHORT, below, mix64, permute

if TYPE_CHECKING:
    from lightning_zeroprompt.data.corpus import Corpus
    from lightning_zeroprompt.data.mixture import Draws

__all__ = [
    "JoinPlan",
    "Joiner",
    "OptionOrder",
    "Pieces",
    "Ragged",
    "TemplateSource",
    "join_templates",
    "ranges",
    "shuffled_options",
    "span_lengths",
    "template_pieces",
]

OptionOrder = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""(example, its number of options, place) -> which option stands there; int64 arrays of one shape."""

_NOISE_DENSITY = 0.15
_MEAN_SPAN = 3.0
_GATHERED = 1 << 15
_OPTIONS = -1
_INPUT = -2


class TemplateSource(Protocol):
    """The arrays of :class:`~lightning_zeroprompt.data.corpus.Corpus` that joining templates reads."""

    template_codes: NDArray[np.int64]
    template_offsets: NDArray[np.int64]
    template_separator: NDArray[np.int64]
    template_verbalizer: NDArray[np.int64]
    row_first_segment: NDArray[np.signedinteger[Any]]
    row_option_segment: NDArray[np.signedinteger[Any]]
    row_num_options: NDArray[np.signedinteger[Any]]
    segment_offsets: NDArray[np.signedinteger[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Ragged:
    """Token sequences of different lengths, end to end.

    Attributes:
        tokens: int32 [total].
        offsets: int64 [n + 1]; sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, int64 [n]."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """For each sequence the pieces it is made of.

    Attributes:
        start: int64 [p], first token in the corpus, or ``-1 - id`` for a mark, which is one token long.
        length: int64 [p], tokens of the piece; 0 where nothing is left of it.
        offsets: int64 [n + 1], pieces of sequence i are ``offsets[i]:offsets[i + 1]``.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def totals(self) -> NDArray[np.int64]:
        """Tokens of each sequence, int64 [n]."""
        ends = np.zeros(len(self.length) + 1, dtype=np.int64)
        np.cumsum(self.length, out=ends[1:])
        return np.diff(ends[self.offsets])

    def gather(self, tokens: NDArray[Any], examples: NDArray[np.int64] | None = None) -> Ragged:
        """Read the tokens of the given sequences.

        Args:
            tokens: The corpus' tokens, any unsigned integers.
            examples: Which sequences, in which order; all when None.
        """
        if examples is None:
            start, length, offsets = self.start, self.length, self.offsets
        else:
            chosen = ranges(self.offsets[examples], self.offsets[examples + 1] - self.offsets[examples])
            start, length = self.start[chosen], self.length[chosen]
            offsets = _ends(self.offsets[examples + 1] - self.offsets[examples])
        ends = _ends(length)
        out = np.empty(int(ends[-1]), dtype=np.int32)
        before = np.maximum(start, 0) - ends[:-1]
        # In parts whose places stay in the cache: a window at once takes 1.4 times as long.
        borders = np.append(np.searchsorted(ends, np.arange(0, len(out), _GATHERED)), len(length)).tolist()
        for first, last in itertools.pairwise(borders):
            begin, end = int(ends[first]), int(ends[last])
            places = np.repeat(before[first:last], length[first:last])
            places += np.arange(begin, end)
            out[begin:end] = tokens[places]
        marks = np.flatnonzero(start < 0)
        out[ends[marks]] = -1 - start[marks]
        return Ragged(out, ends[offsets])


@dataclasses.dataclass(frozen=True, slots=True)
class JoinPlan:
    """What the encoder reads and the decoder is to write, for each draw.

    Attributes:
        encoder: Pieces of the inputs, each ending in the end mark.
        decoder: Pieces of the targets, each ending in the end mark.
        encoder_lengths: int64 [n].
        decoder_lengths: int64 [n].
        truncated: Number of draws whose encoder text or target was cut.
    """

    encoder: Pieces
    decoder: Pieces
    encoder_lengths: NDArray[np.int64]
    decoder_lengths: NDArray[np.int64]
    truncated: int


def _ends(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[0, l0, l0 + l1, ...]."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The integers of all ranges [start, start + length), end to end."""
    ends = _ends(lengths)
    return np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(starts - ends[:-1], lengths)


def span_lengths(tokens: NDArray[np.int64], max_spans: int = 100) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Noise tokens and spans of inputs under span corruption.

    Args:
        tokens: int64, lengths of the inputs, at least 1.
        max_spans: Number of sentinels there are.

    Returns:
        (noise, spans), int64 of the same shape: the encoder reads ``tokens - noise + spans`` tokens and the end mark,
        the decoder writes ``noise + spans`` and the end mark.

    Example:
        >>> [x.tolist() for x in span_lengths(np.array([1, 20, 200]))]
        [[1, 3, 30], [1, 1, 10]]
    """
    noise = np.maximum(1, np.floor(tokens * _NOISE_DENSITY + 0.5)).astype(np.int64)
    spans = np.maximum(1, np.floor(noise / _MEAN_SPAN + 0.5)).astype(np.int64)
    return noise, np.minimum(spans, max_spans)


class Joiner:
    """Joins draws of one corpus under fixed limits.

    Args:
        corpus: A compiled corpus.
        encoder_length: Largest number of encoder tokens of an example, end mark included.
        decoder_length: Largest number of target tokens, end mark included.

    Raises:
        ValueError: A limit that leaves no room for a token and the end mark.
    """

    def __init__(self, corpus: "Corpus", *, encoder_length: int, decoder_length: int) -> None:
        for name, value, least in (("encoder_length", encoder_length, 2), ("decoder_length", decoder_length, 3)):
            if value < least:
                raise ValueError(f"{name} is {value}; an example needs at least {least} (its content and the end mark)")
        self.corpus = corpus
        self.encoder_length = encoder_length
        self.decoder_length = decoder_length
        self._num_fields = np.asarray([len(task.fields) for task in corpus.tasks], dtype=np.int64)
        self._eos = corpus.eos_id
        self._sentinels = np.asarray(corpus.sentinel_ids, dtype=np.int64)
        sizes = np.arange(1, 8 * (encoder_length + 8))
        noise, spans = span_lengths(sizes, len(self._sentinels))
        fits = (sizes - noise + spans + 1 <= encoder_length) & (noise + spans + 1 <= decoder_length)
        self._longest_noised = int(sizes[fits].max(initial=1))
        self._offsets = np.asarray(corpus.segment_offsets)

    def plan(self, draws: "Draws") -> JoinPlan:
        """Pieces and lengths of ``draws``; touches no token."""
        first = take(self.corpus.row_first_segment, draws.row)
        # Of an input of one token nothing would be left to read, so such a draw trains the task.
        noised = draws.denoise & (self._offsets[first + 1] - self._offsets[first] > 1)
        if not noised.any():
            encoder, decoder, cut = self._task_pieces(draws, first, np.arange(len(draws)))
        else:
            plain_at, noised_at = np.flatnonzero(~noised), np.flatnonzero(noised)
            plain_encoder, plain_decoder, cut = self._task_pieces(draws, first[plain_at], plain_at)
            noised_encoder, noised_decoder, noised_cut = self._noise_pieces(first[noised_at], draws.key[noised_at])
            encoder = _interleave(plain_at, plain_encoder, noised_at, noised_encoder)
            decoder = _interleave(plain_at, plain_decoder, noised_at, noised_decoder)
            cut += noised_cut
        return JoinPlan(encoder, decoder, encoder.totals(), decoder.totals(), cut)

    def join(self, draws: "Draws") -> tuple[Ragged, Ragged]:
        """Encoder inputs and targets of ``draws``, both with end marks."""
        plan = self.plan(draws)
        tokens = np.asarray(self.corpus.tokens)
        return plan.encoder.gather(tokens), plan.decoder.gather(tokens)

    def _task_pieces(
        self, draws: "Draws", first: NDArray[np.int64], at: NDArray[np.int64]
    ) -> tuple[Pieces, Pieces, int]:
        """Template and target pieces of the draws ``at``."""
        corpus, row, template = self.corpus, draws.row[at], draws.template[at]
        order = shuffled_options(draws.key[at])
        encoder, cut = template_pieces(corpus, row, template, order, self.encoder_length, self._eos)
        label = take(corpus.row_label, row)
        verbalizer = np.asarray(corpus.template_verbalizer)[template]
        target = np.where(
            (verbalizer >= 0) & (label >= 0), verbalizer + label, first + self._num_fields[draws.task[at]]
        )
        start = take(self._offsets, target)
        whole = take(self._offsets, target + 1) - start
        length = np.minimum(whole, self.decoder_length - 1)
        count = len(start)
        starts = np.full((count, 2), -1 - self._eos, dtype=np.int64)
        lengths = np.ones((count, 2), dtype=np.int64)
        starts[:, 0], lengths[:, 0] = start, length
        decoder = Pieces(starts.ravel(), lengths.ravel(), np.arange(count + 1, dtype=np.int64) * 2)
        return encoder, decoder, int((cut | (whole > length)).sum())

    def _noise_pieces(self, first: NDArray[np.int64], key: NDArray[np.uint64]) -> tuple[Pieces, Pieces, int]:
        """Pieces of span corruption over the inputs whose segments are ``first``."""
        begin = take(self._offsets, first)
        whole = take(self._offsets, first + 1) - begin
        size = np.minimum(whole, self._longest_noised)
        noise, spans = span_lengths(size, len(self._sentinels))
        ends = _ends(spans)
        owner = np.repeat(np.arange(len(first)), spans)
        number = np.arange(int(ends[-1]), dtype=np.int64) - ends[owner]
        size_of, noise_of, spans_of = size[owner], noise[owner], spans[owner]
        left = size_of * number // spans_of
        room = size_of * (number + 1) // spans_of - left
        length = noise_of * (number + 1) // spans_of - noise_of * number // spans_of
        left += below(mix64(key[owner] + number.astype(np.uint64)), room - length + 1)
        sentinel = -1 - self._sentinels[number]
        right = left + length
        base = begin[owner]
        # Encoder: (kept, sentinel) for each span, then the kept tail and the end mark. Decoder: (sentinel, span) ...,
        # end mark.
        previous = np.concatenate([[0], right[:-1]])
        previous[ends[:-1]] = 0
        pairs = 2 * (np.arange(len(owner)) + owner)
        total = 2 * (len(owner) + len(first))
        start = np.empty(total, dtype=np.int64)
        lengths = np.ones(total, dtype=np.int64)
        start[pairs], lengths[pairs] = base + previous, left - previous
        start[pairs + 1] = sentinel
        last = 2 * (ends[1:] + np.arange(len(first)))
        tail = right[ends[1:] - 1]
        start[last], lengths[last] = begin + tail, size - tail
        start[last + 1] = -1 - self._eos
        encoder = Pieces(start, lengths, 2 * (ends + np.arange(len(first) + 1)))
        pairs -= owner
        start = np.empty(total - len(first), dtype=np.int64)
        lengths = np.ones(len(start), dtype=np.int64)
        start[pairs] = sentinel
        start[pairs + 1], lengths[pairs + 1] = base + left, length
        start[last - np.arange(len(first))] = -1 - self._eos
        decoder = Pieces(start, lengths, 2 * ends + np.arange(len(first) + 1))
        return encoder, decoder, int((whole > size).sum())


def _interleave(a_at: NDArray[np.int64], a: Pieces, b_at: NDArray[np.int64], b: Pieces) -> Pieces:
    """Sequences ``a`` at the places ``a_at`` and ``b`` at ``b_at``, in one list."""
    counts = np.empty(len(a_at) + len(b_at), dtype=np.int64)
    counts[a_at], counts[b_at] = np.diff(a.offsets), np.diff(b.offsets)
    offsets = _ends(counts)
    start = np.empty(int(offsets[-1]), dtype=np.int64)
    length = np.empty_like(start)
    for at, part in ((a_at, a), (b_at, b)):
        where = ranges(offsets[at], counts[at])
        start[where], length[where] = part.start, part.length
    return Pieces(start, length, offsets)


def shuffled_options(key: NDArray[np.uint64]) -> OptionOrder:
    """The order of options that random words name.

    Args:
        key: uint64, one word an example.
    """

    def order(example: NDArray[np.int64], count: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
        return permute(count, key[example], place, rounds=SHORT)

    return order


def template_pieces(
    corpus: TemplateSource,
    row: NDArray[np.int64],
    template: NDArray[Any],
    order: OptionOrder | None,
    limit: int | None,
    eos: int,
) -> tuple[Pieces, NDArray[np.bool_]]:
    """Pieces of (row, template) pairs.

    Args:
        corpus: A corpus, or other rows and templates in its layout.
        row: Row of each pair, [n].
        template: Template of each pair, [n].
        order: Order of the options; stored order when None.
        limit: Most tokens, end mark included; cut by the rule in the module's text. None means no limit.
        eos: The end mark.

    Returns:
        The pieces, end mark included, and bool [n], which of the pairs were cut.
    """
    template_offsets = np.asarray(corpus.template_offsets)
    code_start = template_offsets[template]
    # The end mark is expanded as one more code, then recognised by its place at the end of its example.
    num_codes = template_offsets[template + 1] - code_start + 1
    ends = _ends(num_codes)
    owner = np.repeat(np.arange(len(row)), num_codes)
    where = ranges(code_start, num_codes)
    last = ends[1:] - 1
    where[last] = 0
    code = np.asarray(corpus.template_codes)[where]
    code[last] = 0
    options_at = np.flatnonzero(code == _OPTIONS)
    is_field = code <= _INPUT
    segment = code
    if len(options_at):
        num_options = take(corpus.row_num_options, row[owner[options_at]])
        # An option and its separator take turns, so n options are 2 n - 1 pieces.
        copies = np.ones(len(code), dtype=np.int64)
        copies[options_at] = np.maximum(2 * num_options - 1, 0)
        expanded = _ends(copies)
        places = ranges(expanded[options_at], copies[options_at])
        member = np.repeat(np.arange(len(options_at)), copies[options_at])
        rank = places - expanded[options_at][member]
        owner_of = owner[options_at][member]
        ends = expanded[ends]
        owner, segment, is_field = np.repeat(owner, copies), np.repeat(code, copies), np.repeat(is_field, copies)
        code = segment.copy()
        last = ends[1:] - 1
        shown = rank // 2
        if order is not None:
            shown = order(owner_of, num_options[member], shown)
        verbalizer = np.asarray(corpus.template_verbalizer)[template[owner_of]]
        base = np.where(verbalizer >= 0, verbalizer, take(corpus.row_option_segment, row[owner_of]))
        separator = np.asarray(corpus.template_separator)[template[owner_of]]
        segment[places] = np.where(rank % 2 == 0, base + shown, separator)
    field_at = np.flatnonzero(is_field)
    segment = segment.copy() if segment is code else segment
    segment[field_at] = take(corpus.row_first_segment, row[owner[field_at]]) + (_INPUT - code[field_at])
    start = take(corpus.segment_offsets, segment)
    length = take(corpus.segment_offsets, segment + 1) - start
    start[last], length[last] = -1 - eos, 1
    pieces = Pieces(start, length, ends)
    if limit is None:
        return pieces, np.zeros(len(row), dtype=np.bool_)
    excess = np.maximum(pieces.totals() - limit, 0)
    cut = excess > 0
    if cut.any():
        affected = np.flatnonzero(cut[owner])
        affected = affected[~np.isin(affected, last)]
        kind = np.where(code[affected] == _INPUT, 0, np.where(code[affected] < _INPUT, 1, 2))
        for rule in range(3):
            at = affected[kind == rule]
            # Tokens of this rule's pieces that come after a piece within its example are cut before the piece itself.
            after = np.cumsum(length[at][::-1])[::-1] - length[at]
            borders = np.searchsorted(owner[at], np.arange(len(row) + 1))
            suffix = np.append(after + length[at], 0)
            after -= suffix[borders[owner[at] + 1]]
            removed = np.clip(excess[owner[at]] - after, 0, length[at])
            length[at] -= removed
            excess -= np.bincount(owner[at], weights=removed, minlength=len(row)).astype(np.int64)
    return pieces, cut


def join_templates(
    corpus: "Corpus",
    rows: Sequence[int] | NDArray[np.int64],
    templates: Sequence[int] | NDArray[Any],
    option_keys: NDArray[np.uint64] | None = None,
    *,
    max_tokens: int | None = None,
) -> Ragged:
    """Encoder inputs of (row, template) pairs, with the end mark.

    Args:
        corpus: A compiled corpus.
        rows: Rows of the corpus, [n].
        templates: Global indices of templates that belong to the rows' tasks, or fit their fields, [n].
        option_keys: uint64 [n], decides the order of the options; stored order when None.
        max_tokens: Limit, end mark included; cut by the rule in the module's text. None means no limit.

    Raises:
        ValueError: The two lists differ in length.
    """
    row, template = np.asarray(rows, dtype=np.int64), np.asarray(templates, dtype=np.int64)
    if row.shape != template.shape:
        raise ValueError(f"{len(row)} rows with {len(template)} templates; give one template a row")
    order = None if option_keys is None else shuffled_options(option_keys)
    pieces, _ = template_pieces(corpus, row, template, order, max_tokens, corpus.eos_id)
    return pieces.gather(np.asarray(corpus.tokens))
