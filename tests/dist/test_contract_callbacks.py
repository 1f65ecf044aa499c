# SPDX-License-Identifier: Apache-2.0
"""Lightning's callbacks on a pipeline decide and show what they do alone; float64, 1e-9."""

import time

import pytest
import torch
from contract import LM, both, check, loader, numbers, parameters, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn

TWO_STAGES = {"num_microbatches": 4}
GRID = {"data_parallel_size": 2, "num_microbatches": 2}


class Remembers(ModelCheckpoint):
    """Decides as always and writes nothing."""

    def _save_checkpoint(self, trainer, filepath):
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _remove_checkpoint(self, trainer, filepath):
        pass

    def file_exists(self, filepath, trainer):
        return False


def decisions(strategy):
    stopping = EarlyStopping("val_loss", min_delta=0.02, patience=1)
    saving = Remembers("nowhere", "{epoch}-{val_loss:.3f}-{train_loss_epoch:.3f}", monitor="val_loss", save_top_k=2)
    rates = LearningRateMonitor()
    module = Rates("adamw")
    fitting = trainer(
        strategy,
        callbacks=[stopping, saving, rates],
        logger=DummyLogger(),
        max_epochs=12,
        min_epochs=2,
        enable_checkpointing=True,
    )
    fitting.fit(module, loader(strategy), loader(strategy, rows=16))
    return {
        "epochs": fitting.current_epoch,
        "stopped": stopping.stopped_epoch,
        "waited": stopping.wait_count,
        "kept": {path.rpartition("/")[2]: score.item() for path, score in saving.best_k_models.items()},
        "best": saving.best_model_score.item(),
        "rates": {name: list(values) for name, values in rates.lrs.items()},
        "losses": module.losses,
    }


class Rates(LM):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.3)]


class Validated(Callback):
    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, module):
        self.values.append(trainer.callback_metrics["val_loss"].item())


def averages(strategy, averaging):
    """Validation runs on averaged weights, training goes on with the others, averages are left in the end."""
    validated = Validated()
    module = LM()
    fitting = trainer(strategy, callbacks=[averaging, validated], max_epochs=3)
    fitting.fit(module, loader(strategy), loader(strategy, rows=16))
    return {"losses": module.losses, "validated": validated.values, "parameters": parameters(module)}


def simple_average(strategy):
    return averages(strategy, WeightAveraging())


def moving_average(strategy):
    return averages(strategy, EMAWeightAveraging(decay=0.8, update_starting_at_step=2))


class Norms(LM):
    """As Lightning's documentation has it, and for parts of the module."""

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, 2))
        self.log_dict({f"largest_{k}": v for k, v in grad_norm(self.net.layers[4], "inf").items()})
        self.log("three", grad_norm(self.net.layers, 3)["grad_3.0_norm_total"])


class Logged(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.steps.append(numbers(trainer.logged_metrics))


def gradient_norms(strategy):
    logged = Logged()
    module = Norms()
    module.net.layers[1].requires_grad_(False)
    fitting = trainer(strategy, callbacks=[logged])
    fitting.fit(module, loader(strategy))
    for step in logged.steps:
        for name in ("train_loss_step", "train_loss_epoch", "train_loss"):
            step.pop(name, None)
    unused = nn.Linear(2, 2)
    unused(torch.ones(2)).sum().backward()
    return {"steps": logged.steps, "parameters": parameters(module), "later": numbers_of(grad_norm(unused, 1))}


def numbers_of(values):
    return {name: float(value) for name, value in values.items()}


class Summaries(Callback):
    def on_fit_start(self, trainer, module):
        summary = ModelSummary(module, max_depth=2)
        self.totals = summary.total_parameters, summary.trainable_parameters, summary.param_nums, summary.layer_names


class Callable(LM):
    def forward(self, tokens):
        return self.net(tokens)


def summary(strategy):
    summaries = Summaries()
    module = Callable()
    module.net.layers[1].requires_grad_(False)
    module.example_input_array = torch.zeros(2, 5, dtype=torch.long)
    fitting = trainer(strategy, callbacks=[summaries], enable_model_summary=True, max_steps=1)
    fitting.fit(module, loader(strategy))
    return {"totals": summaries.totals, "example": module.example_input_array is not None}


@pytest.mark.parametrize(
    "run", [decisions, simple_average, moving_average, gradient_norms, summary], ids=lambda f: f.__name__
)
def test_two_ranks_do_as_one(run_ranks, run):
    check(run_ranks(both, 2, run, TWO_STAGES))


@pytest.mark.parametrize("run", [simple_average, moving_average, gradient_norms], ids=lambda f: f.__name__)
def test_pipelines_side_by_side_do_as_one(run_ranks, run):
    check(run_ranks(both, 4, run, GRID))


class Slow(LM):
    def on_train_batch_start(self, batch, index):
        time.sleep(0.02 + 0.03 * self.global_rank)


def stops_in_time():
    timer = Timer(duration={"seconds": 1}, interval="step")
    fitting = trainer(TWO_STAGES, callbacks=[timer], max_epochs=-1, profiler="simple")
    fitting.fit(Slow(), loader(TWO_STAGES))
    limited = trainer(TWO_STAGES, max_time={"seconds": 1}, max_epochs=-1)
    limited.fit(Slow(), loader(TWO_STAGES))
    durations = fitting.profiler.recorded_durations
    return fitting.global_step, limited.current_epoch, len(durations["[Strategy]ZeroPPStrategy.training_step"])


def test_ranks_stop_together_when_time_is_up_and_steps_are_profiled(run_ranks):
    first, second = run_ranks(stops_in_time, 2)
    assert first == second
    assert 0 < first[0] == first[2]
    assert first[1] > 0


def norm_of_the_pipeline():
    torch.set_default_dtype(torch.float64)
    found = []

    class Asks(LM):
        def on_before_optimizer_step(self, optimizer):
            pipeline = self.trainer.strategy.pipeline
            total = grad_norm(self, 2)["grad_2.0_norm_total"]
            found.append(
                (pipeline.grad_norm().item(), total.item(), pipeline.grad_norms()["net.layers.0.up.bias"].item())
            )

    trainer(TWO_STAGES, max_steps=2).fit(Asks(), loader(TWO_STAGES))
    return found


def test_the_pipeline_tells_its_norms(run_ranks):
    first, second = run_ranks(norm_of_the_pipeline, 2)
    assert first == second
    for total, lightnings, part in first:
        assert total == pytest.approx(lightnings, rel=1e-12)
        assert 0 < part < total
