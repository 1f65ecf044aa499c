# SPDX-License-Identifier: Apache-2.0
"""Tasks of one's own: define three, train a small T5 on two, and ask it about the third, which it never saw.

All three read the same things ("a small green bear"). Training asks what kind of thing it is and whether it lives; the
held-out task asks for the kind in words that training did not use. Runs in under a minute on a laptop:

    python examples/own_tasks.py
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_zeroprompt.data import TaskDataModule, compile_tasks
from lightning_zeroprompt.data.compile import BpeSpec
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.models import OptimizerSettings, Text2TextModule

KINDS = {
    "animal": ("bear", "fox", "owl", "frog", "horse", "crab"),
    "food": ("bread", "soup", "apple", "cheese", "rice", "cake"),
    "tool": ("hammer", "saw", "spoon", "drill", "needle", "rake"),
}
SIZES, COLOURS = ("small", "big", "heavy", "tiny"), ("green", "red", "white", "dark", "old")


def thing_task(
    name: str,
    instructions: Sequence[str],
    answers: Mapping[str, str],
    *,
    role: Literal["train", "heldout"] = "train",
) -> Task:
    """A task over things.

    Args:
        name: Id of the task, and its family: tasks that share data must be of one family.
        instructions: One template each.
        answers: What to answer for each kind of thing.
        role: Whether the task is trained on.
    """

    def examples() -> Iterator[Example]:
        for kind, size, colour in itertools.product(KINDS, SIZES, COLOURS):
            for thing in KINDS[kind]:
                yield Example(
                    input=f"a {size} {colour} {thing}",
                    outputs=(answers[kind],),
                    options=tuple(dict.fromkeys(answers.values())),
                )

    templates = tuple(
        PromptTemplate.from_instruction(text, name=f"t{number}") for number, text in enumerate(instructions)
    )
    return Task(task_id=name, category="things", family=name, templates=templates, examples=examples, role=role)


KIND = {kind: kind for kind in KINDS}
LIVES = {"animal": "yes", "food": "no", "tool": "no"}
TASKS = (
    thing_task("kind", ("What kind of thing is this?", "Name the kind:"), KIND),
    thing_task("lives", ("Is it alive?", "Does it live?"), LIVES),
    thing_task("sort", ("Which kind is this?", "Give the kind:"), KIND, role="heldout"),
)


def evaluation(corpus: Corpus, task_indices: Sequence[int], *, num_replicas: int, rank: int) -> list[EvaluationDataset]:
    """Validation data: the held-out task."""
    plan = plan_evaluation(corpus, task_indices, EvaluationSettings(examples_per_task=60, levels=("task",)))
    return [EvaluationDataset(corpus, plan, encoder_length=64, decoder_length=16, rank=rank, num_ranks=num_replicas)]


def main(steps: int, folder: Path) -> None:
    seed_everything(0, verbose=False)
    corpus = compile_tasks(TASKS, folder / "corpus", tokenizer=BpeSpec(500), progress=False)
    data = TaskDataModule(
        corpus, steps=steps, encoder_length=64, decoder_length=16, rows_per_batch=8, evaluation=evaluation
    )
    model = Text2TextModule(
        vocab_size=corpus.vocab_size,
        size="nano",
        overrides={"dropout": 0.0, "absolute_positions": True, "scale_decoder_outputs": False},
        optimizer=OptimizerSettings(learning_rate=3e-3),
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    for moment in ("before training", "after training"):
        if moment == "after training":
            trainer.fit(model, data)
        trainer.validate(model, data, verbose=False)
        (score,) = model.summaries[0].tasks
        print(f"{moment}: {score.task_id!r} {score.median:.2f} of {score.examples} right (chance {score.chance:.2f})")

    # A template's text and an example's input are encoded apart, as they were for training.
    instruction, thing = "Give the kind:", "a heavy old owl"
    pieces = corpus.tokenizer.encode_batch([f"{instruction}\n", thing])
    prompt = torch.tensor([[*pieces[0], *pieces[1], corpus.tokenizer.eos_id]])
    answer = model.model.eval().generate(prompt, max_new_tokens=8)[0].tolist()
    print(f"{instruction} {thing} -> {corpus.tokenizer.decode(answer)!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: 500)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.steps, Path(temporary))
