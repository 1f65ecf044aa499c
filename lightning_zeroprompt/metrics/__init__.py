# SPDX-License-Identifier: Apache-2.0
"""Metrics: text overlap for every script, one vector metric for all tasks, and what its tables say."""

from lightning_zeroprompt.metrics.exact_match import ExactMatch, exact_match
from lightning_zeroprompt.metrics.rouge import RougeL, rouge_l
from lightning_zeroprompt.metrics.task_scores import CellScores, TaskScores
from lightning_zeroprompt.metrics.text import normalise, pieces

__all__ = ["CellScores", "ExactMatch", "RougeL", "TaskScores", "exact_match", "normalise", "pieces", "rouge_l"]
