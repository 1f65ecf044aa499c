# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from, and how different they are: what a search keeps for its reports."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_zeroprompt.prompts.operators import Candidate

__all__ = ["ancestors", "diversity", "origin_record"]


def origin_record(candidate: Candidate, generation: int) -> dict[str, Any]:
    """A prompt's entry in a lineage, plain JSON data.

    Args:
        candidate: The prompt.
        generation: In which it was made.
    """
    return {
        "genome": candidate.genome.to_dict(),
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "generation": generation,
    }


def ancestors(lineage: Mapping[str, dict[str, Any]], keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The part of a lineage that some prompts descend from, themselves included.

    Args:
        lineage: Fingerprint to :func:`origin_record`.
        keys: Fingerprints.

    Example:
        >>> sorted(ancestors({"a": {"parents": []}, "b": {"parents": ["a"]}, "c": {"parents": ["a"]}}, ["b"]))
        ['a', 'b']
    """
    kept: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in kept and key in lineage:
            kept.add(key)
            waiting += lineage[key]["parents"]
    return {key: entry for key, entry in lineage.items() if key in kept}


def diversity(texts: Sequence[str]) -> float:
    """Mean over all pairs of texts of the share of their words that the two do not have in common, 0 to 1.

    Example:
        >>> diversity(["a b", "a c"]) == 1 - 1 / 3
        True
    """
    words = [set(text.split()) for text in texts]
    if len(words) < 2:
        return 0.0
    columns = {word: column for column, word in enumerate(set().union(*words))}
    has = np.zeros((len(words), len(columns)), dtype=np.int32)
    for row, own in zip(has, words, strict=True):
        row[[columns[word] for word in own]] = 1
    common, sizes = has @ has.T, has.sum(1)
    shares = 1 - common / np.maximum(sizes[:, None] + sizes - common, 1)
    return statistics.fmean(shares[np.tril_indices(len(words), -1)].tolist())
