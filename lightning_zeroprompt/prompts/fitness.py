# SPDX-License-Identifier: Apache-2.0
"""Fitness of prompts: batched, cached scores of (prompt, example) pairs.

*Fitness* is the log-likelihood margin of the right option (the sum rule of
:mod:`~lightning_zeroprompt.models.scoring`: best right option less best wrong one, nats), and for free answers the mean
log-likelihood a token of the canonical output. It moves where accuracy does not: among 32 examples one right answer is
3 points, and two prompts that differ are often level (GPS, arXiv 2210.17041, selects by such accuracies). *Outcome* is
what users care about: accuracy, or the task's exact match or ROUGE-L over generated text, which is computed only when
asked for.

What is scored and kept is each target's log-probability. The cache is keyed by all that the model reads with a prompt
(:attr:`~lightning_zeroprompt.prompts.encoding.PreparedPrompt.key`), the example, and the model step; genomes that spell
one prompt in two ways share it, and relabelling (pseudo-labels) scores nothing anew. The encoder runs once a pair, all
its options read the same encoder states.

A prompt that cannot be used (empty, too long, without the input, ...) or gets a score that is not finite is refused
with a reason and counted; it never raises, because a search produces such prompts all the time.

Deterministic: the same calls on the same state give the same bits (CPU, float32). Batches depend on what is cached, so
a resumed search restores the cache with :meth:`PromptScorer.load_state_dict`.

Cost: 7 microseconds a pair beside the model's time (``benchmarks/prompt_scoring.py`` has both); the cache takes 4 bytes
a prompt and option and 5 a prompt and example.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_zeroprompt.data.join import ranges
from lightning_zeroprompt.metrics import exact_match, rouge_l
from lightning_zeroprompt.prompts.encoding import EncodingSettings, PreparedPrompt, PromptEncoder
from lightning_zeroprompt.prompts.forward import Forward
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.pool import UNLABELLED, ExamplePool, PoolError

__all__ = ["PromptScorer", "PromptScores", "ScoringCounts"]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]
_PAIRS_AT_ONCE = 1 << 15
NOT_FINITE = "score is not finite"
"""Reason for refusing a prompt that the model answers with NaN or infinity."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptScores:
    """Scores of P prompts on R examples.

    Attributes:
        fitness: float32 [P, R], larger is better; NaN where the prompt is refused.
        outcome: float32 [P, R], accuracy (0 or 1), exact match or ROUGE-L; NaN where the prompt is refused or, for
            free answers, outcomes were not asked for.
        refused: For each prompt the reason for not scoring it, or None.
    """

    fitness: _Floats
    outcome: _Floats
    refused: tuple[str | None, ...]


@dataclasses.dataclass(slots=True)
class ScoringCounts:
    """What a scorer has done.

    Attributes:
        requested: Pairs that were asked for, those of refused prompts left out.
        scored: Pairs that the model has scored: what a budget counts.
        generated: Pairs that the model has answered with text.
        refused: Distinct prompts refused, by the reason's first words.
    """

    requested: int = 0
    scored: int = 0
    generated: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(slots=True)
class _Entry:
    """Cached scores of one prompt: log-probabilities [O], which rows have them [R], outcomes of free answers [R]."""

    totals: _Floats
    done: npt.NDArray[np.bool_]
    outcome: _Floats


