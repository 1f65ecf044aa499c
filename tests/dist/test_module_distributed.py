# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks against one process: DDP and FSDP2, training, evaluation and the checkpoint.

Float64, so that only the order of sums differs; the softmax of the loss is float32. Tolerances are stated at each
comparison. Ranks stand in for GPUs.
"""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models import scoring
from lightning_zeroprompt.models.module import Text2TextModule

STEPS = 12


def make_task(name, category, free, role, salt):
    def examples():
        for number in range(24):
            answer = "ab"[(number + salt) % 2] * (1 + number % 3 if free else 1)
            options = None if free else ("a", "b")
            yield Example(input=f"{number} " + "xy"[number % 2] * (number % 7), outputs=(answer,), options=options)

    text = "{input} " + name if free else "{input} " + name + " {options}"
    templates = (PromptTemplate(name="t", text=text),)
    return Task(
        task_id=name,
        category=category,
        family=name,
        templates=templates,
        examples=examples,
        role=role,
        metric="rouge_l" if free else "exact_match",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tasks = [
        make_task("one", "a", False, "train", 0),
        make_task("two", "b", True, "train", 1),
        make_task("three", "c", False, "heldout", 0),
        make_task("four", "d", True, "heldout", 1),
        make_task("five", "b", True, "heldout", 0),
    ]
    path = tmp_path_factory.mktemp("dist") / "corpus"
    compile_tasks(tasks, path, tokenizer=ByteTokenizer(), progress=False)
    return path


def evaluation(corpus, task_indices, *, num_replicas, rank):
    """Small batches, an odd number of free answers: one rank's share is filled up with a repeat."""
    plan = plan_evaluation(corpus, task_indices, EvaluationSettings(examples_per_task=7))
    sizes = {"encoder_length": 64, "decoder_length": 16, "max_tokens": 80}
    dataset = EvaluationDataset(corpus, plan, **sizes)
    assert {kind: len(batches) for kind, batches in dataset._batches.items()} == {"choice": 2, "generation": 3}
    return [dataset.for_rank(rank, num_replicas)]


class Recorder(Callback):
    """The loss of every batch on this rank."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(outputs["loss"].item())


def whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def run(folder, strategy, ranks, soft_prompt, checkpoint=None):
    """Train and evaluate; what this rank saw, as plain data."""
    texts = {}
    score = scoring.score_generation

    def recording(model, batch, tokenizer):
        scores = score(model, batch, tokenizer)
        for cell, row, text in zip(batch["cell"].tolist(), batch["row"].tolist(), scores.texts, strict=True):
            if cell >= 0:
                texts[cell, row] = text
        return scores

    scoring.score_generation = recording
    # Lightning's own precision="64-true" is not for sharded models.
    torch.set_default_dtype(torch.float64)
    corpus = Corpus.open(folder)
    length = 2 if soft_prompt else 0
    module = Text2TextModule(
        vocab_size=corpus.tokenizer.vocab_size,
        size="nano",
        optimizer={"learning_rate": 2e-2, "weight_decay": 0.01},
        soft_prompt={"mode": "shared" if soft_prompt else "none", "length": length, "dropout": 0.0},
    )
    data = TaskDataModule(
        corpus,
        steps=STEPS,
        encoder_length=64,
        decoder_length=16,
        rows_per_batch=4,
        soft_prompt_length=length,
        evaluation=None if soft_prompt else evaluation,
    )
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
    )
    try:
        trainer.fit(module, data)
        fitted = module.summaries[0].scalars() if module.summaries else {}
        if module.summaries:
            trainer.validate(module, data, verbose=False)
            assert module.summaries[0].scalars() == pytest.approx(fitted)
        assert isinstance(module.model, FSDPModule) == isinstance(strategy, ModelParallelStrategy)
        if checkpoint is not None:
            trainer.save_checkpoint(checkpoint)
        parameters = {name: whole(parameter) for name, parameter in module.model.named_parameters()}
    finally:
        torch.set_default_dtype(torch.float32)
        scoring.score_generation = score
    return {
        "losses": recorder.losses,
        "parameters": {name: value.double().tolist() for name, value in parameters.items()},
        "scores": fitted,
        "texts": texts,
    }


def runs(folder, strategy, ranks, checkpoint=None):
    """A run with evaluations, and one with a soft prompt."""
    return run(folder, strategy, ranks, False, checkpoint), run(folder, strategy, ranks, True)


@pytest.fixture(scope="module")
def alone(folder):
    return runs(folder, "auto", 1)


def test_the_evaluation_is_one_that_ranks_could_get_wrong(folder, alone):
    plain, prompted = alone
    assert len(plain["losses"]) == len(prompted["losses"]) == STEPS
    assert plain["losses"][-1] < plain["losses"][0]
    assert len(set(plain["texts"].values())) > 1
    assert any("/choice" in name for name in plain["scores"])
    assert any("/generation" in name for name in plain["scores"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_do_what_one_does(folder, alone, strategy, tmp_path, run_ranks):
    """Losses and scores relative 1e-5, parameters 1e-6 absolute, answers exact but for their limit."""
    path = tmp_path / "run.ckpt"
    ranks = run_ranks(runs, 2, folder, strategy, 2, path, timeout=200)
    for number, expected in enumerate(alone):
        found = [results[number] for results in ranks]
        # A rank's loss is its share of the global token mean, times the ranks.
        losses = [sum(pair) / 2 for pair in zip(*(result["losses"] for result in found), strict=True)]
        assert losses == pytest.approx(expected["losses"], rel=1e-5)
        assert found[0]["losses"] != pytest.approx(found[1]["losses"], rel=1e-3)
        for result in found:
            assert result["parameters"].keys() == expected["parameters"].keys()
            for name, values in expected["parameters"].items():
                torch.testing.assert_close(
                    torch.tensor(result["parameters"][name]), torch.tensor(values), atol=1e-6, rtol=0, msg=name
                )
            assert result["scores"] == pytest.approx(expected["scores"], rel=1e-5, abs=1e-9)
        # Each rank generated a part of the answers, both together all of them.
        together = found[0]["texts"] | found[1]["texts"]
        assert together == expected["texts"]
        if together:
            assert all(0 < len(result["texts"]) < len(together) for result in found)
    loaded = Text2TextModule.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    for name, parameter in loaded.model.named_parameters():
        expected_values = torch.tensor(alone[0]["parameters"][name])
        torch.testing.assert_close(parameter.detach(), expected_values, atol=1e-6, rtol=0, msg=name)
