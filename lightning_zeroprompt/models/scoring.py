# SPDX-License-Identifier: Apache-2.0
"""Scores of evaluation batches: rank classification over answer options, and greedy generation.

*Choices.* Every option is a decoder target; the encoder runs once an example and all options of a batch go through the
decoder together. Three rules rank the options, all kept: the *sum* of the tokens' log-probabilities (T0's rule), the
*mean* (does not favour short options), and *pmi*, the sum less the option's log-probability after an empty prompt
(Holtzman et al. 2021: does not favour options that are likely anyway). The empty prompt is the end mark alone, and
equal options of a batch are scored on it once. An option is right if it equals any right output; ties go to the first
option.

*Free answers.* Greedy generation, the best exact match and ROUGE-L over the right outputs, and the negative
log-likelihood of the canonical output's tokens, which still moves where exact match is 0.

The alternative for choices, one forward pass for each (prompt, option) pair, runs the encoder once an option and gives
equal numbers. Cost: the decoder's logits, ``options x tokens x vocabulary``; nano model and 327 words, one CPU core:
1,800 examples of three options a second, or 1,400 short free answers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_zeroprompt.metrics.exact_match import exact_match
from lightning_zeroprompt.metrics.rouge import rouge_l
from lightning_zeroprompt.models.t5 import T5

__all__ = [
    "RULES",
    "SCORES",
    "ChoiceScores",
    "GenerationScores",
    "score_batch",
    "score_choice",
    "score_generation",
]

RULES: tuple[str, ...] = ("sum", "mean", "pmi")
"""Ways to rank options by their log-likelihood."""
SCORES: tuple[str, ...] = ("accuracy_sum", "accuracy_mean", "accuracy_pmi", "margin", "exact_match", "rouge_l", "nll")
"""Columns of :func:`score_batch`."""


class _Decoder(Protocol):
    """The part of a tokeniser that scoring needs."""

    eos_id: int

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceScores:
    """Scores of B examples with N options together.

    Attributes:
        options: For every rule, the options' scores, float32 ``[N]`` (nats).
        predicted: For every rule, the chosen option of each example, int64 ``[B]``, counted inside the example.
        correct: For every rule, whether that option is right, bool ``[B]``.
        margin: For every rule, score of the best right option less that of the best wrong one, float32 ``[B]``; 0
        where an
            example has no wrong option.
        nll: Negative log-likelihood a token of the likeliest (by mean) right option, float32 ``[B]``.
    """

    options: dict[str, Tensor]
    predicted: dict[str, Tensor]
    correct: dict[str, Tensor]
    margin: dict[str, Tensor]
    nll: Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationScores:
    """Scores of B free answers.

    Attributes:
        texts: Generated texts.
        exact_match: Float32 ``[B]``, the best over the right outputs.
        rouge_l: Float32 ``[B]``, the best over the right outputs.
        nll: Negative log-likelihood a token of the canonical output, end mark included, float32 ``[B]``.
    """

    texts: list[str]
    exact_match: Tensor
    rouge_l: Tensor
    nll: Tensor


@torch.no_grad()
def score_choice(model: T5, batch: Mapping[str, Any], *, eos_id: int = 1) -> ChoiceScores:
    """Rank the options of a batch.

    Args:
        model: The model, in the mode (``eval()``) and precision to score with.
        batch: A batch of kind ``"choice"`` (:class:`lightning_zeroprompt.data.evaluation.EvaluationDataset`), on the
        model's
            device.
        eos_id: The empty prompt of the pmi rule.
    """
    labels, example, right = batch["option_labels"], batch["option_example"], batch["option_correct"]
    task_ids = batch.get("task_ids")
    memory = model.encode(batch["input_ids"], batch["input_segments"], task_ids)
    total, count = model.option_logprobs(memory, batch["input_segments"], labels, example)
    unique, inverse = torch.unique(labels, dim=0, return_inverse=True)
    empty = model.encode(labels.new_full((1, 1), eos_id), None, None if task_ids is None else task_ids.new_zeros(1, 1))
    prior, _ = model.option_logprobs(empty, None, unique, inverse.new_zeros(len(unique)))
    options = {"sum": total, "mean": total / count, "pmi": total - prior[inverse]}

    size = len(batch["input_ids"])
    first = torch.searchsorted(example, torch.arange(size, device=example.device))
    place = torch.arange(len(example), device=example.device)
    predicted, correct, margin = {}, {}, {}
    for rule, raw in options.items():
        score = raw.nan_to_num(nan=-torch.inf)  # a diverged model still gets a choice; its nll shows the NaN
        is_best = score == _best(score, example, size)[example]
        chosen = torch.full_like(first, len(example)).scatter_reduce(0, example[is_best], place[is_best], "amin")
        predicted[rule] = chosen - first
        correct[rule] = right[chosen]
        gap = _best(score[right], example[right], size) - _best(score[~right], example[~right], size)
        margin[rule] = torch.where(gap.isfinite(), gap, 0.0)
    nll = -_best(options["mean"][right], example[right], size)
    return ChoiceScores(options=options, predicted=predicted, correct=correct, margin=margin, nll=nll)


def _best(score: Tensor, example: Tensor, size: int) -> Tensor:
    """Largest score of each example, ``[size]``; minus infinity where it has none."""
    return score.new_full((size,), -torch.inf).scatter_reduce(0, example, score, "amax")


@torch.no_grad()
def score_generation(model: T5, batch: Mapping[str, Any], tokenizer: _Decoder) -> GenerationScores:
    """Generate answers and compare them with the right outputs.

    Args:
        model: The model, in the mode (``eval()``) and precision to score with.
        batch: A batch of kind ``"generation"``, on the model's device.
        tokenizer: Turns ids into text.
    """
    task_ids, segments, labels = batch.get("task_ids"), batch["input_segments"], batch["target_labels"]
    memory = model.encode(batch["input_ids"], segments, task_ids)
    ids = model.generate(
        batch["input_ids"],
        segments,
        batch["max_new_tokens"],
        memory=memory,
        eos_id=tokenizer.eos_id,
        stop_early=not isinstance(model, FSDPModule),
    )
    limits = batch["answer_limit"].tolist()
    texts = [tokenizer.decode(row[:limit]) for row, limit in zip(ids.tolist(), limits, strict=True)]
    total, count = model.option_logprobs(memory, segments, labels, torch.arange(len(labels), device=labels.device))
    pairs = list(zip(texts, batch["references"], strict=True))
    return GenerationScores(
        texts=texts,
        exact_match=total.new_tensor([exact_match(text, right) for text, right in pairs]),
        rouge_l=total.new_tensor([rouge_l(text, right) for text, right in pairs]),
        nll=-total / count,
    )


def score_batch(model: T5, batch: Mapping[str, Any], tokenizer: _Decoder) -> Tensor:
    """All scores of a batch of either kind.

    Args:
        model: The model, in the mode (``eval()``) and precision to score with.
        batch: An evaluation batch on the model's device.
        tokenizer: Turns ids into text.

    Returns:
        Float32 ``[B, len(SCORES)]``, columns as in :data:`SCORES`; NaN where a score does not exist for the batch's
        kind. The margin is that of the sum rule.
    """
    size = len(batch["input_ids"])
    columns: dict[str, Tensor]
    if batch["kind"] == "choice":
        choice = score_choice(model, batch, eos_id=tokenizer.eos_id)
        columns = {f"accuracy_{rule}": choice.correct[rule].float() for rule in RULES}
        columns |= {"margin": choice.margin["sum"], "nll": choice.nll}
    else:
        free = score_generation(model, batch, tokenizer)
        columns = {"exact_match": free.exact_match, "rouge_l": free.rouge_l, "nll": free.nll}
    missing = torch.full((size,), torch.nan, device=batch["input_ids"].device)
    return torch.stack([columns.get(name, missing).float() for name in SCORES], dim=1)
