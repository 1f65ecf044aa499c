# SPDX-License-Identifier: Apache-2.0
"""Tokens and examples a second, without a device synchronisation in every step.

Counts stay on the device and are read once a logging interval, at a step that Lightning logs anyway. Lightning's own
``ThroughputMonitor`` synchronises the GPU after every batch, which takes away the host's head start over the device;
that is why this one exists. Time spent in validation is left out.
"""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

__all__ = ["Throughput"]


class Throughput(pl.Callback):
    """Log ``throughput/tokens_per_second``, ``throughput/examples_per_second`` and ``throughput/seconds_per_step``.

    Steps are the optimizer's. Tokens are real tokens of encoder and decoder, padding not counted, over all
    data-parallel ranks (every rank is taken to process as much as rank 0). Examples are those that
    :class:`lightning_zeroprompt.data.TaskDataModule` counts in its batches.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._first_step = 0
        self._since = 0.0
        self._logged_step = 0

    def _restart(self, step: int) -> None:
        self._counts = None
        self._first_step = step
        self._since = time.perf_counter()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logged_step = trainer.global_step
        self._restart(trainer.global_step)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer.global_step)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        encoder = (batch["input_segments"] > 0).sum()
        decoder = (batch["decoder_segments"] > 0).sum()
        counts = torch.stack([encoder + decoder, batch["examples"].sum()])
        self._counts = counts if self._counts is None else self._counts + counts
        step = trainer.global_step
        # Under gradient accumulation several batches end at one step; the first of them has logged it.
        if step == self._logged_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._logged_step = step
        tokens, examples = self._counts.tolist()  # the one synchronisation of the interval
        seconds = time.perf_counter() - self._since
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        values = {
            "throughput/tokens_per_second": tokens * replicas / seconds,
            "throughput/examples_per_second": examples * replicas / seconds,
            "throughput/seconds_per_step": seconds / (step - self._first_step),
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        self._restart(step)
