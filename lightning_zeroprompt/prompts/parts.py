# SPDX-License-Identifier: Apache-2.0
"""Which rows a prompt search may look at: disjoint search, confirm and test parts, and pseudo-labels.

Prompts are chosen on *search*, the choice is checked on *confirm*, and *test* is scored once, at the end. Three modes:

* ``few_label``: k labelled rows a task, as evenly over the labels as their numbers allow, for search and confirm
  together: every label that anything is chosen with counts, unlike GPS (arXiv 2210.17041), whose sampling also reads
  the validation set's label shares.
* ``zero_label``: rows are drawn without a look at labels and get :func:`pseudo_labels` instead, the ensemble over the
  manual prompts of ZPS (arXiv 2211.04668).
* ``many_label``: every row that is not in the test part.

The test part comes from another source (validation rows, say), or is a share of the rows that depends on the seed
alone, so that results with other k are compared on the same rows. Equal inputs never stand in two parts: of rows with
equal inputs the first is used and the others are left out, and no row with an input of a given test part is used. Rows
are taken from one seeded order a label, search and confirm in turn, so a smaller k is contained in a larger one.

Everything here is a pure function of labels, keys and seed. Cost: 5 ms for 1,000 rows, most of it to compare inputs
(processor time, one core).
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.data.join import ranges
from lightning_zeroprompt.data.permutation import permute, stream_key
from lightning_zeroprompt.data.shards import balanced_quota
from lightning_zeroprompt.prompts.pool import UNLABELLED, ExamplePool, PoolError

__all__ = ["CONFIRM_SHARE", "MIN_COUNTED_ROWS", "Mode", "Parts", "choose_parts", "pseudo_labels"]

Mode = Literal["few_label", "zero_label", "many_label"]
"""What a search knows of the answers; recorded in every result."""
CONFIRM_SHARE = 0.625
"""Of 64 labels 40 confirm. An even split gained as much (docs/results/prompt_search.md)."""
MIN_COUNTED_ROWS = 128
"""Tasks with fewer distinct inputs are reported and not counted: one example would be most of a point."""

_Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Rows of a pool in three disjoint parts, int64, each in ascending order.

    Attributes:
        mode: What the search knows.
        k: Rows of search and confirm together.
        seed: Of all draws.
        search: Prompts are chosen here.
        confirm: The choice is checked here.
        test: Scored once, at the end.
        num_duplicates: Rows left out because their input stands in another part or in an earlier row.
        counted: Whether the task has :data:`MIN_COUNTED_ROWS` distinct inputs.
    """

    mode: Mode
    k: int
    seed: int
    search: _Ints
    confirm: _Ints
    test: _Ints
    num_duplicates: int
    counted: bool


