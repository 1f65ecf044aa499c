# SPDX-License-Identifier: Apache-2.0
"""Steps of a LightningModule on a pipeline: batches to micro-batches, user code around the blocks, one result.

A training step is run as M micro-batches; its loss is their mean, weighted by rows, or by ``loss_weight(batch)`` where
the module defines it (a token mean stays a token mean then, over micro-batches and over data-parallel ranks).
Evaluation steps get their batch whole: what they return and log is exactly what they would without a pipeline, at the
price that stages wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zeroprompt.pipeline.batch import batch_rows, signature, split_batch, split_sizes
from lightning_zeroprompt.pipeline.executor import MicroBatch
from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.schedule import Schedule
from lightning_zeroprompt.strategies.broadcast import broadcast_nested
from lightning_zeroprompt.strategies.metrics import PipelineMetrics
from lightning_zeroprompt.strategies.relay import LogRelay
from lightning_zeroprompt.strategies.support import join_results, micro_seed, random_state, set_seed

__all__ = ["PipelineSteps"]

_USER_CODE = -1
"""In the place of a stage's index: random numbers of user code, before and behind the blocks."""


class _Precision(Protocol):
    def forward_context(self) -> AbstractContextManager[Any]:
        """What forward passes run in."""


Method = TypeVar("Method", bound=Callable[..., Any])


