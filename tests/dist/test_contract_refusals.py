# SPDX-License-Identifier: Apache-2.0
"""What a pipeline cannot train is refused on every rank, before any step, with the reason and the way out."""

import re

import pytest
import torch
import torch.nn.functional as F
from contract import LM, loader, trainer
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from torch import nn

from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.testing import run_distributed


class Manual(LM):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(LM):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.layers.parameters(), 0.1), torch.optim.SGD(self.net.norm.parameters(), 0.1)]


class SecondOrder(LM):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Adafactor(LM):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters())


class Elsewhere(LM):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(3))], 0.1)


class Backbone(LM):
    def __init__(self):
        super().__init__()
        self.backbone = self.net.layers


class Ragged(LM):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[1][:3]


class NoTensors(LM):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return ["a", "b"]


SHARDED = {"pipeline_parallel_size": 1, "data_parallel_size": 2}
REFUSED = {
    "manual": (Manual, {}, {}, "Manual optimises manually.*Use automatic optimization"),
    "two optimizers": (
        TwoOptimizers,
        {},
        {},
        "returned several optimizers; zeropp runs one. Use one with parameter groups",
    ),
    "lbfgs": (SecondOrder, {}, {}, "LBFGS needs the gradients of all stages"),
    "adafactor": (Adafactor, SHARDED, {}, "Adafactor cannot work on sharded parameters, which data_parallel_size > 1"),
    "foreign parameter": (Elsewhere, {}, {}, r"parameter of shape \(3,\) that is not one of the module's"),
    "16-true": (LM, {}, {"precision": "16-true"}, "'16-true' overflows without a loss scaler; use 'bf16-true'"),
    "swa": (LM, {}, {"callbacks": [StochasticWeightAveraging(0.1)]}, "use WeightAveraging"),
    "finetuning": (Backbone, {}, {"callbacks": [BackboneFinetuning()]}, "give the optimizer all parameters"),
    "more micro-batches than rows": (LM, {"num_microbatches": 9}, {}, "num_microbatches=9, but the batch has 8 rows"),
    "rows that differ": (Ragged, {}, {}, r"batch\[1\] has 3 rows, batch\[0\] has 8"),
    "no tensors": (NoTensors, {}, {}, "a batch of type list holds no tensor"),
    "sizes": (
        LM,
        {"pipeline_parallel_size": 3},
        {},
        "3 pipeline ranks x 1 data-parallel ranks = 3, but 2 processes run",
    ),
}


def refusals():
    """The message of each case's error; ranks have to agree before they exchange anything."""
    messages = {}
    for name, (module, strategy, settings, _) in REFUSED.items():
        try:
            trainer(strategy, **settings).fit(module(), loader(strategy))
            messages[name] = "nothing was refused"
        except ValueError as error:
            messages[name] = f"{error}"
    return messages


def test_what_cannot_be_trained_is_refused_on_all_ranks(run_ranks):
    found = run_ranks(refusals, 2)
    for messages in found:
        for name, (_, _, _, message) in REFUSED.items():
            assert re.search(message, messages[name]), (name, messages[name])


class Nothing(LM):
    def training_step(self, batch, index):
        self.loss(batch)


class Twice(LM):
    def training_step(self, batch, index):
        return self.loss(batch) + F.mse_loss(self.net(batch[0]), self.net(batch[1]))


def fit(module):
    trainer({}).fit(module(), loader({}))


def raised(module):
    try:
        fit(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Nothing, "TypeError: training_step returned NoneType for a micro-batch; it has to return a loss"),
        (Twice, "ValueError: .*called more than once in a step; a pipeline runs its stages once a micro-batch"),
    ],
)
def test_a_step_that_cannot_run_says_why(run_ranks, module, message):
    assert re.match(message, run_ranks(raised, 1, module)[0])


def test_a_step_that_cannot_run_brings_all_ranks_down(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    message = "ValueError: .*If the step calls the model a second time: join the calls into one"
    # Not on the shared ranks, which would have to start anew.
    with pytest.raises(RuntimeError, match=f"(?s)rank 1 of 2 raised.*{message}"):
        run_distributed(fit, 2, Twice)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_microbatches": 0}, "num_microbatches=0: give a whole number"),
        ({"unit": 3, "num_microbatches": 2}, "unit=3 with num_microbatches=2"),
        ({"schedule": "gpipe"}, "schedule 'gpipe' is unknown; there are zeropp"),
    ],
)
def test_numbers_that_fit_nothing_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroPPStrategy(**settings)


def test_torchs_adafactor_still_cannot_shard(run_ranks):
    """When this fails, the refusal can go."""
    assert run_ranks(adafactor_on_a_mesh, 1) == ["RuntimeError"]


def adafactor_on_a_mesh():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    parameter.grad = torch.ones_like(parameter)
    try:
        torch.optim.Adafactor([parameter]).step()
    except Exception as error:
        return type(error).__name__
    return "nothing"
