# SPDX-License-Identifier: Apache-2.0
"""The ranks of a pipeline strategy: how many, in which groups, and what Lightning exchanges between them.

Ranks of one pipeline hold equal values of everything that Lightning reduces (losses, metrics, decisions), so means and
gathers go over data-parallel ranks alone; each data-parallel rank reads a part of the data, and the ranks of a pipeline
read the same. Where models are whole in an evaluation, every rank reads its own batches and all are reduced over.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups
from lightning_zeroprompt.strategies.broadcast import broadcast_nested
from lightning_zeroprompt.strategies.schedules import Size, check_size

__all__ = ["RankedStrategy"]


class RankedStrategy(ModelParallelStrategy):
    """P x D ranks; what runs on them is up to subclasses.

    Args:
        pipeline_parallel_size: P; ``"auto"`` is all ranks that data parallelism leaves.
        data_parallel_size: D.
        data_parallel_replicas: Groups within D that each hold all shards (HSDP).
        save_distributed_checkpoint: As in ``ModelParallelStrategy``.
        process_group_backend: Likewise.
        timeout: Of collectives.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        pipeline_parallel_size: Size,
        data_parallel_size: int,
        data_parallel_replicas: int,
        *,
        save_distributed_checkpoint: bool,
        process_group_backend: str | None,
        timeout: timedelta | None,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        check_size("pipeline_parallel_size", pipeline_parallel_size)
        check_size("data_parallel_size", data_parallel_size)
        self._pipeline_parallel_size, self._data_size = pipeline_parallel_size, data_parallel_size
        self._replicas = data_parallel_replicas
        self._groups: ProcessGroups | None = None
        self._seed = 0

    # -- what subclasses run --------------------------------------------------------------------------------------

    @property
    def _evaluates_whole(self) -> bool:
        """Whether evaluations are of whole models."""
        return False

    @property
    def _is_whole(self) -> bool:
        """Whether an evaluation of whole models runs now."""
        return False

    @property
    def _in_user_code(self) -> bool:
        """Whether code runs that some ranks do not run."""
        return False

    # -- groups ---------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)
        if self._groups is not None:
            return
        self._setup_distributed()
        # Lightning's launcher does so for the first rank of a machine alone.
        _set_num_threads_if_needed(self.num_processes)
        pipeline = self._pipeline_parallel_size
        if pipeline == "auto":
            pipeline = self.world_size // self._data_size
            if pipeline * self._data_size != self.world_size:
                raise ValueError(
                    f"{self.world_size} processes cannot be divided among {self._data_size} data-parallel ranks: "
                    f"choose data_parallel_size as a divisor of {self.world_size}"
                )
        if self._data_size == 1:
            # One data-parallel rank reads everything: the user's own sampler, and its order, as without a pipeline.
            self._module.trainer._accelerator_connector.use_distributed_sampler = False
        layout = Layout(pipeline, self._data_size, self._replicas)
        self._groups = ProcessGroups(layout, self.root_device.type)
        seed = [torch.initial_seed()]
        dist.broadcast_object_list(seed)
        self._seed = seed[0]

    @property
    def data_parallel_size(self) -> int:
        """D, into which the rows of a batch are divided."""
        return self._data_size

    @property
    def groups(self) -> ProcessGroups:
        """The ranks."""
        if self._groups is None:
            raise RuntimeError("the ranks are known once processes have started")
        return self._groups

    @property
    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("the strategy has no module yet")
        return self.lightning_module

    # -- data -----------------------------------------------------------------------------------------------------

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch; all ranks of a pipeline get the first one's, whatever their own loaders drew.

        Unless the data module says with ``draws_alike = True`` that they draw the same.
        """
        batch = super().batch_to_device(batch, device, dataloader_idx)
        drawn_alike = getattr(self._module.trainer.datamodule, "draws_alike", False)  # type: ignore[attr-defined]
        if self._is_whole or drawn_alike:
            return batch
        return broadcast_nested(
            batch, self.groups.layout.global_rank(0, self.groups.data_rank), self.groups, self.root_device
        )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.groups.layout.data, "rank": self.groups.data_rank}

    @property
    def evaluation_sampler_kwargs(self) -> dict[str, Any]:
        """As ``distributed_sampler_kwargs``, for evaluation: where models are whole, every rank has its own batches."""
        if self._evaluates_whole:
            return {"num_replicas": self.world_size, "rank": self.global_rank}
        return self.distributed_sampler_kwargs

    # -- collectives ----------------------------------------------------------------------------------------------

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the data-parallel ranks where no group is given: the ranks of a pipeline hold equal values.

        Not so while an evaluation of whole models runs: then over all ranks.
        """
        self._refuse_in_user_code("reduce")
        if group is None and not self._is_whole:
            if self.groups.layout.data == 1:
                return tensor
            group = self.groups.data
        return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Over the ranks of ``reduce``."""
        self._refuse_in_user_code("all_gather")
        if group is None and not self._is_whole:
            if self.groups.layout.data == 1:
                return tensor
            group = self.groups.data
        return super().all_gather(tensor, group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(votes)

    @override
    def barrier(self, name: str | None = None) -> None:
        self._refuse_in_user_code("barrier")
        super().barrier(name)

    def _refuse_in_user_code(self, what: str) -> None:
        if self._in_user_code:
            raise RuntimeError(
                f"{what} was called in a step: under zeropp that code runs on the ranks of the last stage alone, and "
                "the others would be waited for. Log with sync_dist=True, weigh micro-batches with loss_weight(batch), "
                "or move the call to a hook such as on_train_batch_end"
            )
