# SPDX-License-Identifier: Apache-2.0
"""The project's T5 on a pipeline of gloo ranks against one process: training in float64, evaluation of whole models.

An evaluation stands before the first step and behind each: it must leave weights and optimizer as they were.
"""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch.distributed.tensor import DTensor

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models import module as module_file
from lightning_zeroprompt.models.module import Text2TextModule
from lightning_zeroprompt.models.prompt_transfer import prompt_numbers
from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.testing import run_distributed

STEPS = 3
SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
MODELS = {
    "tied, prompts": (
        {**SIZES, "num_encoder_layers": 3, "num_decoder_layers": 2, "absolute_positions": True},
        {"mode": "per_task", "length": 2, "dropout": 0.0, "unseen": "retrieval"},
    ),
    "untied": ({**SIZES, "num_encoder_layers": 2, "num_decoder_layers": 2, "tie_head": False}, None),
}
CASES = {
    2: {
        ("tied, prompts", "V=2"): {"stages_per_rank": 2, "num_microbatches": 4, "unit": 2},
        ("tied, prompts", "D=2"): {"pipeline_parallel_size": 1, "data_parallel_size": 2, "stages_per_rank": 1},
        ("untied", "V=1"): {"stages_per_rank": 1, "num_microbatches": 3},
        ("untied", "checkpointed"): {"stages_per_rank": 1, "num_microbatches": 2, "activation_checkpointing": True},
    },
    4: {
        ("tied, prompts", "P=2, D=2"): {"data_parallel_size": 2, "num_microbatches": 3, "stages_per_rank": 1},
        ("untied", "P=2, D=2, V=2"): {"data_parallel_size": 2, "num_microbatches": 2},
    },
}


def make_task(name, category, free, role):
    def examples():
        for number in range(24):
            text = f"{number} " + "xy"[number % 2] * (number % 7)
            answer = "ab"[(number + len(name)) % 2] * (1 + number % 4 if free else 1)
            yield Example(input=text, outputs=(answer,), options=None if free else ("a", "b"))

    text = "{input} so" if free else "{input} so {options}"
    return Task(
        task_id=name,
        category=category,
        family=name,
        templates=(PromptTemplate(name="t", text=text),),
        examples=examples,
        role=role,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tasks = [
        make_task("free", "a", True, "train"),
        make_task("choice", "b", False, "train"),
        make_task("new free", "a", True, "heldout"),
        make_task("new choice", "c", False, "heldout"),
    ]
    path = tmp_path_factory.mktemp("pipeline") / "corpus"
    compile_tasks(tasks, path, tokenizer=ByteTokenizer(), progress=False)
    return path


class Evaluation:
    """Small batches, an odd number of each kind; notes which share of them it was asked for."""

    def __init__(self, prompt):
        self.prompt = prompt
        self.share = None

    def __call__(self, corpus, task_indices, *, num_replicas, rank):
        self.share = num_replicas, rank
        plan = plan_evaluation(corpus, task_indices, EvaluationSettings(examples_per_task=6))
        prompts = {}
        if self.prompt:
            numbers = prompt_numbers(plan, task_indices, self.prompt["unseen"])
            prompts = {"soft_prompt_length": self.prompt["length"], "prompt_ids": numbers}
        dataset = EvaluationDataset(corpus, plan, encoder_length=64, decoder_length=16, max_tokens=60, **prompts)
        assert min(len(batches) for batches in dataset._batches.values()) > 1
        return [dataset.for_rank(rank, num_replicas)]


class Recorder(Callback):
    """Loss, target tokens and gradients of every step on this rank."""

    def __init__(self):
        self.losses, self.tokens, self.gradients, self.scores = [], [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        found = {}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        self.gradients.append(found)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(outputs["loss"].item())
        self.tokens.append(int((batch["labels"] != -100).sum()))

    def on_validation_end(self, trainer, module):
        self.scores.append(module.summaries[0].scalars())


def exact_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def fit(folder, model, ranks, settings):
    overrides, prompt = MODELS[model]
    module_file.token_loss, kept = exact_loss, module_file.token_loss
    torch.set_default_dtype(torch.float64)
    try:
        corpus = Corpus.open(folder)
        module = Text2TextModule(
            vocab_size=corpus.tokenizer.vocab_size, overrides=overrides, soft_prompt=prompt, num_tasks=2
        )
        data = TaskDataModule(
            corpus,
            steps=STEPS,
            encoder_length=64,
            decoder_length=16,
            rows_per_batch=12,
            soft_prompt_length=prompt["length"] if prompt else 0,
            evaluation=Evaluation(prompt),
        )
        recorder = Recorder()
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=ranks,
            strategy=ZeroPPStrategy(**settings) if settings else "auto",
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=1,
        )
        trainer.validate(module, data, verbose=False)
        trainer.fit(module, data)
        assert module.device_mesh is None
    finally:
        module_file.token_loss = kept
        torch.set_default_dtype(torch.float32)
    names = sorted(module.model.state_dict())
    return {
        "losses": recorder.losses,
        "tokens": recorder.tokens,
        "gradients": recorder.gradients,
        "scores": recorder.scores,
        "names": names,
        "share": data.evaluation.share,
    }


def fit_cases(folder, ranks):
    return {case: fit(folder, case[0], ranks, settings) for case, settings in CASES[ranks].items()}


@pytest.fixture(scope="module")
def alone(folder):
    return {model: fit(folder, model, 1, None) for model in MODELS}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_pipelines_do_what_one_process_does(folder, alone, ranks, monkeypatch, request):
    """Losses 1e-12, gradients 1e-10 of each tensor's largest, scores (float32) 1e-5, all relative."""
    monkeypatch.syspath_prepend(request.config.rootpath)
    everyone = run_distributed(fit_cases, ranks, folder, ranks, timeout=300)
    for model, layout in everyone[0]:
        expected, found = alone[model], [rank[model, layout] for rank in everyone]
        if "D=2" in layout:
            # Means of means would be something else.
            assert found[0]["tokens"] != found[1]["tokens"]
            assert sum(found[0]["tokens"]) < sum(expected["tokens"])
        for step in range(STEPS):
            # Ranks of a pipeline report one loss; data-parallel ones their own, which their tokens weigh.
            weights = [result["tokens"][step] for result in found]
            total = sum(result["losses"][step] * weight for result, weight in zip(found, weights, strict=True))
            assert total / sum(weights) == pytest.approx(expected["losses"][step], rel=1e-12)
            held = set()
            for result in found:
                for name, grad in result["gradients"][step].items():
                    right = expected["gradients"][step][name]
                    error = (grad - right).abs().max() / right.abs().max().clamp(min=1e-9)
                    assert error < 1e-10, (model, layout, step, name)
                held |= result["gradients"][step].keys()
            assert held == expected["gradients"][step].keys()
        assert len(expected["scores"]) == 1 + STEPS
        assert expected["scores"][0] != expected["scores"][-1]
        for result in found:
            assert result["names"] == expected["names"]
            for scores, right in zip(result["scores"], expected["scores"], strict=True):
                assert scores == pytest.approx(right, rel=1e-5, abs=1e-9)
        assert [result["share"] for result in found] == [(ranks, rank) for rank in range(ranks)]
