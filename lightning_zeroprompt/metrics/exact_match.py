# SPDX-License-Identifier: Apache-2.0
"""Exact match after normalisation, against any right output.

Two texts match where NFKC, case folding and white space make them equal
(:func:`lightning_zeroprompt.metrics.text.normalise`). Punctuation and articles count, other than in SQuAD's
English-only normalisation: an answer may be a symbol, and the tasks are in many languages.

Cost: 1 microsecond for two short texts.
"""

from collections.abc import Sequence

from lightning_zeroprompt.metrics.text import normalise
from lightning_zeroprompt.metrics.text_mean import TextMean

__all__ = ["ExactMatch", "exact_match"]


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether a text equals any of its references after normalisation.

    Args:
        prediction: The text to judge.
        references: Every right text; at least one.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: There is no reference.

    Example:
        >>> exact_match(" New  York", ["new york", "NYC"])
        1.0
        >>> exact_match("York", ["new york"])
        0.0
    """
    if not references:
        raise ValueError("exact_match was given 0 references; give at least one right text")
    wanted = normalise(prediction)
    return float(any(normalise(reference) == wanted for reference in references))


class ExactMatch(TextMean):
    """Share of texts that match exactly; the class beside :func:`exact_match`.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["Yes", "no", "no", "no"], [["yes"], ["yes"], ["yes"], ["yes", "No"]])
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self) -> None:
        super().__init__(exact_match)
