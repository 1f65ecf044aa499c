# SPDX-License-Identifier: Apache-2.0
"""The model on CUDA against the same on the CPU in float32, which the other tests hold to independent references.

bfloat16 keeps 8 bits of a number, so its logits differ by about 1 % in norm; float32 differs by the order of sums.
"""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.prepare import compile_source
from lightning_zeroprompt.models import T5, OptimizerSettings, T5Config, Text2TextModule
from lightning_zeroprompt.models.optim import build_optimizer
from lightning_zeroprompt.models.scoring import score_batch, score_choice, score_generation

DEVICE, ACCELERATOR = "cuda", "gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device; run `pytest -m gpu tests/gpu` on a machine that has one"
    ),
]
ENCODER, DECODER = 160, 48


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "corpus"
    few = {"tokenizer": "byte", "num_tasks": 8, "options": {"examples_per_task": 12}}
    return compile_source("builtin", None, folder, **few, heldout_fraction=0.2, progress=False)


def evaluation(corpus, task_indices, *, num_replicas, rank):
    settings = EvaluationSettings(examples_per_task=1, templates_per_task=1, levels=("task", "instance"))
    plan = plan_evaluation(corpus, task_indices, settings)
    lengths = {"encoder_length": ENCODER, "decoder_length": DECODER}
    return [EvaluationDataset(corpus, plan, max_tokens=2048, rank=rank, num_ranks=num_replicas, **lengths)]


def make_data(corpus):
    lengths = {"encoder_length": ENCODER, "decoder_length": DECODER}
    return TaskDataModule(corpus, steps=3, rows_per_batch=8, evaluation=evaluation, **lengths)


def make_model(corpus):
    model = T5(T5Config.preset("nano", corpus.vocab_size), seed=1).eval()
    with torch.no_grad():  # the first logits are nearly equal; this puts them apart
        model.shared.weight.mul_(4)
    return model


def to_device(batch):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def logits(model, batch, packed):
    segments = {name: batch[name] for name in ("input_segments", "decoder_segments")} if packed else {}
    with torch.no_grad():
        out = model(batch["input_ids"], batch["decoder_input_ids"], **segments)
    # What stands at padding is nobody's.
    return out[batch["labels"] != -100].float().cpu()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_logits(corpus, packed, dtype, tolerance):
    """Relative difference in norm below ``tolerance``."""
    model = make_model(corpus)
    batch = {name: torch.from_numpy(array) for name, array in make_data(corpus).stream.batch(0).items()}
    assert (batch["examples"] > 1).any()
    expected = logits(model, batch, packed)
    found = logits(copy.deepcopy(model).to(DEVICE, dtype), to_device(batch), packed)
    assert (found - expected).norm() < tolerance * expected.norm()


def test_scores_and_generated_texts(corpus):
    """Float32: equal texts and choices, log-likelihoods within 1e-3 nats."""
    model = make_model(corpus)
    other = copy.deepcopy(model).to(DEVICE)
    (dataset,) = evaluation(corpus, make_data(corpus).task_indices, num_replicas=1, rank=0)
    batches = [dataset[step] for step in range(len(dataset))]
    assert {batch["kind"] for batch in batches} == {"choice", "generation"}
    for batch in batches:
        if batch["kind"] == "choice":
            expected, found = score_choice(model, batch), score_choice(other, to_device(batch))
            for rule in expected.options:
                torch.testing.assert_close(found.options[rule].cpu(), expected.options[rule], atol=1e-3, rtol=1e-4)
                assert torch.equal(found.predicted[rule].cpu(), expected.predicted[rule])
        else:
            expected = score_generation(model, batch, corpus.tokenizer)
            assert score_generation(other, to_device(batch), corpus.tokenizer).texts == expected.texts
        ours, theirs = (score_batch(m, b, corpus.tokenizer) for m, b in ((model, batch), (other, to_device(batch))))
        torch.testing.assert_close(theirs.cpu(), ours, atol=1e-3, rtol=1e-4, equal_nan=True)


class Losses(Callback):
    """Keeps the loss of every step, and where the model was."""

    def __init__(self):
        self.losses, self.devices = [], set()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(outputs["loss"].item())
        self.devices |= {parameter.device.type for parameter in module.parameters()}


def fit(corpus, folder, **settings):
    seed_everything(0, verbose=False)
    losses = Losses()
    module = Text2TextModule(vocab_size=corpus.vocab_size, size="nano", optimizer={"warmup_steps": 0})
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=3, devices=1, callbacks=[losses], default_root_dir=folder, **quiet, **settings)
    trainer.fit(module, make_data(corpus))
    return trainer, module, losses


def test_training_in_bfloat16(corpus, tmp_path):
    """Losses of three steps within 1 % of those in float32 on the CPU; every score exists afterwards."""
    _, _, expected = fit(corpus, tmp_path, accelerator="cpu", precision="32-true")
    trainer, module, found = fit(
        corpus, tmp_path, accelerator=ACCELERATOR, precision="bf16-true", gradient_clip_val=1.0
    )
    assert found.losses == pytest.approx(expected.losses, rel=0.01)
    assert found.losses[2] < found.losses[0]
    assert found.devices == {DEVICE}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert trainer.optimizers[0].defaults["fused"]
    (summary,) = module.summaries
    assert all(0 <= macro.score <= 1 for macro in summary.macro)


def test_fused_adamw_equals_the_plain_loop():
    """Three updates by given gradients, within 1e-6."""
    results = []
    for device, fused in (("cpu", False), (DEVICE, True)):
        torch.manual_seed(0)
        layer = nn.Linear(7, 5)
        gradients = [[torch.randn_like(parameter) for parameter in layer.parameters()] for _ in range(3)]
        layer.to(device)
        settings = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
        optimizer = build_optimizer(layer.named_parameters(), settings, fused=fused)
        assert optimizer.defaults["fused"] == fused
        for step in gradients:
            for parameter, gradient in zip(layer.parameters(), step, strict=True):
                parameter.grad = gradient.to(device)
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in layer.parameters()])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
