# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a whole model on every rank, for modules whose evaluation is no single pass through the blocks.

Generating text, scoring many options on one encoding, encoding a task's inputs: such code calls the model in its own
way, which no pipeline can cut. So every rank is given all weights while an evaluation runs, runs the user's code
unchanged, each on its own batches, and lets the weights go again. Price: memory for the whole model, once, and one
broadcast of it an evaluation; in return no rank waits for another.

Sharded stages are gathered by FSDP, so that its hooks find nothing to do; what other ranks own is broadcast from its
first owner. Parameters are exchanged in their modules and put back afterwards: those that the optimizer holds are not
touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.torch_compat import gather_stage

__all__ = ["WholeEvaluation", "WholeModel"]

_BUCKET = 2**24
"""Numbers that are broadcast at once."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter's type while it is gathered, and the position in the pipeline of the first rank that holds it."""

    source: int
    dtype: torch.dtype


class WholeModel:
    """Gives a rank the parameters that it lacks, and takes them away again.

    Args:
        pipeline: This rank's part of the model.

    Attributes:
        gathered: Whether the whole model is here.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._kept: dict[str, _Kept] = {}
        self.gathered = False

    def gather(self) -> None:
        """Gather all parameters; every rank calls this."""
        if self.gathered:
            return
        # Tensors made in inference mode could not be trained with afterwards.
        with torch.inference_mode(False), torch.no_grad():
            self._gather()
        self.gathered = True

    def release(self) -> None:
        """Let go what this rank does not own; no messages."""
        if not self.gathered:
            return
        for module, name, parameter in self._swapped:
            module._parameters[name] = parameter
        self._swapped = []
        for stage in self._pipeline.stages.values():
            for part in stage.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
        self.gathered = False

    def _gather(self) -> None:
        root = self._pipeline.chain.root
        names = {id(parameter): name for name, parameter in root.named_parameters()}
        places = [
            (module, place, names[id(parameter)], parameter)
            for module in root.modules()
            for place, parameter in module._parameters.items()
            if parameter is not None
        ]
        for stage in self._pipeline.stages.values():
            if isinstance(stage, FSDPModule):
                gather_stage(stage)
        whole: dict[str, nn.Parameter] = {}
        for module, place, name, _ in places:
            found = module._parameters[place]
            if found is not None and not found.is_meta and not isinstance(found, DTensor):
                whole[name] = found
        shapes = {name: parameter for _, _, name, parameter in places}
        self._receive(whole, shapes)
        for module, place, name, parameter in places:
            # A tied parameter has places that FSDP does not know, which keep its shard.
            if isinstance(module._parameters[place], DTensor) or parameter.is_meta:
                self._swapped.append((module, place, parameter))
                module._parameters[place] = whole[name]

    def _receive(self, whole: dict[str, nn.Parameter], shapes: dict[str, nn.Parameter]) -> None:
        groups = self._pipeline.groups
        if groups.layout.pipeline == 1:
            return
        if not self._kept:
            everyone: list[dict[str, torch.dtype]] = [{} for _ in range(groups.layout.pipeline)]
            mine = {name: parameter.dtype for name, parameter in whole.items()}
            dist.all_gather_object(everyone, mine, group=groups.control)
            for position, held in reversed(list(enumerate(everyone))):
                self._kept |= {name: _Kept(position, dtype) for name, dtype in held.items()}
            # Those that all ranks hold are not sent.
            for name in set.intersection(*(set(held) for held in everyone)):
                del self._kept[name]
        for source, dtype in sorted({(kept.source, kept.dtype) for kept in self._kept.values()}, key=str):
            wanted = [name for name in shapes if self._kept.get(name) == _Kept(source, dtype)]
            for bucket in _buckets(wanted, [shapes[name].numel() for name in wanted]):
                sizes = [shapes[name].numel() for name in bucket]
                if source == groups.pipeline_rank:
                    flat = torch.cat([whole[name].reshape(-1) for name in bucket])
                else:
                    flat = torch.empty(sum(sizes), dtype=dtype, device=self._pipeline.device)
                dist.broadcast(flat, groups.layout.global_rank(source, groups.data_rank), group=groups.pipeline)
                for name, part in zip(bucket, torch.split(flat, sizes), strict=True):
                    if name not in whole:
                        whole[name] = _parameter(part, shapes[name])


def _parameter(flat: Tensor, like: nn.Parameter) -> nn.Parameter:
    # A copy: products with a matrix that starts anywhere in memory are slower.
    return nn.Parameter(flat.view(like.shape).clone(), like.requires_grad)


def _buckets(names: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """Cut names into runs of some ``_BUCKET`` numbers; a larger parameter goes alone."""
    bucket: list[str] = []
    held = 0
    for name, size in zip(names, sizes, strict=True):
        if bucket and held + size > _BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(name)
        held += size
    if bucket:
        yield bucket


class WholeEvaluation(pl.Callback):
    """Has the whole model on every rank while evaluation loops run.

    It stands before all other callbacks: their hooks at the start of an evaluation find the weights gathered, and those
    at its end, which save checkpoints, find them where they belong.

    Args:
        model: What to gather.
    """

    def __init__(self, model: WholeModel) -> None:
        self.model = model

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.gather()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.gather()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.gather()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.release()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.release()

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.model.release()
