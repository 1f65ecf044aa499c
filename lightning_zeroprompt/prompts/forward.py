# SPDX-License-Identifier: Apache-2.0
"""The model's side of scoring: batches in, log-probabilities or answers out.

:class:`Forward` is the door through which a search reaches a model, whatever runs it: :class:`T5Forward` calls a
:class:`~lightning_zeroprompt.models.t5.T5` of this process, :class:`ShardedForward` lets the ranks of a process group
share the batches, and a pipeline strategy puts its own forward there. All batches of a call are handed over at once and
built when they are asked for, so each rank builds those that it runs.

Results stay on the device until the last batch is in flight; one copy brings them back.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_zeroprompt.data.evaluation import EvaluationBatch
from lightning_zeroprompt.models.t5 import T5

__all__ = ["Forward", "ShardedForward", "T5Forward"]


class Forward(Protocol):
    """Runs a model over scoring batches (:mod:`~lightning_zeroprompt.prompts.encoding` says what is in one)."""

    def option_logprobs(self, batches: Sequence[EvaluationBatch]) -> list[Tensor]:
        """For each batch the sum of every target's log-probabilities, float32 ``[N]`` on the CPU, in nats."""
        ...

    def generate(self, batches: Sequence[EvaluationBatch]) -> list[list[list[int]]]:
        """For each batch the ids of every answer, within the batch's ``answer_limit``."""
        ...


class T5Forward:
    """A T5 in this process, on the device where its weights are.

    Args:
        model: The model; it is put into ``eval()`` for each call and left as it was.
    """

    def __init__(self, model: T5) -> None:
        self.model = model

    @torch.no_grad()
    def option_logprobs(self, batches: Sequence[EvaluationBatch]) -> list[Tensor]:
        """See :class:`Forward`; the encoder runs once a pair, a batch's options go through the decoder together."""
        was_training = self.model.training
        self.model.eval()
        try:
            totals = [self._score(batch) for batch in self._moved(batches)]
        finally:
            self.model.train(was_training)
        if not totals:
            return []
        sizes = [len(total) for total in totals]
        return list(torch.split(torch.cat(totals).float().cpu(), sizes))

    @torch.no_grad()
    def generate(self, batches: Sequence[EvaluationBatch]) -> list[list[list[int]]]:
        """See :class:`Forward`; greedy."""
        was_training = self.model.training
        self.model.eval()
        try:
            return [self._answer(batch) for batch in self._moved(batches)]
        finally:
            self.model.train(was_training)

    def _moved(self, batches: Sequence[EvaluationBatch]) -> Any:
        device = next(self.model.parameters()).device
        for index in range(len(batches)):
            items = batches[index].items()
            yield {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in items
            }

    def _score(self, batch: EvaluationBatch) -> Tensor:
        segments = batch["input_segments"]
        memory = self.model.encode(batch["input_ids"], segments, batch.get("task_ids"))
        total, _ = self.model.option_logprobs(memory, segments, batch["option_labels"], batch["option_example"])
        return total

    def _answer(self, batch: EvaluationBatch) -> list[list[int]]:
        ids = self.model.generate(
            batch["input_ids"],
            batch["input_segments"],
            batch["max_new_tokens"],
            task_ids=batch.get("task_ids"),
            stop_early=not isinstance(self.model, FSDPModule),
        )
        limits = batch["answer_limit"].tolist()
        return [row[:limit] for row, limit in zip(ids.tolist(), limits, strict=True)]


class ShardedForward:
    """Lets the ranks of a group share the batches; every rank gets all results, bit for bit the same.

    For a whole copy of the model on each rank. Every rank has to ask for the same batches.

    Args:
        forward: What each rank runs its share with.
        group: The process group; None for the default one.
    """

    def __init__(self, forward: Forward, group: dist.ProcessGroup | None = None) -> None:
        self.forward, self.group = forward, group

    def option_logprobs(self, batches: Sequence[EvaluationBatch]) -> list[Tensor]:
        """See :class:`Forward`."""
        return self._gathered(self.forward.option_logprobs(self._mine(batches)), len(batches))

    def generate(self, batches: Sequence[EvaluationBatch]) -> list[list[list[int]]]:
        """See :class:`Forward`."""
        return self._gathered(self.forward.generate(self._mine(batches)), len(batches))

    def _mine(self, batches: Sequence[EvaluationBatch]) -> Sequence[EvaluationBatch]:
        # Batches come longest first, so dealing them out in turn gives equal shares.
        return _Strided(batches, dist.get_rank(self.group), dist.get_world_size(self.group))

    def _gathered(self, mine: list[Any], count: int) -> list[Any]:
        ranks = dist.get_world_size(self.group)
        shares: list[list[Any]] = [[] for _ in range(ranks)]
        dist.all_gather_object(shares, mine, group=self.group)
        return [shares[index % ranks][index // ranks] for index in range(count)]


class _Strided(Sequence[EvaluationBatch]):
    """Every so-manieth batch, without building the others."""

    def __init__(self, batches: Sequence[EvaluationBatch], first: int, step: int) -> None:
        self._batches, self._places = batches, range(first, len(batches), step)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[self._places[index]]
