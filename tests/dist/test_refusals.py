# SPDX-License-Identifier: Apache-2.0
"""What zeropp refuses: before the first step, on every rank, with the arithmetic and the remedy."""

import os
import re
import warnings

import hydra
import lightning.pytorch as pl
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, Dataset

from lightning_zeroprompt.strategies import ZeroPPStrategy

ROWS = 8


class Module(pl.LightningModule):
    def __init__(self, blocks=4, make=lambda: nn.Linear(4, 4)):
        super().__init__()
        self.net = nn.Sequential(*(make() for _ in range(blocks)))
        self.taken = 0

    def training_step(self, batch, index):
        return self.net(batch).pow(2).mean()

    def on_train_batch_end(self, outputs, batch, index):
        self.taken += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rows(Dataset):
    """Counts the rows that are drawn."""

    def __init__(self, count):
        self.rows, self.drawn = torch.randn(count, 4), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.drawn += 1
        return self.rows[index]


def twice(rows):
    """Of 8 items 16 rows."""
    return torch.stack([*rows, *rows])


class TwiceAsManyRows(Module):
    def on_after_batch_transfer(self, batch, index):
        return torch.cat([batch, batch])


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:2], self.net[2:])]


class SecondOrder(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Adafactor(Module):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters())


class Elsewhere(Module):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(3))], 0.1)


class Backbone(Module):
    def __init__(self):
        super().__init__()
        self.backbone = self.net


class Ragged(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch, batch[:3]


class NoTensors(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return ["a", "b"]


class Compiled(Module):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(nn.ModuleDict({"inner": self.net}))
        del self.net


class Differing(Module):
    """Another width on one rank."""

    def __init__(self):
        super().__init__()
        if os.environ["RANK"] == "1":
            self.net[1] = nn.Linear(4, 4, bias=False)


class Hyper(Module):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"lr": 0.1 * (1 + int(os.environ["RANK"]))})


