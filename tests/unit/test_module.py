# SPDX-License-Identifier: Apache-2.0
"""Text2TextModule under a real Trainer: loss, gradients, scores, checkpoints. Tolerances are stated where not exact."""

import copy
import functools
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer

from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.metrics.summary import summarise
from lightning_zeroprompt.metrics.task_scores import CellScores
from lightning_zeroprompt.models.hf import load_t5, save_t5
from lightning_zeroprompt.models.module import SoftPromptSettings, Text2TextModule, token_loss
from lightning_zeroprompt.models.optim import OptimizerSettings
from lightning_zeroprompt.models.scoring import SCORES, score_batch
from lightning_zeroprompt.models.t5 import T5, T5Config

ENCODER, DECODER = 128, 32


def evaluation(corpus, task_indices, *, num_replicas, rank):
    """The evaluation as it is, and with the instructions of other tasks."""
    datasets = []
    for shuffled in (False, True):
        settings = EvaluationSettings(examples_per_task=3, shuffle_instructions=shuffled)
        plan = plan_evaluation(corpus, task_indices, settings)
        datasets.append(
            EvaluationDataset(
                corpus,
                plan,
                encoder_length=ENCODER,
                decoder_length=DECODER,
                max_tokens=1024,
                rank=rank,
                num_ranks=num_replicas,
            )
        )
    return datasets


def make_data(corpus, steps=3, **settings):
    shape = {"encoder_length": ENCODER, "decoder_length": DECODER, "rows_per_batch": 4, "window_steps": 5}
    return TaskDataModule(corpus, steps=steps, **(shape | settings))


def make_module(corpus, **settings):
    return Text2TextModule(vocab_size=corpus.tokenizer.vocab_size, size="nano", **settings)


def make_trainer(**settings):
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(options | settings))


