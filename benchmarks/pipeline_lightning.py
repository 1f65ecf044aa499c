# SPDX-License-Identifier: Apache-2.0
"""The cases of ``pipeline.py`` that run through the Lightning Trainer."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from pipeline_ours import OURS, spent, split_settings
from pipeline_support import Bench, Clock, Gpt, Measured, loss_of
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_zeroprompt.callbacks import PipelineMonitor
from lightning_zeroprompt.pipeline.render import write_timeline
from lightning_zeroprompt.pipeline.simulator import Simulator
from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.strategies.auto import RECORDED_BATCH

__all__ = ["NoStep", "TimeBatches", "fit", "run_lightning"]


class _Module(pl.LightningModule):
    def __init__(self, gpt: Gpt) -> None:
        super().__init__()
        self.gpt = gpt

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.gpt(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NoStep(self.parameters(), lr=0.0)


class NoStep(torch.optim.SGD):
    """Runs the closure, forward and backward passes, and changes nothing: the bare executor has no optimizer either."""

    def step(self, closure: Any = None) -> Any:
        """Run the closure."""
        return None if closure is None else closure()


class TimeBatches(pl.Callback):
    """From one batch's start to the next: what the Trainer does between batches counts."""

    def __init__(self, bench: Bench, warmup: int) -> None:
        self._bench, self._warmup, self.clock, self._seen = bench, warmup, Clock(bench), 0
        self.loss: Tensor | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """A step begins here, and the one before it ends."""
        if self._seen == self._warmup - 1:
            self._bench.heat()
        if self._seen > self._warmup:
            self.clock.stop()
        elif self._seen == self._warmup:
            self._bench.synchronize()
            self._bench.reset_peak()
        if self._warmup <= self._seen:
            self.clock.start()
        self._seen += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of the last step that is timed."""
        if self._seen <= self._warmup + self._bench.args.steps:
            self.loss = outputs["loss"]  # type: ignore[index]


def fit(
    bench: Bench,
    module: pl.LightningModule,
    strategy: ZeroPPStrategy,
    batches: Any,
    warmup: int,
    record: str | None = None,
) -> Measured:
    """Train for the benchmark's steps and time them.

    Args:
        bench: Settings.
        module: Says its own loss, and should step by :class:`NoStep`.
        strategy: Of the Trainer.
        batches: A loader or a DataModule with batches enough.
        warmup: Batches that are not timed.
        record: Write the timeline of one more step under this name.
    """
    held, timer = bench.memory()[0], TimeBatches(bench, warmup)
    # One batch more: a step ends where the next one starts.
    steps = warmup + bench.args.steps + 1
    callbacks: list[pl.Callback] = [timer]
    monitor = PipelineMonitor(steps + 1, timeline=False, flops_per_token=1.0)
    if record is not None:
        callbacks.append(monitor)
        steps += 1
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator=bench.device.type,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=bench.world // int(os.environ["LOCAL_WORLD_SIZE"]),
        precision="bf16-true" if bench.cuda else "32-true",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    measured = timer.clock.measured(None if timer.loss is None else float(timer.loss))
    expected = None
    if bench.costs is not None:
        (schedule,), pipeline = strategy.schedules.values(), strategy.pipeline
        data = bench.world // schedule.ranks
        expected = Simulator(schedule, bench.costs, pipeline.cuts, data_parallel=data).run()
        measured.predicted = expected.seconds, held + max(expected.peak_bytes)
    if monitor.recorded is not None and record is not None:
        write_timeline(monitor.recorded, bench.args.timeline, record, title=record)
        lines = spent(monitor.recorded, None if expected is None else expected.timeline)
        print("\n".join(lines), flush=True)
    return measured


def run_lightning(bench: Bench, micro_batches: int, *, name: str) -> Measured:
    """One of our schedules, or the planner's, through the Trainer."""
    auto = name == "auto"
    settings = {"schedule": "auto", "costs": bench.costs} if auto else OURS[name]
    ranks, count, settings = split_settings(bench, micro_batches, settings)
    # The order is planned anew for the times of one early batch.
    warmup = bench.args.warmup + (RECORDED_BATCH if auto else 0)
    settings["compile_stages"] = bench.args.compile_stages
    strategy = ZeroPPStrategy(ranks, bench.world // ranks, num_microbatches=count, **settings)
    rows = bench.tokens(count).cpu()
    every = TensorDataset(rows.repeat((warmup + bench.args.steps + 1) * bench.world // ranks, 1))
    return fit(bench, _Module(bench.model()), strategy, DataLoader(every, len(rows)), warmup)
