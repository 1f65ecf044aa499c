# SPDX-License-Identifier: Apache-2.0
"""Soft prompts for tasks that have none: numbering, and mixing those of the training tasks.

A training task's prompt has the number of the task among the training tasks, from 1; number 0 is no prompt. An unseen
task gets 0, or a number above all training tasks, whose prompt is mixed at the start of every evaluation: the mean of
all, or a softmax over the training tasks whose unlabelled inputs are most alike (RoSPr, arXiv 2210.03029). Inputs are
encoded without any prompt, under the first template of their task. Cost: one encoder pass over a few examples of
every task.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.evaluation import EvaluationDataset
from lightning_zeroprompt.data.evaluation_plan import EvaluationPlan
from lightning_zeroprompt.data.join import join_templates
from lightning_zeroprompt.models.soft_prompt import mean_encoding, mean_weights, retrieval_weights
from lightning_zeroprompt.models.t5 import T5

__all__ = ["encode_tasks", "mix_unseen_prompts", "prompt_numbers", "prompt_sources", "unseen_tasks"]

_BATCH = 64


def unseen_tasks(plan: EvaluationPlan, training_tasks: Sequence[int]) -> list[int]:
    """Evaluated tasks that are not trained on, by index into the corpus, ascending."""
    return sorted({sample.task.index for sample in plan.samples} - set(training_tasks))


def prompt_numbers(plan: EvaluationPlan, training_tasks: Sequence[int], unseen: str) -> dict[int, int]:
    """The prompt of every task, for ``EvaluationDataset(prompt_ids=...)``.

    Args:
        plan: What is evaluated.
        training_tasks: In the order of the mixture.
        unseen: ``"none"``, ``"mean"`` or ``"retrieval"``.

    Returns:
        Task index to prompt number; a task that is missing has no prompt.
    """
    numbers = {task: position + 1 for position, task in enumerate(training_tasks)}
    if unseen != "none":
        first = len(training_tasks) + 1
        for position, task in enumerate(unseen_tasks(plan, training_tasks)):
            numbers[task] = first + (position if unseen == "retrieval" else 0)
    return numbers


@torch.no_grad()
def encode_tasks(
    model: T5, corpus: Corpus, tasks: Sequence[int], *, examples: int = 16, encoder_length: int = 512
) -> Tensor:
    """Mean encoding of a few unlabelled inputs of every task.

    Args:
        model: Its encoder is used, without prompts.
        corpus: Where the inputs are.
        tasks: Indices of the tasks.
        examples: Inputs a task, at most; the first rows, whose order in the corpus is random.
        encoder_length: Longest input, in tokens.

    Returns:
        ``[tasks, d_model]`` float32.
    """
    device = model.shared.weight.device
    sums = torch.zeros(len(tasks), model.config.d_model, dtype=torch.float32, device=device)
    owners: list[int] = []
    rows: list[int] = []
    templates: list[int] = []
    for position, index in enumerate(tasks):
        task = corpus.tasks[index]
        count = min(examples, task.num_train_rows or task.num_rows)
        owners += [position] * count
        rows += range(task.first_row, task.first_row + count)
        templates += [task.first_template] * count
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        joined = join_templates(
            corpus, torch.tensor(rows[part]).numpy(), torch.tensor(templates[part]).numpy(), max_tokens=encoder_length
        )
        lengths = torch.from_numpy(joined.lengths)
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(real.shape, dtype=torch.int64)
        ids[real] = torch.from_numpy(joined.tokens).long()
        segments = real.int().to(device)
        # Task 0 is no task: a model with a prompt for each task must be told.
        encoded = mean_encoding(model.encode(ids.to(device), segments, torch.zeros_like(segments)), segments)
        sums.index_add_(0, torch.tensor(owners[part], device=device), encoded)
    counts = torch.bincount(torch.tensor(owners), minlength=len(tasks)).to(device)
    return sums / counts[:, None]


@torch.no_grad()
def mix_unseen_prompts(
    model: T5, dataset: EvaluationDataset, training_tasks: Sequence[int], unseen: str, *, top_k: int = 8
) -> None:
    """Set the model's prompts for the unseen tasks of an evaluation.

    Args:
        model: With soft prompts a task.
        dataset: The evaluation, made with :func:`prompt_numbers`.
        training_tasks: In the order of the mixture.
        unseen: ``"mean"`` or ``"retrieval"``; ``"none"`` does nothing.
        top_k: Training tasks that are mixed by retrieval.
    """
    prompt = model.soft_prompt
    if prompt is None or unseen == "none":
        return
    if unseen == "mean":
        prompt.set_unseen(prompt.mix(mean_weights(len(training_tasks), model.shared.weight.device)))
        return
    prompt.keys.copy_(encode_tasks(model, dataset.corpus, training_tasks))
    queries = encode_tasks(model, dataset.corpus, unseen_tasks(dataset.plan, training_tasks))
    prompt.set_unseen(prompt.mix(retrieval_weights(queries, prompt.keys, top_k=top_k, temperature=0.1)))


def prompt_sources(mode: str, task_ids: Sequence[str]) -> dict[str, int]:
    """Numbers of the soft prompts that a prompt may name; ``""`` is no soft prompt.

    Args:
        mode: Of the model's soft prompts: ``"none"``, ``"shared"`` or ``"per_task"``.
        task_ids: Training tasks in the order of the mixture.
    """
    if mode == "shared":
        return {"": 0, "shared": 1}
    return {"": 0} | ({task: place + 1 for place, task in enumerate(task_ids)} if mode == "per_task" else {})
