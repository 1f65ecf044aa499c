# SPDX-License-Identifier: Apache-2.0
"""What a pipeline does with its time: speed, share of the peak, bubbles and their causes, memory, pictures of steps.

Every n-th step is recorded: it starts with a barrier and ends with a synchronisation, its timeline is gathered, logged
and written. Between recorded steps nothing is measured but the host's clock, and nothing waits for the device. Speed is
that of the steps between two recorded ones, validation left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_zeroprompt.pipeline.batch import batch_rows
from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.recorder import StepRecorder, peak_bytes
from lightning_zeroprompt.pipeline.render import write_timeline
from lightning_zeroprompt.pipeline.timeline import Timeline, align
from lightning_zeroprompt.strategies.zeropp import ZeroPPStrategy

__all__ = ["PipelineMonitor", "count_tokens"]

# Dense bf16 rates in TFLOP/s from NVIDIA's data sheets, by a part of the GPU's name; the first match counts.
# Lightning's own table has rates of sparse matrices for some GPUs, and not the name that an H200 reports.
_PEAKS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def count_tokens(batch: Any) -> int:
    """Tokens of a batch, from shapes alone (padding counts).

    Those of ``input_ids`` and ``decoder_input_ids`` where a batch is a mapping with these; else the elements of its
    first tensor of whole numbers with two dimensions; 0 where there is none.

    >>> count_tokens((torch.zeros(4, 9), torch.zeros(4, 7, dtype=torch.long)))
    28
    """
    if isinstance(batch, Mapping):
        named = [batch.get(name) for name in ("input_ids", "decoder_input_ids")]
        count = sum(part.numel() for part in named if isinstance(part, Tensor))
        if count:
            return count
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.dtype in (torch.int64, torch.int32):
            return leaf.numel()
    return 0


class PipelineMonitor(pl.Callback):
    """Log what a pipeline does with its time, and draw it.

    Scalars, through the Trainer's loggers: ``pipeline/tokens_per_second`` (left out where nothing is counted as a
    token), ``samples_per_second``, ``seconds_per_step``, ``tflops_per_device`` and ``mfu`` (share of the peak rate,
    where that is known); of the recorded step ``bubble_share`` and its parts ``idle_receive``, ``idle_gather``,
    ``idle_reduce``, ``idle_end``, ``idle_other`` (see ``pipeline.Timeline``); ``peak_gib_rank_R``, the most memory so
    far: allocated on a GPU, resident in the process on a CPU. Under a strategy without a pipeline, speed and memory
    alone.

    Tokens and samples are those of this rank's batches times the data-parallel ranks. Operations are counted by
    ``FlopCounterMode`` in the first batch of a fit, which is slow for it: matrix products and the attention kernels
    that it knows, forward and backward, recomputation included. They are taken to grow with the tokens (samples, where
    no tokens are counted).

    Args:
        every_n_steps: Optimizer steps between recorded ones; the first step is never recorded.
        timeline: Write recorded steps into the run folder, ``pipeline/step_000000100.png`` and ``.json`` (a Chrome
            trace with one lane a rank).
        folder: In place of the run folder, which is the first logger's, or the Trainer's ``default_root_dir``.
        count_tokens: Tokens of a batch; None is :func:`count_tokens` of this module.
        flops_per_token: Operations a token (a sample, where no tokens are counted), forward and backward, instead of
            counting them.
        peak_tflops: Peak rate of a device; None looks it up for GPUs that are known and bf16 or 16-bit precision.

    Attributes:
        recorded: Timeline of the last recorded step, on rank 0.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        timeline: bool = True,
        folder: str | None = None,
        count_tokens: Callable[[Any], int] | None = None,
        flops_per_token: float | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        self._every, self._write, self._folder = every_n_steps, timeline, folder
        self._count_tokens = count_tokens
        self._given_flops, self._peak = flops_per_token, peak_tflops
        self.recorded: Timeline | None = None
        self._run_folder = Path()
        self._flops: float | None = None
        self._counter: FlopCounterMode | None = None
        self._recorder: StepRecorder | None = None
        self._recording = False
        self._recorded_step = 0
        self._restart()

    def _restart(self) -> None:
        self._tokens = self._rows = self._batches = 0
        self._since = time.perf_counter()
        self._seconds = 0.0

    # -- hooks ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not a rank's own decision: the logger's folder is told by rank 0.
        self._run_folder = Path(self._folder or trainer.log_dir or trainer.default_root_dir) / "pipeline"
        self._flops, self._recorded_step = self._given_flops, trainer.global_step + 1
        self._restart()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        if self._flops is None:
            # Deferred weight gradients are multiplied into place, which torch does not count.
            self._counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        elif step % self._every == 0 and step != self._recorded_step:
            self._recorded_step, self._recording = step, True
            _synchronize(trainer.strategy.root_device)
            self._seconds = time.perf_counter() - self._since
            pipeline = _pipeline(trainer)
            if pipeline is not None:
                self._recorder = pipeline.executor.recorder = StepRecorder(pipeline.device)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._stop_counting()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()
        self._stop_recording(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        tokens = (self._count_tokens or count_tokens)(batch)
        try:
            rows = batch_rows(batch)
        except ValueError:
            rows = 0
        if self._counter is not None:
            self._stop_counting()
            mine = float(self._counter.get_total_flops())
            self._counter = None
            self._flops = sum(_gather(mine)) / ((tokens or rows or 1) * _replicas(trainer))
            _synchronize(trainer.strategy.root_device)
            self._restart()
            return
        if not self._recording:
            self._tokens, self._rows, self._batches = self._tokens + tokens, self._rows + rows, self._batches + 1
            return
        self._recording = False
        _synchronize(trainer.strategy.root_device)
        if not self._batches:
            # Nothing between this step and the one before, or a validation: this step has to do.
            self._tokens, self._rows, self._batches = tokens, rows, 1
            self._seconds = time.perf_counter() - self._since
        self._report(trainer)
        self._restart()

    # -- reports --------------------------------------------------------------------------------------------------

    def _stop_counting(self) -> None:
        if self._counter is not None and self._counter.mode is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _stop_recording(self, trainer: pl.Trainer) -> None:
        self._recorder = None
        pipeline = _pipeline(trainer)
        if pipeline is not None:
            pipeline.executor.recorder = None

    def _report(self, trainer: pl.Trainer) -> None:
        mine = None if self._recorder is None else self._recorder.result()
        self._stop_recording(trainer)
        everyone = _gather((mine, peak_bytes(trainer.strategy.root_device)))
        if trainer.global_rank:
            return
        values = self._speed(trainer)
        lanes = [lane for lane, _ in everyone if lane is not None]
        self.recorded = align(lanes) if len(lanes) == len(everyone) else None
        if self.recorded is not None:
            values["bubble_share"] = self.recorded.bubble_share
            values |= {f"idle_{cause}": share for cause, share in self.recorded.idle_shares().items()}
        values |= {f"peak_gib_rank_{rank}": peak / 2**30 for rank, (_, peak) in enumerate(everyone) if peak is not None}
        step = self._recorded_step
        for logger in trainer.loggers:
            logger.log_metrics({f"pipeline/{name}": value for name, value in values.items()}, step=step)
        if self._write and self.recorded is not None:
            write_timeline(self.recorded, self._run_folder, f"step_{step:09}", title=f"step {step}")

    def _speed(self, trainer: pl.Trainer) -> dict[str, float]:
        rate = _replicas(trainer) / self._seconds
        values = {"seconds_per_step": self._seconds / self._batches * trainer.accumulate_grad_batches}
        if self._tokens:
            values["tokens_per_second"] = self._tokens * rate
        if self._rows:
            values["samples_per_second"] = self._rows * rate
        counted = self._tokens or self._rows
        if self._flops and counted:
            values["tflops_per_device"] = counted * rate * self._flops / trainer.world_size / 1e12
            peak = self._peak or _peak_tflops(trainer)
            if peak:
                values["mfu"] = values["tflops_per_device"] / peak
        return values


def _addmm_flops(total: list[int], left: list[int], right: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _pipeline(trainer: pl.Trainer) -> Pipeline | None:
    return trainer.strategy.pipeline if isinstance(trainer.strategy, ZeroPPStrategy) else None


def _replicas(trainer: pl.Trainer) -> int:
    """Ranks with batches of their own."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))


def _peak_tflops(trainer: pl.Trainer) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda" or not trainer.precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def _gather(value: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
