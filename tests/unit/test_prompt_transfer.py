# SPDX-License-Identifier: Apache-2.0
"""Prompts of unseen tasks: their numbers, what tasks are compared by, and an evaluation that uses them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.join import join_templates
from lightning_zeroprompt.models.module import Text2TextModule
from lightning_zeroprompt.models.prompt_transfer import (
    encode_tasks,
    mix_unseen_prompts,
    prompt_numbers,
    unseen_tasks,
)
from lightning_zeroprompt.models.scoring import SCORES, score_batch
from lightning_zeroprompt.models.soft_prompt import SoftPrompt
from lightning_zeroprompt.models.t5 import T5, T5Config

TRAIN = (2, 0, 3)  # in an order of its own: numbers follow the mixture, not the corpus
LENGTH = 3
UNSEEN = [4, 5, 6, 7, 8, 9]


def make_plan(corpus):
    return plan_evaluation(corpus, TRAIN, EvaluationSettings(examples_per_task=2))


def make_dataset(corpus, unseen, *, rank=0, num_replicas=1):
    plan = make_plan(corpus)
    return EvaluationDataset(
        corpus,
        plan,
        encoder_length=128,
        decoder_length=32,
        max_tokens=1024,
        soft_prompt_length=LENGTH,
        prompt_ids=prompt_numbers(plan, TRAIN, unseen),
        rank=rank,
        num_ranks=num_replicas,
    )


def make_model(corpus, num_tasks=3, seed=0):
    size = corpus.tokenizer.vocab_size
    prompt = SoftPrompt("per_task", length=LENGTH, num_tasks=num_tasks, d_model=64, first_id=size)
    return T5(T5Config.preset("nano", size), seed=seed, soft_prompt=prompt).eval()


@pytest.mark.parametrize("unseen", ["none", "mean", "retrieval"])
def test_prompts_are_numbered_in_the_mixtures_order_and_unseen_tasks_come_after(evaluation_corpus, unseen):
    plan = make_plan(evaluation_corpus)
    assert unseen_tasks(plan, TRAIN) == UNSEEN
    more = {"none": {}, "mean": dict.fromkeys(UNSEEN, 4), "retrieval": {task: task for task in UNSEEN}}[unseen]
    assert prompt_numbers(plan, TRAIN, unseen) == {2: 1, 0: 2, 3: 3, **more}


def encode_one_by_one(model, corpus, task, examples, limit):
    info = corpus.tasks[task]
    found = []
    for row in range(info.first_row, info.first_row + min(examples, info.num_train_rows or info.num_rows)):
        ids = join_templates(corpus, np.array([row]), np.array([info.first_template]), max_tokens=limit).tokens
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            found.append(model.encode(ids, None, torch.zeros_like(ids))[0].mean(0))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(("examples", "limit"), [(1, 512), (30, 512), (30, 24)])
def test_tasks_are_encoded_as_a_loop_over_examples_would(evaluation_corpus, examples, limit):
    """Within 1e-5; several batches of mixed lengths, tasks with fewer rows than asked for."""
    tasks = [3, 4, 9, 5, 1]
    for model in (make_model(evaluation_corpus), T5(T5Config.preset("nano", evaluation_corpus.tokenizer.vocab_size))):
        found = encode_tasks(model, evaluation_corpus, tasks, examples=examples, encoder_length=limit)
        expected = [encode_one_by_one(model, evaluation_corpus, task, examples, limit) for task in tasks]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_held_out_rows_of_training_tasks_are_not_encoded(evaluation_corpus):
    info = evaluation_corpus.tasks[0]
    assert 0 < info.num_train_rows < info.num_rows
    model = make_model(evaluation_corpus)
    everything = encode_tasks(model, evaluation_corpus, [0], examples=10_000)
    expected = encode_one_by_one(model, evaluation_corpus, 0, info.num_train_rows, 512)
    torch.testing.assert_close(everything[0], expected, atol=1e-5, rtol=1e-4)


def expected_prompts(model, corpus, unseen, top_k):
    """Prompts of the unseen tasks in plain loops."""
    own = [model.soft_prompt.weight[number].detach() for number in range(len(TRAIN))]
    if unseen == "mean":
        return sum(own)[None] / len(TRAIN)
    keys = [encode_one_by_one(model, corpus, task, 16, 512) for task in TRAIN]
    prompts = []
    for task in UNSEEN:
        query = encode_one_by_one(model, corpus, task, 16, 512)
        likeness = [F.cosine_similarity(query, key, dim=0).item() for key in keys]
        best = sorted(range(len(TRAIN)), key=lambda number: -likeness[number])[:top_k]
        weights = torch.tensor([likeness[number] / 0.1 for number in best]).exp()
        prompts.append(sum(w * own[number] for w, number in zip(weights / weights.sum(), best, strict=True)))
    return torch.stack(prompts)


@pytest.mark.parametrize(("unseen", "top_k"), [("mean", 8), ("retrieval", 8), ("retrieval", 2), ("retrieval", 1)])
def test_unseen_prompts_are_mixed_as_by_hand(evaluation_corpus, unseen, top_k):
    """Within 1e-4: encodings differ by rounding, and the softmax sharpens it tenfold."""
    model = make_model(evaluation_corpus)
    mix_unseen_prompts(model, make_dataset(evaluation_corpus, unseen), TRAIN, unseen, top_k=top_k)
    expected = expected_prompts(model, evaluation_corpus, unseen, top_k)
    torch.testing.assert_close(model.soft_prompt.unseen, expected, atol=1e-4, rtol=1e-3)
    if unseen == "retrieval":
        assert bool(model.soft_prompt.keys.abs().sum(1).gt(0).all())


def test_nothing_is_mixed_where_nothing_is_asked_for(evaluation_corpus):
    dataset = make_dataset(evaluation_corpus, "none")
    model = make_model(evaluation_corpus)
    mix_unseen_prompts(model, dataset, TRAIN, "none")
    assert len(model.soft_prompt.unseen) == 0
    mix_unseen_prompts(T5(model.config), dataset, TRAIN, "mean")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("unseen", ["none", "mean", "retrieval"])
def test_an_evaluation_gives_every_unseen_task_its_prompt(evaluation_corpus, unseen, precision):
    """After training, scores equal those of a model that has the mixed prompts as further trained ones (1e-5)."""
    corpus = evaluation_corpus

    def evaluation(corpus, task_indices, *, num_replicas, rank):
        assert tuple(task_indices) == TRAIN
        return [make_dataset(corpus, unseen, num_replicas=num_replicas, rank=rank)]

    module = Text2TextModule(
        vocab_size=corpus.tokenizer.vocab_size,
        size="nano",
        num_tasks=len(TRAIN),
        soft_prompt={"mode": "per_task", "length": LENGTH, "unseen": unseen, "dropout": 0.2},
        optimizer={"learning_rate": 1e-2},
    )
    data = TaskDataModule(
        corpus,
        tasks=TRAIN,
        steps=3,
        encoder_length=128,
        decoder_length=32,
        rows_per_batch=4,
        soft_prompt_length=LENGTH,
        evaluation=evaluation,
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
    )
    trainer.fit(module, data)
    assert len(module.summaries) == 1
    if precision == "bf16-true":
        assert all(np.isfinite(task.others["nll"]) for task in module.summaries[0].tasks)
        return

    trained = module.model.eval()
    mixed = {"none": torch.zeros(0, LENGTH, 64), "mean": trained.soft_prompt.unseen}.get(unseen)
    if mixed is None:
        mixed = expected_prompts(trained, corpus, unseen, 8)
        torch.testing.assert_close(trained.soft_prompt.unseen, mixed, atol=1e-4, rtol=1e-3)
        mixed = trained.soft_prompt.unseen
    model = make_model(corpus, len(TRAIN) + len(mixed), seed=1)
    state = trained.state_dict()
    state["soft_prompt.weight"] = torch.cat([state["soft_prompt.weight"], mixed])
    state["soft_prompt.keys"] = torch.zeros(len(TRAIN) + len(mixed), 64)
    model.load_state_dict(state)
    dataset, column = make_dataset(corpus, unseen), SCORES.index("nll")
    losses = {}
    for step in range(len(dataset)):
        batch = dataset[step]
        for cell, value in zip(
            batch["cell"].tolist(), score_batch(model, batch, corpus.tokenizer)[:, column].tolist(), strict=True
        ):
            losses.setdefault(cell, []).append(value)
    means = {cell: float(np.mean(values)) for cell, values in losses.items()}
    for task in module.summaries[0].tasks:
        cells = [
            means[cell.index]
            for cell in dataset.plan.cells
            if cell.wording == task.wording
            and dataset.plan.samples[cell.sample].task.task_id == task.task_id
            and dataset.plan.samples[cell.sample].level == task.level
        ]
        assert task.others["nll"] == pytest.approx(float(np.median(cells)), rel=1e-5)
