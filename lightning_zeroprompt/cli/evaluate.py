# SPDX-License-Identifier: Apache-2.0
"""zeroprompt-eval: zero-shot scores of a trained model.

    zeroprompt-eval checkpoint=runs/train/DATE/checkpoints/last.ckpt
    zeroprompt-eval checkpoint=... eval.examples_per_task=null eval.shuffled=true
    zeroprompt-eval checkpoint=... corpus=COMPILED_FOLDER
    zeroprompt-eval checkpoint=... prompts=runs/search/DATE/prompts.json

What was trained on, and on which corpus, is read from the ``config.yaml`` of the checkpoint's run folder;
``run=FOLDER`` names that folder where the checkpoint lies elsewhere.
"""

from pathlib import Path

import hydra
import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from lightning_zeroprompt.cli.build import (
    build_datamodule,
    build_trainer,
    check_keys,
    open_corpus,
    other_datamodule,
    quieten,
)
from lightning_zeroprompt.cli.checkpoints import load_module
from lightning_zeroprompt.cli.config import RESOLVED, config_dir, report_user_errors, run_config, write_atomically
from lightning_zeroprompt.cli.prompts import evaluate_prompts
from lightning_zeroprompt.cli.results import print_results, save_results
from lightning_zeroprompt.data.corpus import Corpus

__all__ = ["evaluate", "main"]


def evaluate(config: DictConfig) -> None:
    """Score a checkpoint and leave the results in the output folder.

    Args:
        config: A composed configuration of ``conf/eval.yaml``.
    """
    quieten()
    if config.prompts is not None:
        evaluate_prompts(config)
        return
    folder = Path(config.paths.output_dir)
    merged = run_config(config, ("eval", "trainer", "strategy"))
    check_keys(merged)
    pl.seed_everything(merged.seed, workers=True, verbose=False)
    own = open_corpus(merged)
    corpus = own if config.corpus is None else Corpus.open(config.corpus)
    module = load_module(merged, corpus)
    trainer = build_trainer(merged)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    datamodule = build_datamodule(merged, own, steps=1, on_gpu=on_gpu, shuffled=merged.eval.shuffled)
    if corpus.fingerprint != own.fingerprint:
        datamodule = other_datamodule(merged, datamodule, corpus, on_gpu=on_gpu)
    trainer.validate(module, datamodule, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        write_atomically(folder / RESOLVED, OmegaConf.to_yaml(merged, resolve=True))
        results = save_results(folder, merged, datamodule, module, trainer)
        print_results(folder, results, module)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="eval")
def main(config: DictConfig) -> None:
    """Console script."""
    report_user_errors(lambda: evaluate(config))


if __name__ == "__main__":
    main()
