# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves behind: result files, TensorBoard's HPARAMS and chart layout, and the closing table."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_zeroprompt.callbacks import GeneticPromptSearch
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset
from lightning_zeroprompt.metrics.summary import EvaluationSummary
from lightning_zeroprompt.models.module import Text2TextModule
from lightning_zeroprompt.prompts.report import prompts_table
from lightning_zeroprompt.report import results_table, write_results

__all__ = ["TensorBoardReport", "print_prompts", "print_records", "print_results", "save_results"]

_FINAL = "final/heldout_normalised"


class TensorBoardReport:
    """HPARAMS and the custom scalar layout, for TensorBoard loggers; nothing for others.

    Args:
        trainer: Its first logger is written to.
        config: The run's configuration.
        datamodule: Of the run.
        module: Of the run.
    """

    def __init__(
        self, trainer: pl.Trainer, config: DictConfig, datamodule: TaskDataModule, module: Text2TextModule
    ) -> None:
        logger = trainer.logger
        self._logger = logger if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero else None
        self._params = {
            "num_tasks": len(datamodule.task_indices),
            "model": _model_name(config),
            "d_model": module.config.d_model,
            "source": config.data.source,
            "seed": config.seed,
            "max_steps": config.trainer.max_steps,
            "rows_per_batch": config.data.rows_per_batch,
            "learning_rate": config.optimizer.learning_rate,
            "optimizer": config.optimizer.name,
            "denoising": config.mixture.denoising,
            "soft_prompt": config.model.soft_prompt.mode,
        }
        if self._logger is None:
            return
        # Without a metric at the start, TensorBoard's HPARAMS tab stays empty while the run goes on.
        self._logger.log_hyperparams(self._params, {_FINAL: 0.0})
        categories = sorted({task.category for task in datamodule.corpus.tasks if task.role == "heldout"})
        self._logger.experiment.add_custom_scalars(
            {
                "held-out": {
                    "levels": ["Multiline", [r"heldout/(heldout|category|task|instance)/train$"]],
                    "new wordings": ["Multiline", [r"heldout/(heldout|category|task|instance)/heldout$"]],
                    "categories": ["Multiline", [f"heldout/categories/{name}$" for name in categories]],
                },
                "training": {
                    "loss": ["Multiline", ["train/loss"]],
                    "throughput": ["Multiline", ["throughput/.*_per_second"]],
                },
            }
        )

    def finish(self, results: dict[str, Any]) -> None:
        """Write the final score beside the hyper-parameters.

        Args:
            results: Content of results.json.
        """
        if self._logger is not None:
            self._logger.log_hyperparams(self._params, {_FINAL: results["heldout_normalised"] or 0.0})
            self._logger.save()


def save_results(
    folder: Path,
    config: DictConfig,
    datamodule: TaskDataModule,
    module: Text2TextModule,
    trainer: pl.Trainer,
    *,
    untrained: EvaluationSummary | None = None,
) -> dict[str, Any]:
    """Write results.json, results.csv, results_tasks.json and results.png.

    Args:
        folder: The run folder.
        config: The run's configuration.
        datamodule: Of the run.
        module: Holds the last evaluation's summaries.
        trainer: Of the run.
        untrained: Scores before training, where known.

    Returns:
        Content of results.json.
    """
    summary, shuffled = module.summaries[0], module.summaries[1] if len(module.summaries) > 1 else None
    dataset: EvaluationDataset = trainer.val_dataloaders[0].dataset  # type: ignore[index]
    # A trainer that only evaluates has made no steps.
    steps = trainer.global_step or module.loaded_steps
    run: dict[str, Any] = {}
    if datamodule.task_indices:
        packing = datamodule.packing_report()
        batches = steps * config.trainer.accumulate_grad_batches
        tokens = packing.encoder_fill * config.data.encoder_length + packing.decoder_fill * config.data.decoder_length
        run["packing"] = dataclasses.asdict(packing)
        run["tokens_trained"] = round(tokens * config.data.rows_per_batch * batches)
    run |= {
        "seed": config.seed,
        "steps": steps,
        "model": {"size": _model_name(config), "parameters": module.model.num_parameters()},
        "truncated_inputs": dataset.num_truncated,
        "corpus": {"fingerprint": datamodule.corpus.fingerprint, **datamodule.corpus.counts},
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "config": OmegaConf.to_container(config, resolve=True),
    }
    paths = write_results(folder, dataset.plan, summary, untrained=untrained, shuffled=shuffled, run=run)
    content: dict[str, Any] = json.loads(paths["results.json"].read_text(encoding="utf-8"))
    return content


def _model_name(config: DictConfig) -> str:
    name: str = config.model.size if config.init_from is None else config.init_from
    return name


def print_results(
    folder: Path,
    results: Mapping[str, Any],
    module: Text2TextModule,
    *,
    untrained: EvaluationSummary | None = None,
) -> None:
    """Print the closing table, what was cut, the run folder and how to look at the curves.

    Args:
        folder: The run folder.
        results: Content of results.json.
        module: Holds the last evaluation's summaries.
        untrained: Scores before training, where known.
    """
    shuffled = module.summaries[1] if len(module.summaries) > 1 else None
    console = _console()
    console.print(results_table(module.summaries[0], untrained=untrained, shuffled=shuffled))
    data = results["config"]["data"]
    lengths = f"encoder_length={data['encoder_length']} and decoder_length={data['decoder_length']}"
    packing = results.get("packing", {"truncated": 0, "draws": 0})
    for cut, total, kind in (
        (packing["truncated"], packing["draws"], "training examples (of the first windows)"),
        (results["truncated_inputs"], results["sample_sizes"]["items"], "evaluation inputs"),
    ):
        if cut:
            console.print(f"Cut to fit {lengths}: {cut:,} of {total:,} {kind}", highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False)
    if (folder / "tensorboard").is_dir():
        console.print(f"Curves:     tensorboard --logdir {shlex.quote(str(folder))}", soft_wrap=True, highlight=False)


def print_prompts(trainer: pl.Trainer) -> None:
    """Print what searches of prompts have found, if the trainer has made any.

    Args:
        trainer: Of the run.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GeneticPromptSearch) and callback.records:
            print_records(callback.records)


def print_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Print results of searches: manual prompt, evolved prompt, scores, kept or fell back.

    Args:
        records: One a task.
    """
    _console().print(prompts_table(records))


def _console() -> Console:
    # Beside a terminal (a log file, a pipe) rich would take 80 columns and cut the tables.
    return Console(width=None if sys.stdout.isatty() else 110)
