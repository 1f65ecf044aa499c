# SPDX-License-Identifier: Apache-2.0
"""Throughput under a real Trainer, with a clock that only the test moves. Exact up to float division."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_zeroprompt.callbacks import Throughput, throughput


class Clock:
    """Seconds pass where the test says so."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


class Module(LightningModule):
    """Every training batch takes as many seconds as it says; a validation takes an hour."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.clock.now += batch["seconds"]
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.clock.now += 3600

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Log(DummyLogger):
    """Keeps the metrics of the callback."""

    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        found = {name: value for name, value in metrics.items() if name.startswith("throughput/")}
        if found:
            self.found.append((step, found))


def make_batch(number):
    """3 + number real encoder tokens and 2 decoder tokens a row among padding; two rows, three examples."""
    encoder, decoder = torch.zeros(2, 40, dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
    encoder[:, : 3 + number], encoder[0, 1:2], decoder[:, :2] = 1, 2, 1
    return {
        "input_segments": encoder,
        "decoder_segments": decoder,
        "examples": torch.tensor([2, 1], dtype=torch.int32),
        "seconds": 1.0 + number,
    }


def tokens(number):
    return 2 * (3 + number) + 4


def run(monkeypatch, batches, *, callback=None, **settings):
    clock, log = Clock(), Log()
    monkeypatch.setattr(throughput, "time", clock)
    data = [make_batch(number) for number in range(batches)]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=log,
        callbacks=[callback or Throughput()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    loaders = [DataLoader(data, batch_size=None) for _ in range(2)]
    trainer.fit(Module(clock), loaders[0], loaders[1] if "val_check_interval" in settings else None)
    return log.found


def expected(step, numbers, optimizer_steps, replicas=1):
    seconds = sum(1.0 + number for number in numbers)
    return step, pytest.approx(
        {
            "throughput/tokens_per_second": replicas * sum(map(tokens, numbers)) / seconds,
            "throughput/examples_per_second": replicas * 3 * len(numbers) / seconds,
            "throughput/seconds_per_step": seconds / optimizer_steps,
        }
    )


def test_only_real_tokens_count_once_an_interval(monkeypatch):
    found = run(monkeypatch, 7, log_every_n_steps=3)
    assert found == [expected(3, [0, 1, 2], 3), expected(6, [3, 4, 5], 3)]


@pytest.mark.parametrize("every", [1, 2])
def test_accumulated_batches_make_one_step_and_one_entry(monkeypatch, every):
    found = run(monkeypatch, 8, log_every_n_steps=every, accumulate_grad_batches=2)
    if every == 1:
        assert found[0] == expected(1, [0, 1], 1)
        assert [step for step, _ in found] == [1, 2, 3, 4]
    else:
        assert found == [expected(2, [0, 1, 2, 3], 2), expected(4, [4, 5, 6, 7], 2)]


def test_time_and_tokens_before_a_validation_are_left_out(monkeypatch):
    found = run(monkeypatch, 6, log_every_n_steps=3, val_check_interval=4)
    assert found == [expected(3, [0, 1, 2], 3), expected(6, [4, 5], 2)]


def test_a_second_run_with_the_same_callback_starts_anew(monkeypatch):
    callback = Throughput()
    first = run(monkeypatch, 3, callback=callback, log_every_n_steps=3)
    assert run(monkeypatch, 3, callback=callback, log_every_n_steps=3) == first != []


def test_data_parallel_ranks_are_taken_to_do_as_much_as_this_one(monkeypatch):
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 4})
    assert run(monkeypatch, 2, log_every_n_steps=2) == [expected(2, [0, 1], 2, replicas=4)]