def _releases(method: Method) -> Method:
    """Behind an error of a step no GPU may wait for a rank that will not come, and the process for its GPU."""

    @functools.wraps(method)
    def run(self: PipelineSteps, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            self._pipeline.groups.release()
            raise

    return cast("Method", run)


class PipelineSteps:
    """Runs the steps of one module.

    Args:
        module: The user's module, cut.
        pipeline: This rank's part of it.
        precision: The Trainer's precision plugin.
        seed: Equal on all ranks.

    Attributes:
        metrics: The module's torchmetrics objects.
        in_user_code: Whether a step of the module is running, which it does on some ranks only.
    """

    def __init__(self, module: pl.LightningModule, pipeline: Pipeline, precision: _Precision, seed: int) -> None:
        self._module, self._pipeline, self._precision = module, pipeline, precision
        groups = pipeline.groups
        self._seed = micro_seed(seed, groups.data_rank)
        self._relay = LogRelay(module, pipeline.last_rank, groups.pipeline, groups.control, pipeline.device)
        self.metrics = PipelineMetrics(
            module, groups, pipeline.last_rank, pipeline.device, in_user_code=lambda: self.in_user_code
        )
        self._parameters = list(module.parameters())
        self._frozen: tuple[bool, ...] = ()
        self.in_user_code = False
        self._loaders_compared = self._loss_checked = False

    @_releases
    def train(
        self, schedule: Schedule, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, step: int, scale: float
    ) -> Tensor | dict[str, Any]:
        """Run ``training_step`` on a batch, forward and backward; gradients are added to the parameters'.

        Args:
            schedule: Its number of micro-batches is M.
            args: Of ``training_step``: the batch first.
            kwargs: Likewise.
            step: Number of the batch, for random numbers.
            scale: Factor of the gradients, 1 / batches that are accumulated.

        Returns:
            What ``training_step`` returned, with the loss of the whole batch, on every rank of the pipeline.

        Raises:
            TypeError: If ``training_step`` returns no loss.
        """
        batch, rest = args[0], args[1:]
        self._frozen = tuple(parameter.requires_grad for parameter in self._parameters)
        rows = batch_rows(batch)
        sizes = split_sizes(rows, schedule.micro_batches)
        parts = split_batch(batch, sizes)
        self._compare_loaders(len(parts))
        weights, factors = self._weigh(parts)
        losses: list[Tensor] = []
        results: list[Any] = []
        method = self._module.training_step

        def end(output: Any, index: int) -> Tensor:
            result = self._replay(method, (parts[index], *rest), kwargs, output, step, index, weights[index])
            loss = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"training_step returned {type(result).__name__} for a micro-batch; it has to return a loss, or a "
                    "dict with the key 'loss'"
                )
            # A mean over no targets is NaN, and counts for nothing.
            loss = torch.where(weights[index] == 0, torch.zeros_like(loss), loss)
            losses.append(loss.detach())
            results.append(result)
            scaled: Tensor = loss * (factors[index] * scale)
            return scaled

        micro_batches = [
            self._micro_batch(method, (part, *rest), kwargs, step, index) for index, part in enumerate(parts)
        ]
        with random_state(self._pipeline.device):
            self._pipeline.train_step(schedule, micro_batches, end)
        mean = None
        if losses:
            self._check_loss(losses)
            heavy = torch.stack([weight.double() for weight in weights])
            mean = (torch.stack(losses).double() * heavy).sum() / heavy.sum()
        returned_more = bool(results) and isinstance(results[0], Mapping) and len(results[0]) > 1
        loss, returned_more = self._relay.send(mean, returned_more)
        if loss is None:
            raise RuntimeError("the last stage reported no loss")
        loss = loss.requires_grad_()
        if not returned_more:
            return loss
        joined = join_results(results, sizes) if results else None
        return {**self._share(joined), "loss": loss}

    @_releases
    def evaluate(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, log: bool = True
    ) -> Any:
        """Run an evaluation step on a whole batch.

        Args:
            method: ``validation_step``, ``test_step`` or ``predict_step``.
            args: Its arguments, the batch first.
            kwargs: Likewise.
            log: Whether it may log.

        Returns:
            What it returned, on every rank of the pipeline.
        """
        weight = torch.ones((), device=self._pipeline.device)

        def end(output: Any, index: int) -> Any:
            return self._replay(method, args, kwargs, output, 0, index, weight)

        with random_state(self._pipeline.device):
            results = self._pipeline.executor.forward([self._micro_batch(method, args, kwargs, 0, 0)], end)
        if log:
            self._relay.send()
        return self._share(results[0] if results else None)

    def _share(self, value: Any) -> Any:
        """Give all ranks of the pipeline what the last stage's has."""
        return broadcast_nested(value, self._pipeline.last_rank, self._pipeline.groups, self._pipeline.device)

    # -- user code ------------------------------------------------------------------------------------------------

    def _micro_batch(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], step: int, index: int
    ) -> MicroBatch:
        def capture() -> Any:
            with self._relay.muted(), self.metrics.muted():
                calls = self._pipeline.chain.capture(lambda: self._call(method, args, kwargs))
            self._pipeline.check_chain(calls)
            return calls

        return MicroBatch(
            # What is frozen decides which gradients come back.
            signature=(signature(args[0]), self._frozen),
            capture=capture,
            seed=lambda stage: self._set_seed(step, stage, index),
            context=self._precision.forward_context,
        )

    def _replay(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        step: int,
        index: int,
        weight: Tensor,
    ) -> Any:
        self._set_seed(step, _USER_CODE, index)
        with self._relay.recording(weight):
            return self._pipeline.chain.replay(lambda: self._call(method, args, kwargs), output)

    def _call(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.in_user_code = True
        try:
            with self._precision.forward_context():
                return method(*args, **kwargs)
        finally:
            self.in_user_code = False

    def _set_seed(self, step: int, stage: int, micro_batch: int) -> None:
        set_seed(micro_seed(self._seed, step, stage, micro_batch), self._pipeline.device)

    # -- weights and checks ---------------------------------------------------------------------------------------

    def _weigh(self, parts: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of the micro-batches, and what to multiply their losses by.

        Without ``loss_weight`` the mean is over this rank's rows, and over ranks as DDP takes it.
        """
        own = getattr(self._module, "loss_weight", None)
        device, groups = self._pipeline.device, self._pipeline.groups
        given = [own(part) if own else batch_rows(part) for part in parts]
        # Filled on the device: a number that is copied there is waited for.
        weights = [
            weight.detach().to(device) if isinstance(weight, Tensor) else torch.full((), weight, device=device)
            for weight in given
        ]
        total = torch.stack([weight.double() for weight in weights]).sum()
        if own and groups.layout.data > 1:
            dist.all_reduce(total, group=groups.data)
            total = total / groups.layout.data
        return weights, [weight.double() / total for weight in weights]

    def _compare_loaders(self, micro_batches: int) -> None:
        """Once: ranks that run another number of steps or micro-batches would be waited for."""
        if self._loaders_compared:
            return
        self._loaders_compared = True
        everyone: list[Any] = [None] * dist.get_world_size()
        own = {"batches an epoch": self._module.trainer.num_training_batches, "micro-batches": micro_batches}
        dist.all_gather_object(everyone, own)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                raise RuntimeError(
                    f"rank {rank} has {theirs}, rank 0 has {everyone[0]}: all ranks run the same steps together. Give "
                    "every rank's loader as many batches of as many rows (drop_last=True), or leave sampling to "
                    "Lightning"
                )

    def _check_loss(self, losses: list[Tensor]) -> None:
        """Once: a stand-in's NaN in the loss means that user code needed what is on another rank."""
        if self._loss_checked:
            return
        self._loss_checked = True
        chain = self._pipeline.chain
        if (chain.has_stand_ins or chain.target is None) and any(bool(torch.isnan(loss)) for loss in losses):
            raise RuntimeError(
                "the first loss is NaN. If it is not so under another strategy, code behind the blocks uses what is on "
                "another rank: the output of a module that runs before them, or of a block that is not the last one. "
                "Pass it through the blocks with configure_pipeline()"
            )
