# SPDX-License-Identifier: Apache-2.0
"""``Trainer(strategy="zeropp")``: pipeline parallelism and FSDP for any LightningModule.

What a user has to know: ``training_step`` is called with *micro-batches*, on the rank of the last stage; code before
the model's call runs on every rank (and once more there). What it sets on ``self`` lives on last-stage ranks, and what
it prints or writes to ``self.logger`` itself is dropped unless that is rank 0; what it logs with ``self.log``, counts
in the module's metrics or returns is there on every rank (see ``relay``, ``metrics``, ``broadcast``).
``validation_step`` and the others are called with whole batches, on the pipeline, or with ``evaluation="whole"`` on
every rank with the whole model (see ``whole``). ``trainer.strategy.pipeline`` has the norms of the whole model's
gradients.

The step's loss is the mean of the micro-batches' losses, weighted by rows. A mean over tokens, such as that of Hugging
Face models, stays one if the module says how many a micro-batch has; other strategies ignore it::

    def loss_weight(self, batch):
        return (batch["labels"][:, 1:] != -100).sum()

How it meets Lightning's loop, which calls ``training_step``, then ``optimizer.zero_grad``, then ``backward``: the
schedule runs in ``training_step``, gradients and all, because the loss has to be known when it returns. They are put
aside before ``zero_grad`` and back in ``backward``. Alternatives: running it in ``backward`` reports a loss that is not
there yet; a loop of its own loses Lightning's accumulation, callbacks and profilers.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_zeroprompt.pipeline.batch import batch_rows
from lightning_zeroprompt.pipeline.costs import Costs
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.pipeline import Pipeline, cut_chain
from lightning_zeroprompt.pipeline.schedule import Schedule
from lightning_zeroprompt.strategies.announce import describe_cut, describe_schedule
from lightning_zeroprompt.strategies.auto import AutoSchedule, gpu_sizes
from lightning_zeroprompt.strategies.callbacks import cut_averages, refuse_callbacks
from lightning_zeroprompt.strategies.checkpoint.optimizer import load_named_state, named_state, numbers_to_names
from lightning_zeroprompt.strategies.checkpoint.trainer import load_checkpoint, load_module_state, save_checkpoint
from lightning_zeroprompt.strategies.compare import compare_ranks
from lightning_zeroprompt.strategies.norms import clip_whole, whole_grad_norms
from lightning_zeroprompt.strategies.optimizers import OwnedOptimizers
from lightning_zeroprompt.strategies.ranks import RankedStrategy
from lightning_zeroprompt.strategies.schedules import AUTO, ScheduleSettings, Size
from lightning_zeroprompt.strategies.steps import PipelineSteps
from lightning_zeroprompt.strategies.stopping import StopSignals
from lightning_zeroprompt.strategies.support import (
    compile_options,
    fsdp_precision,
    hidden_example,
    hydra_config,
    warn_of_batch_norm,
)
from lightning_zeroprompt.strategies.whole import WholeEvaluation, WholeModel

__all__ = ["ZeroPPStrategy"]


class ZeroPPStrategy(RankedStrategy):
    """Pipeline parallelism on the ZeroPP schedule, with FSDP2 within each stage.

    Args:
        pipeline_parallel_size: P; ``"auto"`` is all ranks that data parallelism leaves.
        data_parallel_size: D, ranks that share each stage's weights, gradients and optimizer state.
        data_parallel_replicas: Groups within D that each hold all shards (HSDP).
        stages_per_rank: V; ``"auto"`` is 2 where there are at least 2 P blocks, else 1.
        num_microbatches: M; ``"auto"`` is the largest divisor of the first batch's rows up to 4 P. Later batches with
            fewer rows get fewer.
        unit: U, micro-batches that go through all stages together; ``"auto"`` is M.
        schedule: One of ``pipeline.SCHEDULES``; or ``"auto"``: the planner chooses V, placement, unit and order, and
            the order anew for the times of the third batch (see ``auto``).
        costs: For ``schedule="auto"``: measured costs, or the path of a file with them; None estimates.
        memory_limit: For ``schedule="auto"`` with costs: bytes that a GPU may hold in a step by their sizes; None is
            most of the smallest GPU's memory.
        vshape: Place stages down the ranks and up again; None is the schedule's own placement.
        cap: See ``pipeline.build_schedule``.
        resident: K, stages of a rank whose weights are gathered at once; ``"auto"`` is 2 (or V, if less), or all where
            nothing is sharded.
        activation_checkpointing: Run each block under ``torch.utils.checkpoint``.
        compile_stages: Compile the blocks of each stage as one, with ``torch.compile``; a mapping has its options.
            Blocks that are recomputed are compiled one by one.
        evaluation: ``"pipeline"`` runs ``validation_step``, ``test_step`` and ``predict_step`` on the pipeline, which
            takes one call of the model in each; ``"whole"`` gathers the weights to every rank while they run, for steps
            that call it in any way; ``"auto"`` does the latter where the module has ``evaluate_whole = True``. Ranks
            that evaluate whole models can share batches: data modules ask for ``evaluation_sampler_kwargs``.
        cpu_offload: Keep shards, gradients and optimizer state in the host's memory.
        save_distributed_checkpoint: A folder with a file a rank, or one file.
        process_group_backend: As in ``ModelParallelStrategy``.
        timeout: Of collectives.

    Raises:
        ValueError: If a number is out of range, the schedule is unknown, or they do not fit together.

    Example::

        Trainer(strategy="zeropp", devices=8)
        Trainer(strategy=ZeroPPStrategy(pipeline_parallel_size=4, data_parallel_size=2, num_microbatches=16), devices=8)

    Attributes:
        weighs_micro_batches: For modules that average over ranks themselves elsewhere: here ``loss_weight`` does it.
    """

    weighs_micro_batches = True

    def __init__(
        self,
        pipeline_parallel_size: Size = "auto",
        data_parallel_size: int = 1,
        data_parallel_replicas: int = 1,
        stages_per_rank: Size = "auto",
        num_microbatches: Size = "auto",
        unit: Size = "auto",
        schedule: str = "zeropp",
        costs: Costs | str | Path | None = None,
        memory_limit: int | None = None,
        vshape: bool | None = None,
        cap: int | None = None,
        resident: Size = "auto",
        activation_checkpointing: bool = False,
        compile_stages: bool | Mapping[str, Any] = False,
        evaluation: Literal["auto", "pipeline", "whole"] = "auto",
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            pipeline_parallel_size,
            data_parallel_size,
            data_parallel_replicas,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._settings = ScheduleSettings(schedule, stages_per_rank, num_microbatches, unit, vshape, cap, resident)
        for name, given in (("costs", costs), ("memory_limit", memory_limit)):
            if given is not None and schedule != AUTO:
                raise ValueError(f"{name} with schedule={schedule!r}: only 'auto' plans with it; leave it out")
        per_rank = None if stages_per_rank == "auto" else stages_per_rank
        again = activation_checkpointing
        self._auto = AutoSchedule(costs, per_rank, memory_limit, recompute=again) if schedule == AUTO else None
        if evaluation not in ("auto", "pipeline", "whole"):
            raise ValueError(f"evaluation={evaluation!r}: use 'pipeline', 'whole' or 'auto'")
        self._activation_checkpointing, self._cpu_offload = activation_checkpointing, cpu_offload
        self._compile_stages = compile_options(compile_stages)
        self._evaluation = evaluation
        self._whole: WholeModel | None = None
        self._pipeline: Pipeline | None = None
        self._runner: PipelineSteps | None = None
        self._stopping: StopSignals | None = None
        self._owned_optimizers: OwnedOptimizers | None = None
        self._schedules: dict[int, Schedule] = {}
        self._first_count: int | None = None
        self._running = ExitStack()
        self._stash: list[tuple[Tensor, Tensor | None]] = []

    # -- what runs ------------------------------------------------------------------------------------------------

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

    @property
    def schedules(self) -> dict[int, Schedule]:
        """What training steps run, by their number of micro-batches; empty before the first one."""
        return dict(self._schedules)

    @property
    @override
    def _evaluates_whole(self) -> bool:
        if self._evaluation == "auto":
            return bool(getattr(self._module, "evaluate_whole", False))
        return self._evaluation == "whole"

    @property
    @override
    def _is_whole(self) -> bool:
        return self._whole is not None and self._whole.gathered

    @property
    @override
    def _in_user_code(self) -> bool:
        return self._runner is not None and self._runner.in_user_code

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
        if fitting:
            refuse_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
        if self._pipeline is None or self._pipeline.chain.root is not module:
            self._cut(module)
            self._runner = PipelineSteps(module, self.pipeline, self.precision_plugin, self._seed)
        if self._evaluates_whole:
            self._evaluate_whole(trainer)
        self._running.callback(self.pipeline.restore)
        self.pipeline.prepare()
        self._running.callback(self._steps.metrics.detach)
        self._steps.metrics.attach()
        self._running.enter_context(hidden_example(module))
        if fitting:
            self._running.enter_context(whole_grad_norms(self.pipeline))
            cut_averages(trainer.callbacks, module)  # type: ignore[attr-defined]
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._stopping = StopSignals(self.groups.everyone, self._end_children)

    def _end_children(self) -> None:
        if self.launcher is not None:
            self.launcher.kill(signal.SIGKILL)

    def _evaluate_whole(self, trainer: pl.Trainer) -> None:
        before: list[Any] = [callback for callback in trainer.callbacks if isinstance(callback, WholeEvaluation)]  # type: ignore[attr-defined]
        for callback in before:
            trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
        self._whole = WholeModel(self.pipeline)
        trainer.callbacks.insert(0, WholeEvaluation(self._whole))  # type: ignore[attr-defined]

    def _cut(self, module: pl.LightningModule) -> None:
        self._schedules, self._first_count = {}, None
        precision = fsdp_precision(self.precision_plugin)
        cut_before = getattr(module, "_zeropp_pipeline", None)
        if cut_before is not None:
            self._adopt(cut_before)
            return
        self.precision_plugin.convert_module(module)
        chain = find_chain(module, self._settings.fewest_stages(self.groups.layout.pipeline))
        chain.checkpoint_blocks = self._activation_checkpointing
        if self._compile_stages is not None:
            chain.compile_rows(**self._compile_stages)
        warn_of_batch_norm(chain, self._settings.num_microbatches)
        layout = self.groups.layout
        if self._auto is None:
            placement = self._settings.placement(layout.pipeline, len(chain))
            cuts = cut_chain(chain, placement)
        else:
            self._auto.limit_to_gpus(gpu_sizes(self.root_device, self.groups.everyone))
            count = self._settings.expected_count(layout.pipeline)
            placement, cuts = self._auto.cut(chain, layout.pipeline, layout.data, count)
        compare_ranks(
            {
                "module": f"{type(module).__module__}.{type(module).__qualname__}",
                "parameters": [[name, list(p.shape), str(p.dtype)] for name, p in module.named_parameters()],
                "placement": [placement.ranks, placement.stages_per_rank, placement.vshape],
                "cuts": cuts,
                "settings": str(self._settings),
                "hparams": str(dict(module.hparams)),
                "config": hydra_config(),
                "torch": torch.__version__,
            }
        )
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
        _say(describe_cut(self._pipeline))

    def _adopt(self, pipeline: Pipeline) -> None:
        """Take over a model that another Trainer of this process has cut."""
        same = pipeline.groups.layout == self.groups.layout
        if not same:
            raise ValueError(
                f"this module was cut for {pipeline.groups.layout} and cannot be cut again for {self.groups.layout}: "
                "make a new module and load a checkpoint into it"
            )
        self._groups, self._pipeline = pipeline.groups, pipeline

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        owned = OwnedOptimizers(self.pipeline)
        with owned.placeholders():
            try:
                super().setup_optimizers(trainer)
            except RuntimeError as error:
                if "multiple optimizers" not in str(error):
                    raise
                # Lightning's advice is manual optimization.
                raise ValueError(
                    "configure_optimizers returned several optimizers; zeropp runs one. Use one with parameter groups"
                ) from error
        for optimizer in self.optimizers:
            owned.keep_owned(optimizer)
        self._owned_optimizers = owned

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        clip_whole(self.precision_plugin, self.pipeline)

    @override
    def model_to_device(self) -> None:
        """Nothing: the model is moved when it is cut."""

    @override
    def teardown(self) -> None:
        if self._whole is not None:
            self._whole.release()
        self._running.close()
        super().teardown()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        module = self._module
        changed = [
            name
            for name in ("on_before_batch_transfer", "on_after_batch_transfer")
            for owner in (module, module.trainer.datamodule)  # type: ignore[attr-defined]
            if owner is not None and is_overridden(name, owner)
        ]
        if module.trainer.training and not changed:
            self._settings.check_loader(dataloader, self.groups.layout.pipeline)
        return super().process_dataloader(dataloader)

    # -- signals --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """From here on: Lightning installs its handlers behind ``setup``."""
        if self._stopping is not None:
            self._stopping.listen(training=self._module.trainer.state.fn == TrainerFn.FITTING)

    @override
    def on_train_start(self) -> None:
        self._listen()
        if not gc.get_freeze_count():
            # A collection walks over all there is, for tens of milliseconds, and all ranks wait for the one at it.
            gc.collect()
            gc.freeze()
            self._running.callback(gc.unfreeze)

    @override
    def on_validation_start(self) -> None:
        self._listen()

    @override
    def on_test_start(self) -> None:
        self._listen()

    @override
    def on_predict_start(self) -> None:
        self._listen()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._stopping is not None:
            self._stopping.vote()

    # -- steps ----------------------------------------------------------------------------------------------------

    def check_rows(self, rows: int) -> None:
        """Refuse batches that cannot be cut into the micro-batches that were asked for.

        Args:
            rows: Of a data-parallel rank's batch.

        Raises:
            ValueError: If there are fewer than micro-batches.
        """
        self._settings.check_rows(rows)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the schedule; the gradients are put aside until ``backward``."""
        loop, accumulated = self._module.trainer.fit_loop, self._module.trainer.accumulate_grad_batches
        if loop.batch_idx % accumulated == 0:
            # Lightning's zero_grad comes behind this step.
            for owned in self.pipeline.parameters().values():
                owned.grad = None
        step = loop.epoch_loop.total_batch_idx
        schedule = self._schedule_for(args[0])
        with nullcontext() if self._auto is None else self._auto.learning(step, self.pipeline, self._schedules.clear):
            output = self._steps.train(schedule, args, kwargs, step=step, scale=1 / accumulated)
        self._stash = [(parameter, parameter.grad) for parameter in self.pipeline.parameters().values()]
        for parameter, _ in self._stash:
            parameter.grad = None
        return output

    def _schedule_for(self, batch: Any) -> Schedule:
        rows = batch_rows(batch)
        if self._first_count is None:
            self._first_count = self._settings.first_count(rows, self.groups.layout.pipeline)
        self._settings.check_rows(rows)
        count = min(self._first_count, rows)
        if count not in self._schedules:
            placement, planned = self.pipeline.placement, ""
            if self._auto is None:
                self._schedules[count] = self._settings.build(placement, count)
            else:
                self._schedules[count], planned = self._auto.build(placement, self.groups.layout.data, count)
            offloaded = self._cpu_offload
            _say(describe_schedule(self._schedules[count], rows, self.pipeline, offloaded=offloaded, planned=planned))
        return self._schedules[count]

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
        if self._is_whole:
            return super().validation_step(*args, **kwargs)
        return self._steps.evaluate(self._module.validation_step, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_whole:
            return super().test_step(*args, **kwargs)
        return self._steps.evaluate(self._module.test_step, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_whole:
            return super().predict_step(*args, **kwargs)
        return self._steps.evaluate(self._module.predict_step, args, kwargs, log=False)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part under the names of the whole model; other ranks' parameters are on the meta device."""
        if self._whole is not None:
            # A callback that saves at the end of an evaluation's epoch; there are no steps behind it.
            self._whole.release()
        return self._module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part by parameter names, with the groups of the whole model."""
        return named_state(optimizer, self._optimizer_names)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_module_state(self._module, checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        owned = self._optimizer_names
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_named_state(optimizer, numbers_to_names(state, owned.groups), owned)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self._refuse_in_user_code("save_checkpoint")
        if storage_options is not None:
            raise TypeError("zeropp writes checkpoints itself: there are no storage_options")
        path = Path(self.broadcast(filepath))
        save_checkpoint(checkpoint, path, self.pipeline, as_folder=self._save_distributed_checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        fitting = self._module.trainer.state.fn == TrainerFn.FITTING
        return load_checkpoint(
            Path(self.broadcast(checkpoint_path)),
            self.pipeline,
            self._owned_optimizers if fitting and self.optimizers else None,
            strict=self._module.strict_loading,
            weights_only=weights_only,
        )

    @property
    def _optimizer_names(self) -> OwnedOptimizers:
        if self._owned_optimizers is None:
            raise RuntimeError("there is no optimizer before fit")
        return self._owned_optimizers


def _say(lines: list[str]) -> None:
    rank_zero_info("\n".join(f"zeropp: {line}" for line in lines))
