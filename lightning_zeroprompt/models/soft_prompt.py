# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: learned vectors in front of each example's input, shared by all tasks or one set a task.

Positions are marked in the token ids themselves: id ``first_id + j`` is the j-th vector of the prompt, so that packing,
masks and relative positions treat them as tokens. Which task's vectors they are comes from ``task_ids``: 0 = no task
(zeros), 1..num_tasks = a training task, and above = a prompt for an unseen task, set with
:meth:`SoftPrompt.set_unseen`.

A task that training never saw has no vectors. Three remedies, all functions of weights over the training tasks:
*none* (zeros, to which dropping whole prompts in training accustoms the model), *mean* (:func:`mean_weights`), and
*retrieval* (RoSPr, arXiv 2210.03029: :func:`retrieval_weights`, the softmax over the k training tasks whose stored keys
are most similar to the mean encoding of a few unlabelled inputs). Cost: one gather and one ``where`` over the
embeddings.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SoftPrompt", "mean_encoding", "mean_weights", "retrieval_weights"]


class SoftPrompt(nn.Module):
    """Learned prompt vectors, put where the token ids ask for them.

    Args:
        mode: ``none`` (prompt positions become zeros), ``shared`` (one prompt), ``per_task``.
        length: Vectors in a prompt.
        num_tasks: Training tasks, for ``per_task``.
        d_model: Width of the model's embeddings.
        first_id: Token id of a prompt's first vector: the tokenizer's vocabulary size.
        dropout: Probability of replacing an example's whole prompt with zeros in training.

    Attributes:
        weight: ``[P, length, d_model]``; P = 1 if shared, ``num_tasks`` if per task; None for mode ``none``.
        keys: ``[num_tasks, d_model]`` float32 buffer, what :func:`retrieval_weights` compares with; zeros until set.
        unseen: ``[K, length, d_model]`` buffer, the prompts of task ids ``num_tasks + 1 ..``; empty until set, not
            saved.

    Raises:
        ValueError: A size is not positive or the dropout is no probability.
    """

    keys: Tensor
    unseen: Tensor

    def __init__(
        self,
        mode: Literal["none", "shared", "per_task"],
        *,
        length: int,
        num_tasks: int,
        d_model: int,
        first_id: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in ("none", "shared", "per_task"):
            raise ValueError(f"soft prompt mode {mode!r}: use 'none', 'shared' or 'per_task'.")
        if min(length, num_tasks, d_model) < 1:
            raise ValueError(
                f"soft prompt length={length}, num_tasks={num_tasks}, d_model={d_model}: all must be at least 1."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"soft prompt dropout={dropout}: must be in [0, 1).")
        self.mode, self.length, self.num_tasks, self.first_id, self.dropout = mode, length, num_tasks, first_id, dropout
        prompts = {"none": 0, "shared": 1, "per_task": num_tasks}[mode]
        self.weight = nn.Parameter(torch.empty(prompts, length, d_model)) if prompts else None
        self.register_buffer("keys", torch.zeros(num_tasks, d_model))
        self.register_buffer("unseen", torch.zeros(0, length, d_model), persistent=False)
        if self.weight is not None and not self.weight.is_meta:
            nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(
        self, input_ids: Tensor, embedding: nn.Embedding, task_ids: Tensor | None, segments: Tensor | None = None
    ) -> Tensor:
        """Embed tokens and prompt positions.

        Args:
            input_ids: ``[R, L]`` int64; ids from ``first_id`` to ``first_id + length - 1`` are prompt positions.
            embedding: The model's token embedding.
            task_ids: ``[R, L]`` int, the task of each token's example; needed for ``per_task``.
            segments: ``[R, L]`` int, the example of each token, for the dropout; None: a row is one example.

        Returns:
            ``[R, L, d_model]`` in the embedding's dtype.

        Raises:
            ValueError: ``task_ids`` is None in mode ``per_task``.
        """
        offset = input_ids - self.first_id
        is_prompt = (offset >= 0) & (offset < self.length)
        tokens = embedding(input_ids.masked_fill(is_prompt, 0))
        prompts = self._lookup(offset.clamp(0, self.length - 1), task_ids, tokens)
        if self.training and self.dropout > 0:
            prompts = prompts * self._keep(input_ids, segments).unsqueeze(-1)
        return torch.where(is_prompt.unsqueeze(-1), prompts, tokens)

    def mix(self, weights: Tensor) -> Tensor:
        """Return prompts ``[K, length, d_model]``: means of the training tasks', with weights ``[K, num_tasks]``.

        Raises:
            ValueError: The mode is not ``per_task``.
        """
        if self.mode != "per_task" or self.weight is None:
            raise ValueError(f"soft prompt mode is {self.mode!r}: only 'per_task' has prompts to mix.")
        return torch.einsum("kn,nld->kld", weights.to(self.weight.dtype), self.weight)

    @torch.no_grad()
    def set_unseen(self, prompts: Tensor) -> None:
        """Set the prompts ``[K, length, d_model]`` that task ids ``num_tasks + 1 .. num_tasks + K`` will mean.

        Raises:
            ValueError: The shape does not fit.
        """
        if prompts.shape[1:] != self.unseen.shape[1:]:
            raise ValueError(
                f"unseen prompts are {tuple(prompts.shape)}, expected [K, {self.length}, {self.unseen.shape[2]}]."
            )
        self.unseen = prompts.detach().to(self.unseen.device)

    def _lookup(self, offset: Tensor, task_ids: Tensor | None, like: Tensor) -> Tensor:
        """Return the prompt vector of every position, zeros where there is none."""
        if self.weight is None:
            return torch.zeros_like(like)
        if self.mode == "shared":
            return F.embedding(offset, self.weight[0]).to(like.dtype)
        if task_ids is None:
            raise ValueError(
                "soft prompt mode is 'per_task', but no task_ids were given; have the data module add them."
            )
        zeros = self.weight.new_zeros(1, *self.weight.shape[1:])
        table = torch.cat((zeros, self.weight, self.unseen.to(self.weight.dtype))).flatten(0, 1)
        return F.embedding(task_ids.long() * self.length + offset, table).to(like.dtype)

    def _keep(self, input_ids: Tensor, segments: Tensor | None) -> Tensor:
        """Draw for each example whether its prompt stays: ``[R, L]`` bool, equal within an example."""
        rows, length = input_ids.shape
        draws = torch.rand(rows, length + 1, device=input_ids.device) >= self.dropout
        if segments is None:
            return draws[:, :1].expand(rows, length)
        return draws.gather(1, segments.long())


def mean_weights(num_tasks: int, device: torch.device | str = "cpu") -> Tensor:
    """Return ``[1, num_tasks]`` equal weights: the mean of all training prompts."""
    return torch.full((1, num_tasks), 1 / num_tasks, device=device)


def mean_encoding(memory: Tensor, segments: Tensor | None = None) -> Tensor:
    """Return the mean of an encoder's output over its real tokens: keys for training tasks, queries for unseen ones.

    Args:
        memory: ``[B, L, d]``, one example a row.
        segments: ``[B, L]``, 0 = padding; None: no padding.

    Returns:
        ``[B, d]`` float32; zeros for a row of padding only.
    """
    if segments is None:
        return memory.float().mean(1)
    real = (segments > 0).unsqueeze(-1).float()
    return (memory.float() * real).sum(1) / real.sum(1).clamp(min=1)


def retrieval_weights(queries: Tensor, keys: Tensor, *, top_k: int, temperature: float = 1.0) -> Tensor:
    """Weigh training tasks by the similarity of their inputs (RoSPr, arXiv 2210.03029).

    Args:
        queries: ``[K, d]``, :func:`mean_encoding` of unlabelled inputs of the unseen tasks, averaged per task.
        keys: ``[num_tasks, d]``, the same of the training tasks.
        top_k: Tasks with a weight above 0; all if larger than their number.
        temperature: Of the softmax over cosine similarities, above 0.

    Returns:
        ``[K, num_tasks]`` float32, rows sum to 1.

    Raises:
        ValueError: ``top_k`` or ``temperature`` is not positive.
    """
    if top_k < 1 or temperature <= 0:
        raise ValueError(f"top_k={top_k} must be at least 1 and temperature={temperature} above 0.")
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).t()
    best = similarity.topk(min(top_k, len(keys)), dim=-1)
    return torch.zeros_like(similarity).scatter(1, best.indices, (best.values / temperature).softmax(-1))
