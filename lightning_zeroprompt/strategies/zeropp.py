# SPDX-License-Identifier: Apache-2.0
"""``Trainer(strategy="zeropp")``: pipeline parallelism and FSDP for any LightningModule.

What a user has to know: ``training_step`` is called with *micro-batches*, on the rank of the last stage; code before
the model's call runs on every rank (and once more there). What it sets on ``self`` lives on last-stage ranks; what it
logs is logged everywhere (see ``relay``). The step's loss is the mean of the micro-batches' losses, weighted by rows. A
mean over tokens, such as that of Hugging Face models, stays one if the module says how many a micro-batch has::

    def loss_weight(self, batch):
        return (batch["labels"][:, 1:] != -100).sum()

Other strategies ignore it. ``validation_step`` and the others are called with whole batches.

How it meets Lightning's loop, which calls ``training_step``, then ``optimizer.zero_grad``, then ``backward``: the
schedule runs in ``training_step``, gradients and all, because the loss has to be known when it returns. They are put
aside before ``zero_grad`` and back in ``backward``. Alternatives: running it in ``backward`` reports a loss that is not
there yet; a loop of its own loses Lightning's accumulation, callbacks and profilers.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_zeroprompt.pipeline.batch import batch_rows, choose_micro_batches
from lightning_zeroprompt.pipeline.catalogue import SCHEDULES, build_schedule
from lightning_zeroprompt.pipeline.chain import Chain, find_chain
from lightning_zeroprompt.pipeline.layout import Layout, ProcessGroups
from lightning_zeroprompt.pipeline.pipeline import Pipeline, cut_chain
from lightning_zeroprompt.pipeline.schedule import Placement, Schedule
from lightning_zeroprompt.strategies.broadcast import broadcast_batch
from lightning_zeroprompt.strategies.optimizers import OwnedOptimizers
from lightning_zeroprompt.strategies.steps import PipelineSteps
from lightning_zeroprompt.strategies.support import fsdp_precision, hydra_config

__all__ = ["ZeroPPStrategy"]

Size = int | Literal["auto"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ZeroPPStrategy(ModelParallelStrategy):
    """Pipeline parallelism on the ZeroPP schedule, with FSDP2 within each stage.

    Args:
        pipeline_parallel_size: P; ``"auto"`` is all ranks that data parallelism leaves.
        data_parallel_size: D, ranks that share each stage's weights, gradients and optimizer state.
        data_parallel_replicas: Groups within D that each hold all shards (HSDP).
        stages_per_rank: V; ``"auto"`` is 2 where there are at least 2 P blocks, else 1.
        num_microbatches: M; ``"auto"`` is the largest divisor of the first batch's rows up to 4 P. Later batches with
            fewer rows get fewer.
        unit: U, micro-batches that go through all stages together; ``"auto"`` is M.
        schedule: One of ``pipeline.SCHEDULES``.
        vshape: Place stages down the ranks and up again; None is the schedule's own placement.
        cap: See ``pipeline.build_schedule``.
        resident: K, stages of a rank whose weights are gathered at once; ``"auto"`` is 2 (or V, if less), or all where
            nothing is sharded.
        activation_checkpointing: Run each block under ``torch.utils.checkpoint``.
        cpu_offload: Keep shards, gradients and optimizer state in the host's memory.
        save_distributed_checkpoint: A folder with a file a rank, or one file.
        process_group_backend: As in ``ModelParallelStrategy``.
        timeout: Of collectives.

    Raises:
        ValueError: If a number is out of range, the schedule is unknown, or they do not fit together.

    Example::

        Trainer(strategy="zeropp", devices=8)
        Trainer(strategy=ZeroPPStrategy(pipeline_parallel_size=4, data_parallel_size=2, num_microbatches=16), devices=8)
    """

    def __init__(
        self,
        pipeline_parallel_size: Size = "auto",
        data_parallel_size: int = 1,
        data_parallel_replicas: int = 1,
        stages_per_rank: Size = "auto",
        num_microbatches: Size = "auto",
        unit: Size = "auto",
        schedule: str = "zeropp",
        vshape: bool | None = None,
        cap: int | None = None,
        resident: Size = "auto",
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        sizes = {
            "pipeline_parallel_size": pipeline_parallel_size,
            "data_parallel_size": data_parallel_size,
            "stages_per_rank": stages_per_rank,
            "num_microbatches": num_microbatches,
            "unit": unit,
            "resident": resident,
        }
        for name, value in sizes.items():
            if value != "auto" and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1, or 'auto'")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; there are {', '.join(SCHEDULES)}")
        if isinstance(num_microbatches, int) and isinstance(unit, int) and unit > num_microbatches:
            raise ValueError(f"unit={unit} with num_microbatches={num_microbatches}: a unit has at most all of them")
        self._pipeline_parallel_size, self._data_size = pipeline_parallel_size, data_parallel_size
        self._replicas = data_parallel_replicas
        self._stages_per_rank, self._num_microbatches, self._unit = stages_per_rank, num_microbatches, unit
        self._schedule_name, self._vshape, self._cap, self._resident = schedule, vshape, cap, resident
        self._activation_checkpointing, self._cpu_offload = activation_checkpointing, cpu_offload
        self._groups: ProcessGroups | None = None
        self._pipeline: Pipeline | None = None
        self._runner: PipelineSteps | None = None
        self._owned_optimizers: OwnedOptimizers | None = None
        self._schedules: dict[int, Schedule] = {}
        self._first_count: int | None = None
        self._stash: list[tuple[Tensor, Tensor | None]] = []
        self._seed = 0

    # -- processes ------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)
        if self._groups is not None:
            return
        self._setup_distributed()
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

    @property
    def _steps(self) -> PipelineSteps:
        if self._runner is None:
            raise RuntimeError("the model is cut when the Trainer starts")
        return self._runner

    @property
    def pipeline(self) -> Pipeline:
        """This rank's part of the model."""
        if self._pipeline is None:
            raise RuntimeError("the model is cut when the Trainer starts")
        return self._pipeline

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch; all ranks of a pipeline get the first one's, whatever their own loaders drew."""
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return broadcast_batch(batch, self.groups) if self.groups.layout.pipeline > 1 else batch

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.groups.layout.data, "rank": self.groups.data_rank}

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the data-parallel ranks where no group is given: the ranks of a pipeline hold equal values."""
        self._refuse_in_user_code("reduce")
        if group is None:
            if self.groups.layout.data == 1:
                return tensor
            group = self.groups.data
        return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Over the data-parallel ranks where no group is given."""
        self._refuse_in_user_code("all_gather")
        if group is None:
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
        if self._runner is not None and self._runner.in_user_code:
            raise RuntimeError(
                f"{what} was called in a step: under zeropp that code runs on the ranks of the last stage alone, and "
                "the others would be waited for. Log with sync_dist=True, weigh micro-batches with loss_weight(batch), "
                "or move the call to a hook such as on_train_batch_end"
            )

    # -- set-up ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module = self._module
        if self.accelerator is not None:
            self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} optimises manually; zeropp runs forward and backward passes of a step "
                "together. Use automatic optimization"
            )
        if self._pipeline is None or self._pipeline.chain.root is not module:
            self._cut(module)
            self._runner = PipelineSteps(module, self.pipeline, self.precision_plugin, self._seed)
        self.pipeline.prepare()
        self._owned_optimizers = None
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _cut(self, module: pl.LightningModule) -> None:
        precision = fsdp_precision(self.precision_plugin)
        cut_before = getattr(module, "_zeropp_pipeline", None)
        if cut_before is not None:
            self._adopt(cut_before)
            return
        self.precision_plugin.convert_module(module)
        chain = find_chain(module)
        chain.checkpoint_blocks = self._activation_checkpointing
        self._warn_of_batch_norm(chain)
        ranks = self.groups.layout.pipeline
        per_rank = self._stages_per_rank
        if per_rank == "auto":
            few = len(chain) < 2 * ranks and self._schedule_name != "zbv"
            per_rank = 1 if few or self._schedule_name in ("1f1b", "zb_h1") else 2
        vshape = self._schedule_name == "zbv" if self._vshape is None else self._vshape
        # All that can be wrong with the schedule is known now, whatever the batches will be.
        count = 4 * ranks if self._num_microbatches == "auto" else self._num_microbatches
        self._build_schedule(Placement(ranks, per_rank, vshape), count)
        placement = Placement(ranks, per_rank, vshape)
        cuts = cut_chain(chain, placement.stages)
        self._compare_ranks(module, placement, cuts)
        self._pipeline = Pipeline(
            chain,
            placement,
            cuts,
            self.groups,
            self.root_device,
            precision=precision,
            cpu_offload=self._cpu_offload,
        )
        object.__setattr__(module, "_zeropp_pipeline", self._pipeline)
        self._announce()

    def _warn_of_batch_norm(self, chain: Chain) -> None:
        names = [name for name, part in chain.root.named_modules() if isinstance(part, _BATCH_NORMS)]
        if names and self._num_microbatches != 1:
            rank_zero_warn(
                f"{', '.join(names)}: BatchNorm takes its statistics from a micro-batch, not from the whole batch; "
                "use GroupNorm or LayerNorm, or num_microbatches=1"
            )

    def _adopt(self, pipeline: Pipeline) -> None:
        """Take over a model that another Trainer of this process has cut."""
        same = pipeline.groups.layout == self.groups.layout
        if not same:
            raise ValueError(
                f"this module was cut for {pipeline.groups.layout} and cannot be cut again for {self.groups.layout}: "
                "make a new module and load a checkpoint into it"
            )
        self._groups, self._pipeline = pipeline.groups, pipeline

    def _compare_ranks(self, module: pl.LightningModule, placement: Placement, cuts: Any) -> None:
        """Refuse ranks with different models or settings, which would wait for each other for ever."""
        described = {
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "parameters": [[name, list(p.shape), str(p.dtype)] for name, p in module.named_parameters()],
            "placement": [placement.ranks, placement.stages_per_rank, placement.vshape],
            "cuts": cuts,
            "settings": [self._schedule_name, self._num_microbatches, self._unit, self._cap, self._resident],
            "hparams": str(dict(module.hparams)),
            "config": hydra_config(),
            "torch": torch.__version__,
        }
        digests = {
            key: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:12]
            for key, value in described.items()
        }
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, digests)
        for rank, theirs in enumerate(everyone):
            differing = [key for key in digests if theirs[key] != everyone[0][key]]
            if differing:
                raise RuntimeError(
                    f"rank {rank} differs from rank 0 in {', '.join(differing)}: "
                    + "; ".join(f"{key} {theirs[key]} against {everyone[0][key]}" for key in differing)
                    + ". All ranks have to run the same code with the same settings; in a sweep, start every job's "
                    "ranks from one resolved configuration"
                )

    def _announce(self) -> None:
        pipeline, layout = self.pipeline, self.groups.layout
        total = sum(p.numel() for p in pipeline.chain.root.parameters())
        blocks = ", ".join(f"{first}-{end - 1}" if end - first > 1 else f"{first}" for first, end in pipeline.cuts)
        rank_zero_info(
            f"zeropp: {layout.pipeline} pipeline ranks x {layout.data} data-parallel ranks"
            + (f" ({layout.replicas} replicas)" if layout.replicas > 1 else "")
            + f", {pipeline.placement.stages_per_rank} stages a rank"
            f" ({'V-shaped' if pipeline.placement.vshape else 'looped'}), schedule {self._schedule_name}\n"
            f"zeropp: {len(pipeline.chain)} blocks of {pipeline.chain.name}, {total:,} parameters, by stage: {blocks}\n"
            f"zeropp: weights {'sharded' if pipeline.sharded else 'whole on their stage'}, "
            f"{len(pipeline.copies)} parameters of rank 0 held by several ranks"
        )

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        owned = OwnedOptimizers(self.pipeline)
        with owned.placeholders():
            try:
                super().setup_optimizers(trainer)
            except RuntimeError as error:
                if "multiple optimizers" not in str(error):
                    raise
                # Lightning's way out, manual optimization, is none here.
                raise ValueError(
                    "configure_optimizers returned several optimizers; zeropp runs one. Use one optimizer with "
                    "parameter groups"
                ) from error
        for optimizer in self.optimizers:
            owned.keep_owned(optimizer)
        self._owned_optimizers = owned

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        plugin = self.precision_plugin

        def clip_grad_by_norm(optimizer: Optimizer, clip_val: float) -> None:
            self.pipeline.clip_grad_norm(list(plugin.main_params(optimizer)), float(clip_val))

        # The norm is the whole model's: a plugin sees this rank's parameters alone.
        plugin.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]

    @override
    def model_to_device(self) -> None:
        """Nothing: the model is moved when it is cut."""

    @override
    def teardown(self) -> None:
        if self._pipeline is not None:
            self._pipeline.restore()
        super().teardown()

    # -- steps ----------------------------------------------------------------------------------------------------

    def _build_schedule(self, placement: Placement, count: int) -> Schedule:
        name = self._schedule_name
        units = name.startswith("zeropp")
        unit = None
        if units and self._unit != "auto":
            unit = min(self._unit, count)
        resident = None
        if self._resident != "auto":
            resident = min(self._resident, placement.stages_per_rank)
        elif units:
            resident = min(2, placement.stages_per_rank)
        return build_schedule(
            name,
            ranks=placement.ranks,
            stages_per_rank=placement.stages_per_rank,
            micro_batches=count,
            unit=unit,
            vshape=placement.vshape if units else None,
            cap=self._cap,
            resident=resident,
        )

    def _count_micro_batches(self, rows: int) -> int:
        wanted = self._num_microbatches
        if wanted == "auto":
            if self._first_count is None:
                self._first_count = choose_micro_batches(rows, self.groups.layout.pipeline)
                if self._unit != "auto" and self._unit > self._first_count:
                    raise ValueError(
                        f"unit={self._unit}, but the first batch of {rows} rows is split into {self._first_count} "
                        "micro-batches and a unit has at most all of them: lower unit, or set num_microbatches"
                    )
            return min(self._first_count, rows)
        if wanted > rows:
            raise ValueError(
                f"num_microbatches={wanted}, but the batch has {rows} rows and every micro-batch needs one: lower it, "
                "use larger batches, or drop_last=True if this is the last batch of an epoch"
            )
        return wanted

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the schedule; the gradients are put aside until ``backward``."""
        loop, accumulated = self._module.trainer.fit_loop, self._module.trainer.accumulate_grad_batches
        if loop.batch_idx % accumulated == 0:
            # Lightning's zero_grad comes behind this step.
            for owned in self.pipeline.parameters().values():
                owned.grad = None
        step = loop.epoch_loop.total_batch_idx
        output = self._steps.train(self._schedule_for(args[0]), args, kwargs, step=step, scale=1 / accumulated)
        self._stash = [(parameter, parameter.grad) for parameter in self.pipeline.parameters().values()]
        for parameter, _ in self._stash:
            parameter.grad = None
        return output

    def _schedule_for(self, batch: Any) -> Schedule:
        rows = batch_rows(batch)
        count = self._count_micro_batches(rows)
        if count not in self._schedules:
            self._schedules[count] = self._build_schedule(self.pipeline.placement, count)
            self._say_schedule(count, rows)
        return self._schedules[count]

    def _say_schedule(self, count: int, rows: int) -> None:
        schedule = self._schedules[count]
        rank_zero_info(
            f"zeropp: {rows} rows in {count} micro-batches, units of {schedule.unit}, {schedule.resident} of "
            f"{schedule.placement.stages_per_rank} stages gathered at once"
        )

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Put the gradients back; they were made in ``training_step``."""
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        for held, grad in self._stash:
            held.grad = grad
        self._stash = []
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._steps.evaluate(self._module.validation_step, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._steps.evaluate(self._module.test_step, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._steps.evaluate(self._module.predict_step, args, kwargs, log=False)
