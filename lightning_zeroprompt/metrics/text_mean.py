# SPDX-License-Identifier: Apache-2.0
"""The mean of a score of texts, as a torchmetrics metric: what the classes beside the functions have in common."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["TextMean"]


class TextMean(Metric):
    """Mean of a score over texts.

    Args:
        score: Score of one text against its right texts; higher is better.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, score: Callable[[str, Sequence[str]], float]) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Add texts.

        Args:
            preds: Predicted texts.
            target: The right texts of each, at least one each.

        Raises:
            ValueError: The two differ in length, or a text has no reference.
        """
        self.total += sum(self.score(text, right) for text, right in zip(preds, target, strict=True))
        self.count += len(preds)

    def compute(self) -> Tensor:
        """The mean over all texts so far: float32 scalar; NaN before the first."""
        return self.total / self.count
