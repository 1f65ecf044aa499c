# SPDX-License-Identifier: Apache-2.0
"""zeroprompt-train: pretrain on many prompted tasks, then report zero-shot scores on tasks never seen.

    zeroprompt-train experiment=demo
    zeroprompt-train data=parquet data.path=FOLDER model=small trainer=gpu
    zeroprompt-train -m data.num_tasks=10,100,1000 model=tiny,mini

The run folder holds ``config.yaml``, ``results.json``, ``results.csv``, ``results.png``, TensorBoard events and
checkpoints. Every job of a ``-m``, and every run on several ranks, is a fresh process that starts from its resolved
configuration, so that all ranks get the same one.
"""

import json
import os
import sys
from pathlib import Path

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_zeroprompt.cli.build import (
    build_datamodule,
    build_module,
    build_trainer,
    check_keys,
    check_run,
    data_summary,
    evaluation_factory,
    open_corpus,
    quieten,
)
from lightning_zeroprompt.cli.checkpoints import check_resumed, resumed_checkpoint
from lightning_zeroprompt.cli.config import (
    RESOLVED,
    config_dir,
    fresh_process,
    read_config,
    report_user_errors,
    run_in_fresh_process,
    write_atomically,
)
from lightning_zeroprompt.cli.results import TensorBoardReport, print_prompts, print_results, save_results

__all__ = ["main", "train"]

_METRIC = "heldout_normalised"


def train(config: DictConfig) -> None:
    """Run one job and leave its results in the run folder.

    Args:
        config: A composed configuration of ``conf/train.yaml``; interpolations need not be resolved.
    """
    quieten()
    check_keys(config)
    folder = Path(config.paths.output_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    corpus = open_corpus(config)
    trainer = build_trainer(config)
    check_run(config, trainer)
    resumed = resumed_checkpoint(config)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    steps = config.trainer.max_steps * config.trainer.accumulate_grad_batches
    datamodule = build_datamodule(config, corpus, steps=steps, on_gpu=on_gpu)
    module = build_module(config, corpus, len(datamodule.task_indices))
    if resumed is not None:
        check_resumed(resumed, module)
    if trainer.is_global_zero:
        write_atomically(folder / RESOLVED, OmegaConf.to_yaml(config, resolve=True))
        print(data_summary(config, datamodule))
        ranks = "1 rank" if trainer.world_size == 1 else f"{trainer.world_size} ranks"
        print(f"Strategy {type(trainer.strategy).__name__} on {ranks}")
    report = TensorBoardReport(trainer, config, datamodule, module)
    trainer.validate(module, datamodule, verbose=False, weights_only=True)
    untrained = module.summaries[0]
    datamodule.evaluation = evaluation_factory(config, on_gpu=on_gpu, during_fit=True)
    if resumed is not None:
        # A run that has ended has ended its only epoch; the steps that are to come need another.
        trainer.fit_loop.max_epochs = -1
    trainer.fit(module, datamodule, ckpt_path=resumed, weights_only=True)
    trainer.save_checkpoint(folder / "checkpoints" / "final.ckpt", weights_only=False)
    datamodule.evaluation = evaluation_factory(config, on_gpu=on_gpu, shuffled=config.eval.shuffled)
    trainer.validate(module, datamodule, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        results = save_results(folder, config, datamodule, module, trainer, untrained=untrained)
        report.finish(results)
        print_results(folder, results, module, untrained=untrained)
        print_prompts(trainer)
    trainer.strategy.barrier("results")


def run_ranks(config: DictConfig) -> int:
    """Run a job on several ranks, which Lightning starts from the fresh process's command line.

    Returns:
        Its exit status.
    """
    return fresh_process("lightning_zeroprompt.cli.train", config, Path(config.paths.output_dir))


def job(arguments: list[str]) -> None:
    """Run one job from its resolved configuration: ``python -m lightning_zeroprompt.cli.train CONFIG``."""
    (path,) = arguments
    report_user_errors(lambda: train(read_config(Path(path))))


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")
def main(config: DictConfig) -> float | None:
    """Console script; returns the held-out score for Hydra's sweepers."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        if config.trainer.devices == 1 or "LOCAL_RANK" in os.environ:
            report_user_errors(lambda: train(config))
        elif status := run_ranks(config):
            raise SystemExit(status)
        return None
    folder = Path(config.paths.output_dir)
    run_in_fresh_process("lightning_zeroprompt.cli.train", config, folder)
    score: float | None = json.loads((folder / "results.json").read_text(encoding="utf-8"))[_METRIC]
    return score


if __name__ == "__main__":
    job(sys.argv[1:])
