# SPDX-License-Identifier: Apache-2.0
"""Text2TextModule: multitask prompted training and zero-shot evaluation of a T5 as one LightningModule.

The loss is the mean over *target tokens* of the whole global batch, so it does not depend on how many data-parallel
ranks share the batch: each rank's sum is divided by the mean number of target tokens a rank, which data-parallel
averaging turns into the global token mean. The alternative, a mean of the ranks' means, weights tokens of ranks with
short answers more. Under a pipeline ``training_step`` gets micro-batches, whose token means the strategy averages by
``loss_weight``: the same mean again.

The model is built in ``configure_model``, where FSDP2 shards it block by block, from weights that are seeded by name:
every strategy starts from the same numbers. Evaluation keeps nothing between epochs: the datasets' plans say what is
scored, :class:`~lightning_zeroprompt.metrics.TaskScores` sums it up, a pure function makes macro scores of the sums.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from typing_extensions import override

from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset
from lightning_zeroprompt.metrics.summary import EvaluationSummary, summarise
from lightning_zeroprompt.metrics.task_scores import TaskScores
from lightning_zeroprompt.models.optim import OptimizerSettings, build_optimizer, learning_rate_factor
from lightning_zeroprompt.models.pipeline_blocks import pipeline_blocks
from lightning_zeroprompt.models.prompt_transfer import mix_unseen_prompts
from lightning_zeroprompt.models.scoring import SCORES, score_batch
from lightning_zeroprompt.models.soft_prompt import SoftPrompt
from lightning_zeroprompt.models.t5 import T5, T5Config

__all__ = ["SoftPromptSettings", "Text2TextModule", "shard_t5", "token_loss"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SoftPromptSettings:
    """Learned prompts in front of every example; see :class:`~lightning_zeroprompt.models.soft_prompt.SoftPrompt`.

    Attributes:
        mode: ``"none"``, ``"shared"`` or ``"per_task"``.
        length: Vectors of a prompt; 0 where the mode is ``"none"``.
        dropout: Share of examples that train without their prompt.
        unseen: What a task without a prompt of its own gets: ``"none"``, the ``"mean"`` of the training tasks'
        prompts, or
            those of the training tasks whose inputs are most alike (``"retrieval"``).
    """

    mode: Literal["none", "shared", "per_task"] = "none"
    length: int = 0
    dropout: float = 0.1
    unseen: Literal["none", "mean", "retrieval"] = "none"

    def __post_init__(self) -> None:
        """Refuse lengths that contradict the mode.

        Raises:
            ValueError: With mode, length and the remedy.
        """
        if (self.mode == "none") != (self.length == 0):
            raise ValueError(
                f"soft prompt mode {self.mode!r} with length {self.length}: 'none' needs length 0, the others 1 or more"
            )
        if self.unseen != "none" and self.mode != "per_task":
            raise ValueError(
                f"soft prompt unseen={self.unseen!r} mixes prompts of tasks, which mode {self.mode!r} does not have; "
                "use mode 'per_task'"
            )


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of the target tokens, in nats.

    Args:
        logits: ``[R, L, vocabulary]``, any float type; the softmax is taken in float32.
        labels: ``[R, L]`` int64, -100 where nothing is to be predicted.

    Returns:
        A float32 scalar.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def shard_t5(model: T5, mesh: DeviceMesh) -> None:
    """Shard a T5 with FSDP2, in place: every layer is a group of its own, the rest goes with the root.

    Methods that run layers or read the embedding outside ``forward`` are registered, so that they gather what they use.

    Args:
        model: On any device, meta included.
        mesh: One dimension, data parallel.
    """
    for layer in (*model.encoder, *model.decoder):
        fully_shard(layer, mesh=mesh)
    for layer in model.decoder:
        for method in ("step", "project_memory"):
            register_fsdp_forward_method(layer, method)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("encode", "decode", "option_logprobs", "generate"):
        register_fsdp_forward_method(model, method)


class Text2TextModule(pl.LightningModule):
    """A T5 that trains on :class:`~lightning_zeroprompt.data.TaskDataModule`'s batches and scores its evaluation data.

    Args:
        vocab_size: Of the corpus's tokenizer.
        size: A size that :meth:`~lightning_zeroprompt.models.t5.T5Config.preset` knows.
        overrides: Fields of the preset to change.
        optimizer: How parameters are updated.
        soft_prompt: Learned prompts, if any.
        num_tasks: Training tasks, for soft prompts a task.
        init_seed: Seed of the weights.
        config: A whole :class:`~lightning_zeroprompt.models.t5.T5Config`, or its fields, in place of ``size`` and
            ``overrides``.
        weights: Weights to start from, by the T5's own names, such as those of
            :func:`~lightning_zeroprompt.models.hf.load_t5`; not kept in checkpoints' hyper-parameters.
        tokenizer: Fingerprint of the corpus's tokenizer, compared where the checkpoint meets a corpus.
        compile: Whether the layers are compiled with ``torch.compile``.

    Attributes:
        model: The T5; None until ``configure_model`` has run.
        summaries: Result of the last evaluation, one for each evaluation dataset.
        loaded_steps: Optimizer steps of the checkpoint that the module was loaded from, else 0.
        evaluate_whole: For pipeline strategies: an evaluation step calls the model in several ways, not once.
    """

    model: T5
    evaluate_whole = True

    def __init__(
        self,
        *,
        vocab_size: int,
        size: str = "tiny",
        overrides: Mapping[str, Any] | None = None,
        optimizer: OptimizerSettings | Mapping[str, Any] | None = None,
        soft_prompt: SoftPromptSettings | Mapping[str, Any] | None = None,
        num_tasks: int = 0,
        init_seed: int = 0,
        config: T5Config | Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        tokenizer: str = "",
        compile: bool = False,  # noqa: A002 - torch's and Lightning's word for it
    ) -> None:
        super().__init__()
        self.optimizer_settings = _settings(OptimizerSettings, optimizer)
        self.soft_prompt_settings = _settings(SoftPromptSettings, soft_prompt)
        self.summaries: list[EvaluationSummary] = []
        self.loaded_steps = 0
        self._metrics: list[TaskScores] = []
        # Plain data only: checkpoints are read without unpickling objects.
        self.save_hyperparameters(
            {
                "vocab_size": vocab_size,
                "size": size,
                "overrides": dict(overrides or {}),
                "optimizer": dataclasses.asdict(self.optimizer_settings),
                "soft_prompt": dataclasses.asdict(self.soft_prompt_settings),
                "num_tasks": num_tasks,
                "init_seed": init_seed,
                "config": None if config is None else dataclasses.asdict(_settings(T5Config, config)),
                "tokenizer": tokenizer,
                "compile": compile,
            }
        )
        self.config: T5Config = (
            T5Config.preset(size, vocab_size, **(overrides or {})) if config is None else _settings(T5Config, config)
        )
        if self.config.vocab_size < vocab_size:
            raise ValueError(
                f"the model has {self.config.vocab_size:,} embeddings, the corpus's tokenizer {vocab_size:,} ids; "
                "compile the corpus with the tokenizer of the checkpoint that you start from"
            )
        self._weights = weights

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how long the checkpoint was trained."""
        self.loaded_steps = checkpoint.get("global_step", 0)

    @override
    def setup(self, stage: str) -> None:
        """Refuse data that this model cannot read or would read without its prompts.

        Raises:
            ValueError: A :class:`~lightning_zeroprompt.data.TaskDataModule` has more ids, tasks or prompt positions
                than the model, or fewer prompt positions.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TaskDataModule):
            return
        prompt, ids = self.soft_prompt_settings, self.hparams["vocab_size"]
        # Ids of soft prompts begin where those of the tokenizer end.
        if data.corpus.vocab_size > ids or (prompt.length and data.corpus.vocab_size != ids):
            raise ValueError(
                f"the model was built for {ids:,} ids, {data.corpus.path} was compiled with "
                f"{data.corpus.vocab_size:,}; give vocab_size={data.corpus.vocab_size}"
            )
        if stage != "fit":
            return
        positions = data.packing_settings.soft_prompt_length
        if positions != prompt.length:
            raise ValueError(
                f"the model has soft prompts of length {prompt.length}, the data leave room for {positions}; give "
                f"TaskDataModule soft_prompt_length={prompt.length}"
            )
        if prompt.mode == "per_task" and self.hparams["num_tasks"] < len(data.task_indices):
            raise ValueError(
                f"the model has soft prompts for {self.hparams['num_tasks']} tasks, the data train "
                f"{len(data.task_indices)}; give num_tasks={len(data.task_indices)}"
            )

    @override
    def configure_model(self) -> None:
        """Build the T5, and shard it where the strategy has a data-parallel mesh."""
        if "model" in self._modules:
            return
        model = T5(self.config, seed=self.hparams["init_seed"], soft_prompt=self._soft_prompt())
        if self._weights is not None:
            # Prompts may be new, nothing else: weights under other names would otherwise be left out in silence.
            own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("soft_prompt.")}
            model.load_state_dict({**own, **self._weights})
            self._weights = None
        if self.hparams["compile"]:
            model.compile_blocks()
        mesh = self.device_mesh
        if mesh is not None and mesh["data_parallel"].size() > 1:
            if self.soft_prompt_settings.unseen != "none":
                raise ValueError(
                    f"soft prompt unseen={self.soft_prompt_settings.unseen!r} mixes whole prompts, which a sharded "
                    "model does not hold; use unseen='none', or strategy=ddp"
                )
            shard_t5(model, mesh["data_parallel"])
        self.model = model

    def _soft_prompt(self) -> SoftPrompt | None:
        settings = self.soft_prompt_settings
        if settings.mode == "none":
            return None
        return SoftPrompt(
            settings.mode,
            length=settings.length,
            num_tasks=max(1, self.hparams["num_tasks"]),
            d_model=self.config.d_model,
            first_id=self.hparams["vocab_size"],
            dropout=settings.dropout,
        )

    @override
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[R, Ld, vocabulary]`` of a packed batch."""
        logits: Tensor = self.model(
            batch["input_ids"],
            batch["decoder_input_ids"],
            input_segments=batch["input_segments"],
            decoder_segments=batch["decoder_segments"],
            task_ids=batch.get("task_ids"),
        )
        return logits

    def configure_pipeline(self) -> tuple[nn.Module, list[nn.Module]]:
        """What pipeline strategies cut into stages: the T5, and its blocks."""
        return self.model, pipeline_blocks(self.model)

    def loss_weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of target tokens: the weight of a micro-batch's loss in the mean over micro-batches and ranks."""
        return (batch["labels"] != -100).sum()

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Token mean over the global batch; see the module's text."""
        loss_sum = token_loss(self(batch), batch["labels"])
        tokens = self.loss_weight(batch).to(loss_sum.dtype)
        if not getattr(self.trainer.strategy, "weighs_micro_batches", False):
            tokens = self.trainer.strategy.reduce(tokens, reduce_op="mean")
        loss = loss_sum / tokens.clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def on_validation_epoch_start(self) -> None:
        """Start one vector metric for each evaluation dataset."""
        datasets = self._evaluation_datasets()
        self._metrics = [TaskScores(len(dataset.plan.cells), SCORES).to(self.device) for dataset in datasets]
        unseen = self.soft_prompt_settings.unseen
        if unseen != "none":
            training_tasks = self.trainer.datamodule.task_indices  # type: ignore[attr-defined]
            for dataset in datasets:
                mix_unseen_prompts(self.model, dataset, training_tasks, unseen)

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one evaluation batch."""
        tokenizer = self._evaluation_datasets()[dataloader_idx].corpus.tokenizer
        # Shapes vary from batch to batch here, and each would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            scores = score_batch(self.model, batch, tokenizer)
        self._metrics[dataloader_idx].update(batch["cell"], scores)

    @override
    def on_validation_epoch_end(self) -> None:
        """Turn sums into macro scores, keep them in ``summaries`` and log them."""
        # The first batches of a plan say nothing of its scores; such runs (fast_dev_run, say) try the code.
        datasets = self._evaluation_datasets()
        limits = zip(self.trainer.num_val_batches, datasets, strict=True)
        if self.trainer.sanity_checking or any(batches < len(dataset) for batches, dataset in limits):
            return
        self.summaries = []
        for metric, dataset in zip(self._metrics, datasets, strict=True):
            with metric.sync_context():
                table = metric.table()
            self.summaries.append(summarise(dataset.plan, table))
        self._metrics = []
        if self.summaries:
            # All ranks have equal values; without sync_dist Lightning warns about every one of them.
            scalars = self.summaries[0].scalars()
            self.log_dict({f"heldout/{name}": value for name, value in scalars.items()}, sync_dist=True)

    def _evaluation_datasets(self) -> list[EvaluationDataset]:
        loaders = self.trainer.val_dataloaders or []
        return [loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with its schedule stepped once an optimizer step."""
        # Lightning refuses to clip for fused optimizers under mixed precision.
        fused = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = build_optimizer(self.named_parameters(), self.optimizer_settings, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total, self.optimizer_settings)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _settings(kind: type[Any], given: Any) -> Any:
    if given is None:
        return kind()
    return kind(**given) if isinstance(given, Mapping) else given