def choose_parts(
    pool: ExamplePool,
    *,
    mode: Mode = "few_label",
    k: int | None = 64,
    seed: int = 0,
    confirm_share: float = CONFIRM_SHARE,
    test_share: float = 0.5,
    test_rows: Sequence[int] | _Ints | None = None,
) -> Parts:
    """Cut a pool into search, confirm and test.

    Args:
        pool: All rows of the task.
        mode: What the search may know.
        k: Rows of search and confirm together; None takes all that are not in the test part. ``many_label`` reads it
            as an upper limit.
        seed: Of all draws.
        confirm_share: Share of k that is kept for the confirmation.
        test_share: Share of the distinct inputs that is the test part, where ``test_rows`` is None.
        test_rows: The test part, where it comes from another source; the pool has to hold its rows.

    Raises:
        PoolError: No template, no labelled rows, fewer than two labels, k larger than what is left, free answers in
            mode ``zero_label``, or a part without rows.
        ValueError: An unknown mode, or a share or k out of range.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: give one of {', '.join(get_args(Mode))}")
    if not (0 < confirm_share < 1 and 0 < test_share < 1):
        raise ValueError(f"confirm_share={confirm_share}, test_share={test_share}: give shares between 0 and 1")
    if k is not None and k < 2:
        raise ValueError(f"k={k}: search and confirm need one row each at least; give 2 or more")
    if not pool.templates:
        raise PoolError(f"task {pool.name!r} has no template; a search starts from manual prompts, give at least one")
    if mode == "zero_label" and pool.kind != "choice":
        raise PoolError(f"task {pool.name!r} has free answers; zero_label needs options, use few_label or many_label")
    keys = pool.input_keys()
    first_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    distinct = np.array(sorted(first_of.values()), dtype=np.int64)
    test, rest = _test_part(pool, keys, distinct, seed, test_share, test_rows)
    num_duplicates = len(pool) - len(test) - len(rest)
    labels = pool.label[rest]
    if mode == "zero_label":
        labels = np.full_like(labels, UNLABELLED)
    else:
        rest, labels = rest[labels != UNLABELLED], labels[labels != UNLABELLED]
        _check_labels(pool, mode, labels)
    wanted = len(rest) if k is None else min(k, len(rest)) if mode == "many_label" else k
    if wanted > len(rest):
        raise PoolError(
            f"task {pool.name!r}: k={wanted} rows for search and confirm, but of {len(distinct)} distinct inputs the "
            f"test part leaves {len(rest)}{'' if mode == 'zero_label' else ' labelled ones'}; give k of at most "
            f"{len(rest)}, or more examples"
        )
    search, confirm = _search_and_confirm(rest, labels, wanted, confirm_share, seed)
    for name, rows in (("search", search), ("confirm", confirm), ("test", test)):
        if not len(rows):
            raise PoolError(
                f"task {pool.name!r}: of {len(distinct)} distinct inputs and k={wanted} none is left for the part "
                f"{name!r}; give more examples, or other shares"
            )
    _check_disjoint(pool.name, keys, {"search": search, "confirm": confirm, "test": test})
    return Parts(
        mode=mode,
        k=wanted,
        seed=seed,
        search=search,
        confirm=confirm,
        test=test,
        num_duplicates=num_duplicates,
        counted=len(distinct) >= MIN_COUNTED_ROWS,
    )


def pseudo_labels(logprobs: npt.ArrayLike, num_options: Sequence[int] | _Ints) -> tuple[_Ints, npt.NDArray[np.float64]]:
    """Label inputs by the mean of several prompts' log-probabilities (ZPS, arXiv 2211.04668: log-probability mean).

    Each prompt's log-probabilities are normalised over the options of a row before they are averaged.

    Args:
        logprobs: [P, O] of P prompts and the options of all rows, row after row, in nats. A prompt with a number that
            is not finite is left out.
        num_options: [R], options of each row.

    Returns:
        The likeliest option of each row, int64 [R] (the first of equal ones), and its probability, float64 [R].

    Raises:
        ValueError: The sizes do not fit, or no prompt is left.

    Example:
        >>> labels, confidence = pseudo_labels(np.log([[0.9, 0.1, 0.2, 0.8], [0.4, 0.6, 0.2, 0.8]]), [2, 2])
        >>> labels.tolist(), confidence.round(2).tolist()
        ([0, 1], [0.71, 0.8])
    """
    scores, counts = np.atleast_2d(np.asarray(logprobs, dtype=np.float64)), np.asarray(num_options, dtype=np.int64)
    if scores.shape[1] != counts.sum() or counts.min(initial=1) < 1:
        raise ValueError(
            f"{scores.shape[1]} log-probabilities a prompt for {len(counts)} rows with {counts.sum()} options (fewest "
            f"{counts.min(initial=1)}); give one an option, and every row one option at least"
        )
    finite = np.isfinite(scores).all(axis=1)
    if not finite.any():
        raise ValueError(f"none of {len(scores)} prompts has finite log-probabilities; check the model's weights")
    starts = np.cumsum(counts) - counts

    def normalised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values = values - np.repeat(np.maximum.reduceat(values, starts, axis=1), counts, axis=1)
        values -= np.log(np.repeat(np.add.reduceat(np.exp(values), starts, axis=1), counts, axis=1))
        return values

    mean = normalised(normalised(scores[finite]).mean(axis=0, keepdims=True))[0]
    best = np.maximum.reduceat(mean, starts)
    place = np.where(mean == np.repeat(best, counts), np.arange(len(mean)), len(mean))
    return np.minimum.reduceat(place, starts) - starts, np.exp(best)


def _test_part(
    pool: ExamplePool,
    keys: Sequence[bytes],
    distinct: _Ints,
    seed: int,
    share: float,
    given: Sequence[int] | _Ints | None,
) -> tuple[_Ints, _Ints]:
    """Rows of the test part, and the distinct rows that have no input of it."""
    if given is None:
        order = permute(len(distinct), stream_key(seed, "test part"), np.arange(len(distinct)))
        size = round(share * len(distinct))
        return np.sort(distinct[order[:size]]), np.sort(distinct[order[size:]])
    test = np.unique(np.asarray(given, dtype=np.int64))
    if not len(test) or test[0] < 0 or test[-1] >= len(pool):
        raise PoolError(
            f"task {pool.name!r} has the rows 0 to {len(pool) - 1}; test_rows are {test[:1].tolist()} to "
            f"{test[-1:].tolist()}"
        )
    tested = {keys[row] for row in test.tolist()}
    return test, distinct[[keys[row] not in tested for row in distinct.tolist()]]


def _check_labels(pool: ExamplePool, mode: Mode, labels: _Ints) -> None:
    if not len(labels):
        raise PoolError(
            f"task {pool.name!r} has no labelled example outside its test part, which mode {mode!r} needs; label some, "
            "or use zero_label"
        )
    if pool.kind == "choice" and len(np.unique(labels)) < 2:
        what = repr(pool.labels[labels[0]]) if pool.labels is not None else f"option {labels[0]}"
        raise PoolError(
            f"task {pool.name!r}: all {len(labels)} labelled examples outside the test part have the answer {what}; "
            "any prompt that says so would win, give examples of two answers at least"
        )


def _search_and_confirm(rest: _Ints, labels: _Ints, k: int, confirm_share: float, seed: int) -> tuple[_Ints, _Ints]:
    """Deal k rows, as many of each label as there are of the others, to the two parts in turn."""
    order = permute(len(rest), stream_key(seed, "search and confirm"), np.arange(len(rest)))
    shuffled, values = rest[order], labels[order]
    classes, sizes = np.unique(values, return_counts=True)
    quota = balanced_quota(sizes.tolist(), k)
    chosen = np.concatenate([shuffled[values == c][:n] for c, n in zip(classes.tolist(), quota.tolist(), strict=True)])
    # Each label begins one turn later than the one before it, so that labels with one row do not all go to search.
    turn = ranges(np.arange(len(classes)), quota)
    to_confirm = np.floor((turn + 1) * confirm_share) > np.floor(turn * confirm_share)
    return np.sort(chosen[~to_confirm]), np.sort(chosen[to_confirm])


def _check_disjoint(name: str, keys: Sequence[Hashable], parts: dict[str, _Ints]) -> None:
    owner: dict[Hashable, str] = {}
    for part, rows in parts.items():
        for row in rows.tolist():
            if owner.setdefault(keys[row], part) != part:
                raise PoolError(f"task {name!r}: row {row} of the part {part!r} has an input of {owner[keys[row]]!r}")