class PromptScorer:
    """Scores prompts on the examples of one pool with one model.

    Register it as DEAP's ``map`` to score a generation in one call:
    ``toolbox.register("map", lambda _, genomes: scorer.score(genomes).fitness.mean(1))``.

    Args:
        pool: The examples of one part: search, confirm or test.
        forward: Runs the model.
        settings: Limits and soft prompts.
        max_tokens: Padded tokens a batch, of the encoder and, apart, of the targets.
        step: Training step of the model; scores of another step are not used.

    Attributes:
        pool: The examples, with their present labels.
        counts: What has been done so far.

    Raises:
        ValueError: ``max_tokens`` is below 1.
    """

    def __init__(
        self,
        pool: ExamplePool,
        forward: Forward,
        settings: EncodingSettings | None = None,
        *,
        max_tokens: int = 8192,
        step: int = 0,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: a batch needs room for one pair at least, give some thousands")
        self.pool, self.counts = pool, ScoringCounts()
        self._forward, self._max_tokens, self._step = forward, max_tokens, step
        self._encoder = PromptEncoder(pool, settings)
        self._first = np.cumsum(self._encoder.slots) - self._encoder.slots
        first_answer = pool.first_piece + len(pool.fields)
        answer_tokens = np.minimum(np.diff(pool.offsets)[first_answer] + 1, self._encoder.settings.decoder_length)
        self._answer_tokens = answer_tokens.astype(np.float32)
        self._prepared: dict[PromptGenome, PreparedPrompt | str] = {}
        self._cache: dict[str, _Entry] = {}

    @property
    def step(self) -> int:
        """Training step of the model that the cached scores are of."""
        return self._step

    def set_step(self, step: int) -> None:
        """Say that the model is now that of ``step``; if that is another one, all scores are dropped."""
        if step != self._step:
            self._step = step
            self._cache.clear()

    def relabel(self, labels: Sequence[int] | _Ints) -> None:
        """Change the right options, to pseudo-labels, say; scores stay valid, as they do not depend on labels."""
        self.pool = self.pool.with_labels(labels)
        self._encoder.pool = self.pool

    def refusals(self, prompts: Sequence[PromptGenome]) -> tuple[str | None, ...]:
        """For each prompt the reason for refusing it before the model sees it, or None."""
        return tuple(entry if isinstance(entry, str) else None for entry in self._prepare(prompts))

    def num_tokens(self, prompts: Sequence[PromptGenome]) -> tuple[int, ...]:
        """For each prompt the tokens of its literal text; 0 where it is refused."""
        return tuple(0 if isinstance(entry, str) else entry.num_tokens for entry in self._prepare(prompts))

    def num_new(self, prompts: Sequence[PromptGenome], rows: Sequence[int] | _Ints | None = None) -> int:
        """Pairs that :meth:`score` would have the model score: what the call would cost of a budget."""
        chosen = np.unique(self._rows(rows))
        keys = {entry.key for entry in self._prepare(prompts) if not isinstance(entry, str)}
        done = [self._cache[key].done[chosen] for key in keys if key in self._cache]
        return len(keys) * len(chosen) - sum(int(np.count_nonzero(rows)) for rows in done)

    def score(
        self,
        prompts: Sequence[PromptGenome],
        rows: Sequence[int] | _Ints | None = None,
        *,
        outcomes: bool = False,
    ) -> PromptScores:
        """Score prompts; pairs that are known already, and repeated ones, cost nothing.

        Args:
            prompts: Any prompts, repeated ones too.
            rows: Rows of the pool; all of them when None.
            outcomes: Whether free answers are generated and compared; choices always have their outcomes.

        Raises:
            PoolError: A row is not labelled, or not in the pool.
        """
        chosen = self._rows(rows)
        unlabelled = chosen[self.pool.label[chosen] == UNLABELLED]
        if len(unlabelled):
            raise PoolError(
                f"task {self.pool.name!r}, row {unlabelled[0]} has no label; give pseudo-labels with relabel() first"
            )
        prepared = self._prepare(prompts)
        usable = list({entry.key: entry for entry in prepared if not isinstance(entry, str)}.values())
        self._fill(usable, chosen)
        if outcomes and self.pool.kind == "generation":
            self._generate(usable, chosen)
        totals = self._totals(usable, chosen)
        fitness, outcome = self._judge(usable, totals, chosen)
        # Infinity would pass for a score; with it a model has failed as it has with NaN.
        failed: npt.NDArray[np.bool_] = np.logical_or.reduce(~np.isfinite(totals), axis=1)
        fitness[failed], outcome[failed] = np.nan, np.nan
        place = {entry.key: index for index, entry in enumerate(usable)}
        shape = (len(prompts), len(chosen))
        result = PromptScores(
            fitness=np.full(shape, np.nan, dtype=np.float32),
            outcome=np.full(shape, np.nan, dtype=np.float32),
            refused=tuple(e if isinstance(e, str) else NOT_FINITE if failed[place[e.key]] else None for e in prepared),
        )
        for index, entry in enumerate(prepared):
            if not isinstance(entry, str):
                self.counts.requested += len(chosen)
                result.fitness[index], result.outcome[index] = fitness[place[entry.key]], outcome[place[entry.key]]
        return result

    def option_logprobs(self, prompts: Sequence[PromptGenome]) -> npt.NDArray[np.float32]:
        """Log-probabilities of all options of the pool under each prompt, float32 [P, O], for pseudo-labels.

        A refused prompt's row is NaN.
        """
        everything = np.arange(len(self.pool))
        prepared = self._prepare(prompts)
        usable = list({entry.key: entry for entry in prepared if not isinstance(entry, str)}.values())
        self._fill(usable, everything)
        nothing = np.full(int(self._encoder.slots.sum()), np.nan, dtype=np.float32)
        return np.stack([nothing if isinstance(e, str) else self._cache[e.key].totals for e in prepared])

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: the cache, its step, and the counts."""
        entries = list(self._cache.values())
        return {
            "step": self._step,
            "pool": self._pool_fingerprint(),
            "keys": list(self._cache),
            "totals": torch.from_numpy(np.stack([e.totals for e in entries])) if entries else torch.zeros(0),
            "done": torch.from_numpy(np.stack([e.done for e in entries])) if entries else torch.zeros(0),
            "outcome": torch.from_numpy(np.stack([e.outcome for e in entries])) if entries else torch.zeros(0),
            "counts": dataclasses.asdict(self.counts) | {"refused": dict(self.counts.refused)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the cache and the counts.

        Raises:
            ValueError: The state is of other examples or limits.
        """
        if state["pool"] != self._pool_fingerprint():
            raise ValueError(
                f"the saved scores are of other examples or limits than those of task {self.pool.name!r} here; start "
                "the search anew, or restore the data and settings that it had"
            )
        arrays = [state[name].numpy().copy() for name in ("totals", "done", "outcome")]
        self._cache = {key: _Entry(*(array[i] for array in arrays)) for i, key in enumerate(state["keys"])}
        self._step = state["step"]
        counts = dict(state["counts"])
        self.counts = ScoringCounts(**(counts | {"refused": collections.Counter(counts["refused"])}))

    def _rows(self, rows: Sequence[int] | _Ints | None) -> _Ints:
        chosen = np.arange(len(self.pool)) if rows is None else np.asarray(rows, dtype=np.int64)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= len(self.pool):
            raise PoolError(
                f"task {self.pool.name!r} has the rows 0 to {len(self.pool) - 1}; asked for "
                f"{[int(chosen.min()), int(chosen.max())] if len(chosen) else 'none'}"
            )
        return chosen

    def _prepare(self, prompts: Sequence[PromptGenome]) -> list[PreparedPrompt | str]:
        found = [self._prepared.get(prompt) for prompt in prompts]
        known = [entry for entry in found if entry is not None]
        if len(known) == len(prompts):
            return known
        new = list(dict.fromkeys(prompt for prompt, entry in zip(prompts, found, strict=True) if entry is None))
        for prompt, entry in zip(new, self._encoder.prepare(new), strict=True):
            self._prepared[prompt] = entry
            if isinstance(entry, str):
                self.counts.refused[_kind_of(entry)] += 1
        return [self._prepared[prompt] for prompt in prompts]

    def _entry(self, key: str) -> _Entry:
        if key not in self._cache:
            rows, slots = len(self.pool), int(self._encoder.slots.sum())
            self._cache[key] = _Entry(
                np.full(slots, np.nan, dtype=np.float32),
                np.zeros(rows, dtype=np.bool_),
                np.full(rows, np.nan, dtype=np.float32),
            )
        return self._cache[key]

    def _has_failed(self, entry: _Entry) -> bool:
        return not np.isfinite(entry.totals[np.repeat(entry.done, self._encoder.slots)]).all()

    def _missing(self, key: str, rows: _Ints) -> _Ints:
        """Distinct rows that the model has not scored under a prompt, ascending."""
        entry = self._cache.get(key)
        return np.unique(rows if entry is None else rows[~entry.done[rows]])

    def _fill(self, prompts: Sequence[PreparedPrompt], rows: _Ints) -> None:
        """Have the model score what is missing."""
        for owner, row in _chunks([self._missing(prompt.key, rows) for prompt in prompts]):
            batches = self._encoder.batches(prompts, owner, row, self._max_tokens)
            slots = self._encoder.slots[row]
            ends = np.cumsum(slots)
            totals = np.empty(int(ends[-1]), dtype=np.float32)
            for pairs, scores in zip(batches.members, self._forward.option_logprobs(batches), strict=True):
                totals[ranges(ends[pairs] - slots[pairs], slots[pairs])] = scores.numpy()
            for index in np.unique(owner).tolist():
                mine = owner == index
                entry = self._entry(prompts[index].key)
                had_failed = self._has_failed(entry)
                entry.totals[ranges(self._first[row[mine]], slots[mine])] = totals[np.repeat(mine, slots)]
                entry.done[row[mine]] = True
                if self._has_failed(entry) and not had_failed:
                    self.counts.refused[NOT_FINITE] += 1
            self.counts.scored += len(row)

    def _generate(self, prompts: Sequence[PreparedPrompt], rows: _Ints) -> None:
        """Have the model answer what it has not answered yet, and compare."""
        pool = self.pool
        metric = exact_match if pool.metric == "exact_match" else rouge_l
        missing = [np.unique(rows[np.isnan(self._cache[prompt.key].outcome[rows])]) for prompt in prompts]
        references = {row: pool.example(row).outputs for row in np.unique(rows).tolist()}
        for owner, row in _chunks(missing):
            batches = self._encoder.batches(prompts, owner, row, self._max_tokens)
            for pairs, answers in zip(batches.members, self._forward.generate(batches), strict=True):
                for pair, answer in zip(pairs.tolist(), answers, strict=True):
                    text, place = pool.tokenizer.decode(answer), int(row[pair])
                    self._cache[prompts[owner[pair]].key].outcome[place] = metric(text, references[place])
            self.counts.generated += len(row)

    def _totals(self, prompts: Sequence[PreparedPrompt], rows: _Ints) -> _Floats:
        places = ranges(self._first[rows], self._encoder.slots[rows])
        if not prompts:
            return np.zeros((0, len(places)), dtype=np.float32)
        return np.stack([self._cache[prompt.key].totals[places] for prompt in prompts])

    def _judge(self, prompts: Sequence[PreparedPrompt], totals: _Floats, rows: _Ints) -> tuple[_Floats, _Floats]:
        """Fitness and outcome, float32 [P, R] each."""
        if self.pool.kind == "generation":
            shape = (len(prompts), len(rows))
            outcomes = [self._cache[prompt.key].outcome[rows] for prompt in prompts]
            return totals / self._answer_tokens[rows], np.array(outcomes, dtype=np.float32).reshape(shape)
        counts = self._encoder.slots[rows]
        starts = np.cumsum(counts) - counts
        right = self.pool.right[ranges(self._first[rows], counts)]
        lowest = np.float32(-np.inf)
        with np.errstate(invalid="ignore"):
            margin = np.maximum.reduceat(np.where(right, totals, lowest), starts, axis=1) - np.maximum.reduceat(
                np.where(right, lowest, totals), starts, axis=1
            )
        # Where every option is right there is nothing to gain.
        fitness = np.where(np.isfinite(margin), margin, np.float32(0))
        is_best = totals == np.repeat(np.maximum.reduceat(totals, starts, axis=1), counts, axis=1)
        places = np.where(is_best, np.arange(totals.shape[1]), totals.shape[1] - 1)
        chosen = np.minimum.reduceat(places, starts, axis=1)
        return fitness, right[chosen].astype(np.float32)

    def _pool_fingerprint(self) -> str:
        pool, settings = self.pool, self._encoder.settings
        limits = dataclasses.asdict(settings) | {"soft_prompts": sorted(settings.soft_prompts.items())}
        digest = hashlib.sha256(repr([pool.name, pool.kind, pool.tokenizer.fingerprint, limits]).encode())
        for key in pool.input_keys():
            digest.update(key)
        return digest.hexdigest()


def _chunks(rows: Sequence[_Ints]) -> list[tuple[_Ints, _Ints]]:
    """(index of the list, entry) of lists end to end, in parts that bound the memory of a plan."""
    owner = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    starts = range(0, len(flat), _PAIRS_AT_ONCE)
    return [(owner[start : start + _PAIRS_AT_ONCE], flat[start : start + _PAIRS_AT_ONCE]) for start in starts]


def _kind_of(reason: str) -> str:
    """A reason without its numbers and names, to count by."""
    for kind in ("too long", "unknown placeholder", "lost placeholder", "unknown soft prompt", "verbalizer"):
        if reason.startswith(kind):
            return kind
    return reason
