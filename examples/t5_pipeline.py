# SPDX-License-Identifier: Apache-2.0
"""This package's T5 on a pipeline: encoder and decoder are cut into stages, and both stream through them.

Trains a T5 of 0.2M parameters on the simplest of the built-in tasks ("what is the first word?") and scores it on tasks
that it never saw, which ask the same of other words. Two ranks hold half of the blocks each: GPUs where there are two,
else processes on the CPU. The same run without a pipeline is ``--strategy auto``. In a minute, on a laptop:

    python examples/t5_pipeline.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_zeroprompt.data import TaskDataModule, compile_tasks
from lightning_zeroprompt.data.compile import BpeSpec
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.sources.builtin import builtin_tasks, curriculum_stage
from lightning_zeroprompt.models import OptimizerSettings, Text2TextModule
from lightning_zeroprompt.strategies import ZeroPPStrategy

LENGTHS = {"encoder_length": 64, "decoder_length": 16}


class Losses(Callback):
    """Keeps the loss of every step; under a pipeline every rank has it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(outputs["loss"].item())


def evaluation(corpus: Corpus, task_indices: Sequence[int], *, num_replicas: int, rank: int) -> list[EvaluationDataset]:
    """Validation data: tasks that the source holds out, in wordings that training draws."""
    settings = EvaluationSettings(examples_per_task=8, templates_per_task=1, levels=("task",), heldout_wordings=False)
    plan = plan_evaluation(corpus, task_indices, settings)
    return [EvaluationDataset(corpus, plan, **LENGTHS, rank=rank, num_ranks=num_replicas)]


def main(strategy: str, steps: int, folder: Path) -> None:
    seed_everything(0, verbose=False)
    tasks = [task for task in builtin_tasks(examples_per_task=100) if curriculum_stage(task.task_id) == 0]
    # Every rank runs this program. Of two with one folder the first compiles, the other waits and opens it.
    source = {"name": "builtin", "stage": 0, "examples_per_task": 100}
    corpus = compile_tasks(tasks, folder, tokenizer=BpeSpec(1280), source=source, existing="reuse", progress=False)
    data = TaskDataModule(corpus, steps=steps, rows_per_batch=16, evaluation=evaluation, **LENGTHS)
    model = Text2TextModule(
        vocab_size=corpus.vocab_size,
        size="nano",
        overrides={"dropout": 0.0, "absolute_positions": True, "scale_decoder_outputs": False},
        optimizer=OptimizerSettings(learning_rate=3e-3),
    )
    devices = 2 if strategy == "zeropp" else 1
    trainer = Trainer(
        # So small a model gains nothing from more parts; leave the numbers out for a large one.
        strategy=ZeroPPStrategy(stages_per_rank=1, num_microbatches=2) if strategy == "zeropp" else strategy,
        devices=devices,
        accelerator="gpu" if torch.cuda.device_count() >= devices else "cpu",
        max_steps=steps,
        callbacks=[losses := Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    if trainer.is_global_zero:
        # `fit` ends with a validation.
        score = model.summaries[0].find("task")
        print(f"loss of the first step {losses.losses[0]:.3f}, of the last {losses.losses[-1]:.3f}")
        print(f"{score.tasks} tasks never seen: score {score.score:.2f} ({score.low:.2f} to {score.high:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("zeropp", "auto"), default="zeropp")
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: 500)")
    parser.add_argument("--folder", type=Path, help="where to keep the compiled tasks (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.strategy, arguments.steps, arguments.folder or Path(temporary) / "corpus")