class Losses(Callback):
    """Keeps the loss of every batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(outputs["loss"].item())


class Steps(Losses):
    """Keeps, for every batch, the weights before it, its gradient and its loss."""

    def __init__(self):
        super().__init__()
        self.models, self.gradients, self.batches = [], [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.models.append(copy.deepcopy(module.model))
        self.batches.append(batch)

    def on_after_backward(self, trainer, module):
        self.gradients.append({name: p.grad.clone() for name, p in module.model.named_parameters()})


def examples_of(batch):
    """Every example of a packed batch as (input ids, decoder input ids, labels, task ids)."""
    for row in range(len(batch["input_ids"])):
        for number in range(1, int(batch["examples"][row]) + 1):
            left, right = batch["input_segments"][row] == number, batch["decoder_segments"][row] == number
            tasks = batch["task_ids"][row][left][None] if "task_ids" in batch else None
            yield (
                batch["input_ids"][row][left][None],
                batch["decoder_input_ids"][row][right][None],
                batch["labels"][row][right],
                tasks,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_loss_is_the_sum_of_the_targets_log_likelihoods(dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (3, 5))
    labels[0, 3:] = labels[2] = -100
    loss = token_loss(logits, labels)
    loss.backward()
    plain = logits.detach().double()
    expected, gradient = 0.0, torch.zeros(3, 5, 11, dtype=torch.float64)
    for row, column in (labels != -100).nonzero().tolist():
        probabilities = plain[row, column].exp() / plain[row, column].exp().sum()
        expected -= probabilities[labels[row, column]].log().item()
        gradient[row, column] = probabilities
        gradient[row, column, labels[row, column]] -= 1
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), gradient, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-2)
    assert token_loss(logits, torch.full((3, 5), -100)).item() == 0


@pytest.mark.parametrize("prompt", ["none", "per_task"])
def test_training_minimises_the_token_mean_of_the_examples_in_the_rows(evaluation_corpus, prompt):
    """Loss and gradient of every step against each example by itself (relative 1e-4)."""
    soft = {"mode": prompt, "length": 0 if prompt == "none" else 3, "dropout": 0.0}
    module = make_module(evaluation_corpus, soft_prompt=soft, num_tasks=4)
    steps = Steps()
    make_trainer(callbacks=[steps]).fit(module, make_data(evaluation_corpus, soft_prompt_length=soft["length"]))
    assert len(steps.losses) == 3
    assert sum(int(batch["examples"].sum()) for batch in steps.batches) > 24
    for batch, model, loss, gradient in zip(steps.batches, steps.models, steps.losses, steps.gradients, strict=True):
        total, tokens = torch.zeros(()), 0
        for inputs, decoder_inputs, labels, tasks in examples_of(batch):
            logprobs = F.log_softmax(model(inputs, decoder_inputs, task_ids=tasks)[0], dim=-1)
            total = total - logprobs[torch.arange(len(labels)), labels].sum()
            tokens += len(labels)
        assert tokens == int((batch["labels"] != -100).sum())
        mean = total / tokens
        model.zero_grad()
        mean.backward()
        assert loss == pytest.approx(mean.item(), rel=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    before, after = steps.models[0].state_dict(), module.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def by_hand(model, dataset):
    """Scores of an evaluation, summed up cell by cell in plain loops."""
    cells = len(dataset.plan.cells)
    found = [[[] for _ in SCORES] for _ in range(cells)]
    for step in range(len(dataset)):
        batch = dataset[step]
        for cell, scores in zip(
            batch["cell"].tolist(), score_batch(model, batch, dataset.corpus.tokenizer), strict=True
        ):
            for column, value in enumerate(scores.tolist()):
                if cell >= 0 and value == value:
                    found[cell][column].append(value)
    table = CellScores(
        names=SCORES,
        counts=np.array([[len(values) for values in row] for row in found]),
        sums=np.array([[float(np.sum(values)) for values in row] for row in found]),
        squares=np.array([[float(np.sum(np.square(values))) for values in row] for row in found]),
    )
    return summarise(dataset.plan, table)


def assert_same_summary(one, other, rel=1e-6):
    assert one.scalars() == pytest.approx(other.scalars(), rel=rel, abs=1e-9)
    assert len(one.tasks) == len(other.tasks) > 0
    for mine, theirs in zip(one.tasks, other.tasks, strict=True):
        assert (mine.task_id, mine.level, mine.wording) == (theirs.task_id, theirs.level, theirs.wording)
        assert mine.others == pytest.approx(theirs.others, rel=rel, abs=1e-9)


def test_validation_sums_up_every_batch_of_every_dataset(evaluation_corpus):
    module, data = make_module(evaluation_corpus), make_data(evaluation_corpus, steps=2, evaluation=evaluation)
    trainer = make_trainer(num_sanity_val_steps=1)
    trainer.fit(module, data)
    datasets = evaluation(evaluation_corpus, data.task_indices, num_replicas=1, rank=0)
    model = module.model.eval()
    expected = [by_hand(model, dataset) for dataset in datasets]
    assert len(module.summaries) == 2
    assert expected[0].scalars() != expected[1].scalars()
    for found, right in zip(module.summaries, expected, strict=True):
        assert_same_summary(found, right)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("heldout/")}
    assert logged == pytest.approx(
        {f"heldout/{name}": value for name, value in expected[0].scalars().items()}, rel=1e-5, abs=1e-7
    )
    kinds = {task.kind for task in expected[0].tasks}
    assert kinds == {"choice", "generation"}
    module.summaries = []
    trainer.validate(module, data, verbose=False)
    assert_same_summary(module.summaries[1], expected[1])


def test_an_evaluation_that_is_only_a_sanity_check_leaves_no_scores(evaluation_corpus):
    module, data = make_module(evaluation_corpus), make_data(evaluation_corpus, steps=1, evaluation=evaluation)
    make_trainer(num_sanity_val_steps=1, limit_val_batches=1, check_val_every_n_epoch=5).fit(module, data)
    assert module.summaries == []


def plain(value):
    if isinstance(value, dict):
        return all(type(key) is str and plain(entry) for key, entry in value.items())
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("prompt", ["none", "shared"])
def test_a_checkpoint_holds_plain_data_and_gives_the_same_logits(evaluation_corpus, tmp_path, prompt):
    module = make_module(
        evaluation_corpus,
        overrides={"num_decoder_layers": 1},
        optimizer=OptimizerSettings(learning_rate=3e-3),
        soft_prompt=SoftPromptSettings(mode=prompt, length=2 if prompt == "shared" else 0),
        init_seed=3,
        tokenizer="abc",
    )
    trainer = make_trainer()
    data = make_data(evaluation_corpus, steps=2, soft_prompt_length=module.soft_prompt_settings.length)
    trainer.fit(module, data)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert plain(dict(content["hyper_parameters"]))
    assert json.loads(json.dumps(content["hyper_parameters"]))["optimizer"]["learning_rate"] == 3e-3
    again = Text2TextModule.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    assert again.config == module.config
    assert again.optimizer_settings == module.optimizer_settings
    assert again.hparams["tokenizer"] == "abc"
    batch = next(iter(data.train_dataloader()))
    module.eval()
    again.eval()
    with torch.no_grad():
        assert torch.equal(module(batch), again(batch))


def test_training_starts_from_given_weights_and_its_checkpoint_needs_them_no_more(evaluation_corpus, tmp_path):
    size = evaluation_corpus.tokenizer.vocab_size + 5
    torch.manual_seed(1)
    start = T5(T5Config.preset("nano", size, num_encoder_layers=1, tie_head=False), seed=7)
    save_t5(start, tmp_path / "start")
    loaded = load_t5(tmp_path / "start")
    module = Text2TextModule(
        vocab_size=evaluation_corpus.tokenizer.vocab_size,
        config=loaded.config,
        weights=loaded.state_dict(),
        optimizer={"learning_rate": 1e-12},
    )
    shutil.rmtree(tmp_path / "start")
    data, steps, trainer = make_data(evaluation_corpus, steps=1), Steps(), make_trainer()
    trainer.callbacks.append(steps)
    trainer.fit(module, data)
    (batch,) = steps.batches
    with torch.no_grad():
        names = ("input_ids", "decoder_input_ids", "input_segments", "decoder_segments")
        inputs, decoder_inputs, segments, decoder_segments = (batch[name] for name in names)
        expected = start(inputs, decoder_inputs, input_segments=segments, decoder_segments=decoder_segments)
        torch.testing.assert_close(
            steps.models[0](inputs, decoder_inputs, input_segments=segments, decoder_segments=decoder_segments),
            expected,
            atol=0,
            rtol=0,
        )
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        again = Text2TextModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        torch.testing.assert_close(again(batch), expected, atol=1e-4, rtol=1e-4)
    assert again.config == loaded.config


def test_given_weights_that_do_not_fit_are_refused_but_prompts_may_be_new(evaluation_corpus):
    size = evaluation_corpus.tokenizer.vocab_size
    config = T5Config.preset("nano", size)
    weights = T5(config, seed=2).state_dict()
    prompted = Text2TextModule(
        vocab_size=size, config=config, weights=weights, soft_prompt={"mode": "shared", "length": 2}
    )
    prompted.configure_model()
    assert torch.equal(prompted.model.shared.weight, weights["shared.weight"])
    assert prompted.model.soft_prompt is not None
    less = {name: tensor for name, tensor in weights.items() if name != "shared.weight"}
    for soft in (None, {"mode": "shared", "length": 2}):
        with pytest.raises(RuntimeError, match=r"shared\.weight"):
            Text2TextModule(vocab_size=size, config=config, weights=less, soft_prompt=soft).configure_model()


def test_a_model_with_fewer_embeddings_than_the_tokenizer_has_ids_is_refused():
    config = T5Config.preset("nano", 100)
    with pytest.raises(ValueError, match=r"100 embeddings, the corpus's tokenizer 1,101 ids"):
        Text2TextModule(vocab_size=1101, config=config)
    assert Text2TextModule(vocab_size=90, config=config).config.vocab_size == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "none", "length": 2}, "mode 'none' with length 2"),
        ({"mode": "shared", "length": 0}, "mode 'shared' with length 0"),
        ({"mode": "shared", "length": 2, "unseen": "mean"}, "unseen='mean'.*mode 'shared'"),
        ({"unseen": "retrieval"}, "unseen='retrieval'.*mode 'none'"),
    ],
)
def test_soft_prompt_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftPromptSettings(**settings)
    with pytest.raises(ValueError, match=message):
        Text2TextModule(vocab_size=10, size="nano", soft_prompt=settings)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_step_and_an_evaluation_in_bf16(evaluation_corpus, precision):
    """Finite, and near the loss in float32 (within 2 %)."""
    losses = []
    for one in (precision, "32-true"):
        module, steps = make_module(evaluation_corpus), Losses()
        trainer = make_trainer(precision=one, callbacks=[steps], gradient_clip_val=1.0)
        trainer.fit(module, make_data(evaluation_corpus, steps=2))
        losses.append(steps.losses)
        assert all(bool(p.isfinite().all()) for p in module.parameters())
        assert module.model.shared.weight.dtype == (torch.bfloat16 if one == "bf16-true" else torch.float32)
        trainer.validate(module, make_data(evaluation_corpus, evaluation=evaluation), verbose=False)
        assert all(np.isfinite(task.others["nll"]) for task in module.summaries[0].tasks)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_learning_rate_moves_once_an_optimizer_step(evaluation_corpus):
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = make_module(evaluation_corpus, optimizer={"learning_rate": 0.1, "warmup_steps": 2, "schedule": "linear"})
    make_trainer(callbacks=[Rates()], accumulate_grad_batches=2).fit(module, make_data(evaluation_corpus, steps=8))
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("limit", [{"fast_dev_run": True}, {"limit_val_batches": 1}])
def test_a_trial_run_leaves_no_scores(evaluation_corpus, limit):
    module, data = make_module(evaluation_corpus), make_data(evaluation_corpus, evaluation=evaluation)
    trainer = make_trainer(**limit)
    trainer.fit(module, data)
    assert trainer.global_step > 0
    assert module.summaries == []


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"vocab_size": 358}, {}, "built for 358 ids, .* compiled with 359; give vocab_size=359"),
        ({"soft_prompt": {"mode": "shared", "length": 2}}, {}, "length 2, the data leave room for 0"),
        ({}, {"soft_prompt_length": 2}, "length 0, the data leave room for 2"),
        (
            {"soft_prompt": {"mode": "per_task", "length": 2}, "num_tasks": 3},
            {"soft_prompt_length": 2},
            "soft prompts for 3 tasks, the data train 4; give num_tasks=4",
        ),
        (
            {"vocab_size": 400, "soft_prompt": {"mode": "shared", "length": 2}},
            {"soft_prompt_length": 2},
            "built for 400 ids",
        ),
    ],
)
def test_a_model_refuses_data_that_it_cannot_read(evaluation_corpus, model, data, message):
    module = Text2TextModule(**({"vocab_size": 359, "size": "nano"} | model))
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(module, make_data(evaluation_corpus, **data))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: install g++")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_compiled_layers_train_alike_and_are_evaluated_without_compiling(evaluation_corpus, monkeypatch, backend):
    """Losses of two steps within 1e-4 of those without compilation; one graph serves all layers of a stack."""
    monkeypatch.setattr(T5, "compile_blocks", functools.partialmethod(T5.compile_blocks, backend=backend))
    losses = []
    for compiled in (True, False):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        overrides = {"d_model": 16, "d_kv": 4, "d_ff": 16}
        module, steps = make_module(evaluation_corpus, overrides=overrides, compile=compiled), Losses()
        data = make_data(evaluation_corpus, steps=2, rows_per_batch=1)
        trainer = make_trainer(callbacks=[steps])
        trainer.fit(module, data)
        losses.append(steps.losses)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if compiled else 0)
        data.evaluation = evaluation
        trainer.validate(module, data, verbose=False)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if compiled else 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 2