class Head(Module):
    """Names another part of the model as what its blocks are."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def configure_pipeline(self):
        return self.head, list(self.net)


CASES = {
    "world": (Module, {"pipeline_parallel_size": 3}, r"3 pipeline ranks x 1 data-parallel ranks = 3, but 2 processes"),
    "world of D": (Module, {"data_parallel_size": 3}, r"2 processes cannot be divided among 3 data-parallel ranks"),
    "replicas": (
        Module,
        {"pipeline_parallel_size": 1, "data_parallel_size": 2, "data_parallel_replicas": 3},
        r"2 data-parallel ranks cannot hold 3 replicas: 3 does not divide 2",
    ),
    "blocks": (lambda: Module(3), {"stages_per_rank": 2}, r"3 blocks cannot fill 4 stages: .* use fewer ranks"),
    "zbv": (Module, {"schedule": "zbv", "stages_per_rank": 1}, r"'zbv' has two stages a rank, not 1"),
    "zbv of few blocks": (lambda: Module(3), {"schedule": "zbv"}, r"3 blocks cannot fill 4 stages"),
    "micro-batches": (Module, {"num_microbatches": 9}, r"num_microbatches=9, but the batch has 8 rows .* lower it"),
    "micro-batches, collated": (Module, {"num_microbatches": 17}, r"num_microbatches=17, but the batch has 16 rows"),
    "unit": (Module, {"unit": 9}, r"unit=9, but the first batch of 8 rows is split into 8 micro-batches"),
    "manual": (Manual, {}, r"Manual optimises manually; .* Use automatic optimization"),
    "optimizers": (TwoOptimizers, {}, r"several optimizers; zeropp runs one. Use one with parameter groups"),
    "lbfgs": (SecondOrder, {}, r"LBFGS needs the gradients of all stages"),
    "adafactor": (
        Adafactor,
        {"pipeline_parallel_size": 1, "data_parallel_size": 2},
        r"Adafactor cannot work on sharded parameters, which data_parallel_size > 1",
    ),
    "foreign parameter": (Elsewhere, {}, r"parameter of shape \(3,\) that is not one of the module's"),
    "16-true": (Module, {}, r"'16-true' overflows without a loss scaler; use 'bf16-true'"),
    "swa": (Module, {}, r"use WeightAveraging"),
    "finetuning": (Backbone, {}, r"give the optimizer all parameters"),
    "rows that differ": (Ragged, {}, r"batch\[1\] has 3 rows, batch\[0\] has 8"),
    "no tensors": (NoTensors, {}, r"a batch of type list holds no tensor"),
    "compiled": (Compiled, {}, r"'model' is compiled as a whole, .* compile its blocks instead"),
    "model": (Differing, {}, r"rank 1 differs from rank 0 in parameters: .* same code with the same settings"),
    "hyperparameters": (Hyper, {}, r"rank 1 differs from rank 0 in hparams"),
    "hydra": (Module, {}, r"rank 1 differs from rank 0 in config: .* one resolved configuration"),
    "loaders": (Module, {}, r"rank 1 has {'batches an epoch': 3, .*}, rank 0 has {'batches an epoch': 2"),
    "target": (Head, {}, r"block 0, a Linear, has parameters weight, bias that are none of Linear's"),
}
NEEDS_A_BATCH = {"micro-batches, collated", "loaders", "rows that differ", "no tensors"}
TRAINERS = {
    "16-true": lambda: {"precision": "16-true"},
    "swa": lambda: {"callbacks": [StochasticWeightAveraging(0.1)]},
    "finetuning": lambda: {"callbacks": [BackboneFinetuning()]},
}


def make_trainer(strategy, **more):
    return pl.Trainer(
        strategy=ZeroPPStrategy(**strategy),
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


def hydra_job(config):
    """What Hydra leaves in a process that runs a job: of one command line on all ranks, but another file."""
    ConfigStore.instance().store("job", config)
    with hydra.initialize(version_base=None, config_path=None):
        composed = hydra.compose("job", ["model=wide"], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)


def refuse(case):
    """Type and message of what a rank raises, the steps that it took, and the rows that it drew."""
    make, settings, _ = CASES[case]
    rank = int(os.environ["RANK"])
    module = make()
    data = Rows(ROWS * (2 + rank if case == "loaders" else 2))
    try:
        if case == "hydra":
            hydra_job({"model": "deep", "lr": rank})
        trainer = make_trainer(settings, **TRAINERS.get(case, dict)())
        trainer.fit(module, DataLoader(data, ROWS, collate_fn=twice if case.endswith("collated") else None))
    except Exception as error:
        return type(error).__name__, str(error), module.taken, data.drawn
    finally:
        HydraConfig.instance().cfg = None
    return "", "no error", module.taken, data.drawn


@pytest.mark.parametrize("case", CASES)
def test_refused_on_every_rank_before_the_first_step(case, run_ranks):
    for kind, message, taken, drawn in run_ranks(refuse, 2, case):
        assert re.search(CASES[case][2], message, re.DOTALL), message
        assert kind == ("RuntimeError" if "rank 1" in CASES[case][2] else "ValueError")
        assert taken == 0
        assert not drawn or case in NEEDS_A_BATCH


@pytest.mark.parametrize("make", [Module, TwiceAsManyRows])
def test_rows_that_only_a_batch_tells_are_not_refused(make, run_ranks):
    """Nine micro-batches of what a loader draws eight of."""
    assert run_ranks(fit_more_rows, 2, make) == [2, 2]


def fit_more_rows(make):
    module = make()
    trainer = make_trainer({"num_microbatches": 9})
    trainer.fit(module, DataLoader(Rows(2 * ROWS), ROWS, collate_fn=twice if make is Module else None))
    return module.taken


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": 0}, r"unit=0: give a whole number of at least 1, or 'auto'"),
        ({"num_microbatches": 4, "unit": 5}, r"unit=5 with num_microbatches=4: a unit has at most all of them"),
        ({"num_microbatches": 0}, r"num_microbatches=0: give a whole number"),
        ({"pipeline_parallel_size": 1.5}, r"pipeline_parallel_size=1.5"),
        ({"schedule": "zerobubble"}, r"schedule 'zerobubble' is unknown; there are .*zeropp"),
    ],
)
def test_settings_that_fit_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroPPStrategy(**settings)


def batch_norm():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def warnings_of(micro_batches):
    module = Module(2, batch_norm)
    trainer = make_trainer({"num_microbatches": micro_batches})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(torch.randn(ROWS, 4), ROWS))
    return [str(warning.message) for warning in caught if "BatchNorm" in str(warning.message)]


def test_batch_norm_in_blocks_is_warned_of(run_ranks):
    (message,) = run_ranks(warnings_of, 2, 4)[0]
    assert "net.0.1, net.1.1: BatchNorm takes its statistics from a micro-batch" in message
    assert run_ranks(warnings_of, 2, 1)[0] == []


class Ours(Module):
    """An error of the user's own behind the blocks, in the first step: on the last rank alone."""

    def training_step(self, batch, index):
        self.net(batch)
        return {}["no such key"]


class InBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        raise ZeroDivisionError("in a block")


class WrongTarget(Module):
    def training_step(self, batch, index):
        return self.net(batch).pow(2).mean()

    def configure_pipeline(self):
        return self.net, list(self.net)[::-1]


class Twice(Module):
    def training_step(self, batch, index):
        return (self.net(batch) - self.net(batch + 1)).pow(2).mean()


class TwiceWithEnds(Module):
    """What is found first is that the embedding, which the last rank lacks, runs behind the blocks."""

    def __init__(self):
        super().__init__()
        self.net, self.embedding = None, nn.Linear(4, 4)
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 4)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch, index):
        return (self(batch) - self(batch + 1)).pow(2).mean()


class Nothing(Module):
    def training_step(self, batch, index):
        self.net(batch)


FAULTY = {
    "behind": (Ours, "KeyError: 'no such key'"),
    "block": (lambda: Module(4, InBlock), "ZeroDivisionError: in a block\n(in the forward pass of micro-batch 0"),
    "target": (WrongTarget, "they do not return what Sequential returns for the same input"),
    "twice": (Twice, "ValueError: 'net': called more than once in a step"),
    "twice, with ends": (TwiceWithEnds, "If the step calls the model a second time: join the calls into one"),
}


def fail(case):
    make_trainer({}).fit(FAULTY[case][0](), DataLoader(torch.randn(ROWS, 4), ROWS))


@pytest.mark.parametrize("case", FAULTY)
def test_errors_in_the_first_step_come_as_they_are(case, run_ranks, capfd):
    # These ranks are ended with the first error of one of them, so each costs a start of two processes.
    with pytest.raises(RuntimeError) as caught:
        run_ranks(fail, 2, case)
    text = str(caught.value)
    assert FAULTY[case][1] in text, text
    assert "failed to run forward" not in text
    assert "Full Schedule" not in text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Nothing, "TypeError: training_step returned NoneType for a micro-batch; it has to return a loss"),
        (TwiceWithEnds, "ValueError: .*called more than once in a step; a pipeline runs its stages once a micro-batch"),
    ],
)
def test_a_step_that_cannot_run_on_one_rank_says_why(module, message, run_ranks):
    assert re.match(message, run_ranks(raised, 1, module)[0])


def raised(module):
    try:
        make_trainer({}).fit(module(), DataLoader(torch.randn(ROWS, 4), ROWS))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_torchs_adafactor_still_cannot_shard(run_ranks):
    """When this fails, the refusal can go."""
    assert run_ranks(adafactor_on_a_mesh, 1) == ["RuntimeError"]


def adafactor_on_a_mesh():
    torch.distributed.init_process_group("gloo")
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    parameter.grad = torch.ones_like(parameter)
    try:
        torch.optim.Adafactor([parameter]).step()
    except Exception as error:
        return type(error).__name__
    return "nothing"
