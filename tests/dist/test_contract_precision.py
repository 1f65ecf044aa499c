# SPDX-License-Identifier: Apache-2.0
"""Types, random numbers and first weights on a pipeline and alone; tolerances at each comparison."""

import pytest
import torch
import torch.nn.functional as F
from contract import LM, Net, both, check, loader, mean_losses, parameters, same, tokens, trainer
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.strategies.support import fsdp_precision, micro_seed

TWO_STAGES = {"num_microbatches": 4}
GRID = {"data_parallel_size": 2, "num_microbatches": 2}


def in_types(run, strategy, *args):
    torch.set_default_dtype(torch.float32)
    return run("auto", *args), run(strategy, *args)


def ten_steps(strategy, precision, optimizer):
    module = LM(optimizer)
    fitting = trainer(strategy, precision=precision, max_steps=10, max_epochs=-1, gradient_clip_val=1.0)
    fitting.fit(module, loader(strategy), loader(strategy, rows=16))
    types = {str(p.dtype) for p in module.parameters()}
    return {"losses": module.losses, "val": fitting.callback_metrics["val_loss"].item(), "types": sorted(types)}


@pytest.mark.parametrize(("ranks", "strategy"), [(2, TWO_STAGES), (4, GRID)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_losses_in_float32(run_ranks, ranks, strategy, optimizer):
    found = run_ranks(in_types, ranks, ten_steps, strategy, "32-true", optimizer)
    expected = found[0][0]
    assert mean_losses([cut for _, cut in found]) == pytest.approx(expected["losses"], rel=1e-6)
    assert [cut["val"] for _, cut in found] == pytest.approx([expected["val"]] * ranks, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("ranks", "strategy"), [(2, TWO_STAGES), (4, GRID)])
def test_losses_in_bfloat16(run_ranks, ranks, strategy, precision):
    """8 bits of mantissa: a loss of 7, which without a pipeline is rounded too, is some multiple of 0.03."""
    found = run_ranks(in_types, ranks, ten_steps, strategy, precision, "adamw")
    expected, tolerance = found[0][0], 0.07 if precision == "bf16-true" else 0.03
    assert mean_losses([cut for _, cut in found]) == pytest.approx(expected["losses"], abs=tolerance)
    for _, cut in found:
        assert cut["val"] == pytest.approx(expected["val"], abs=tolerance)
        assert cut["types"] == expected["types"] == ["torch.bfloat16" if precision == "bf16-true" else "torch.float32"]
        # Losses are not rounded to bfloat16 once more.
        assert any(loss != torch.tensor(loss).bfloat16().item() for loss in cut["losses"])


def by_name(strategy):
    """strategy="zeropp", as most users have it; float64 comes from the Trainer."""
    module = LM("adamw")
    fitting = Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=1 if strategy == "auto" else 2,
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    fitting.fit(module, loader("auto"), loader("auto", rows=16))
    return {"losses": module.losses, "parameters": parameters(module), "type": str(module.dtype)}


def test_the_bare_name_in_float64(run_ranks):
    check(run_ranks(in_types, 2, by_name, "zeropp"))


def test_float16_with_a_loss_scaler_is_refused():
    with pytest.raises(ValueError, match=r"'16-mixed' scales the loss.*use 'bf16-mixed' or 'bf16-true'"):
        fsdp_precision(MixedPrecision("16-mixed", "cpu"))
    # Given an object, Lightning refuses it itself.
    with pytest.raises(ValueError, match=r"does not support.*16-mixed.*Choose a different precision among"):
        Trainer(accelerator="cpu", devices=2, strategy=ZeroPPStrategy(), precision="16-mixed")


class Noisy(LM):
    """Random numbers before, in and behind the blocks."""

    def loss(self, batch):
        net = self.net
        x = F.dropout(net.embedding(batch[0]) + net.positions, 0.1, self.training)
        for layer in net.layers:
            x = layer(x)
        x = F.dropout(net.norm(x), 0.2, self.training)
        return F.cross_entropy(net.head(x).flatten(0, 1), batch[1].flatten())


def cut_noise(strategy):
    torch.set_default_dtype(torch.float64)
    found, states = {}, []
    for kind in ("auto", strategy):
        torch.manual_seed(5)
        module = LM() if kind == "auto" else Noisy(dropout=0.3)
        torch.manual_seed(5)
        fitting = trainer(kind, accumulate_grad_batches=2)
        fitting.fit(module, loader(strategy, rows=32), loader(strategy, rows=8))
        states.append(torch.get_rng_state())
        found = {"losses": module.losses, "parameters": parameters(module)}
    # Steps leave the random numbers of what is around them alone.
    assert torch.equal(*states)
    return found | {"cuts": fitting.strategy.pipeline.cuts}


def alone_with_the_same_seeds(cuts, micro_batches):
    """One process, one micro-batch after another: the seed of (step, -1, m) before user code, of (step, stage, m)
    before a stage's blocks; behind them user code goes on from where it was."""
    module = Noisy(dropout=0.3)
    net, run_seed, losses = module.net, micro_seed(5, 0), []
    optimizer = module.configure_optimizers()
    for step, batch in enumerate(DataLoader(tokens(32), 8)):
        total = 0.0
        for index, (words, targets) in enumerate(zip(*(part.chunk(micro_batches) for part in batch), strict=True)):
            torch.manual_seed(micro_seed(run_seed, step, -1, index))
            x = F.dropout(net.embedding(words) + net.positions, 0.1)
            state = torch.get_rng_state()
            for stage, (first, end) in enumerate(cuts):
                torch.manual_seed(micro_seed(run_seed, step, stage, index))
                for layer in net.layers[first:end]:
                    x = layer(x)
            torch.set_rng_state(state)
            x = F.dropout(net.norm(x), 0.2)
            loss = F.cross_entropy(net.head(x).flatten(0, 1), targets.flatten()) / micro_batches
            (loss / 2).backward()
            total += loss.item()
        losses.append(total / 2)
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "parameters": parameters(module)}


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True, "schedule": "zbv"}], ids=["plain", "again"])
def test_random_numbers_are_those_of_micro_batch_and_stage(run_ranks, more):
    ranks = run_ranks(cut_noise, 2, TWO_STAGES | more)
    torch.set_default_dtype(torch.float64)
    try:
        expected = alone_with_the_same_seeds(ranks[0]["cuts"], 4)
    finally:
        torch.set_default_dtype(torch.float32)
    for found in ranks:
        found.pop("cuts")
        same(found, expected, 1e-9)


class Built(LM):
    """Built on the meta device; ``setup`` or ``on_fit_start`` loads the weights."""

    def __init__(self, path, hook):
        super().__init__()
        self.path, self.hook = path, hook
        del self.net

    def configure_model(self):
        if hasattr(self, "net"):
            return
        with torch.device("meta"):
            self.net = MetaNet()
        if self.hook == "configure_model":
            self.load_state_dict(torch.load(self.path, weights_only=True), assign=True)

    def on_fit_start(self):
        if self.hook == "on_fit_start":
            self.load_state_dict(torch.load(self.path, weights_only=True))


class MetaNet(Net):
    """Untied, and with its own parameter in a module: a root that contains the blocks cannot be initialised alone."""

    def __init__(self):
        super().__init__()
        del self.positions
        self.positions = Positions(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.layers = self.__dict__["_modules"].pop("layers")
        self.norm = self.__dict__["_modules"].pop("norm")
        self.head = self.__dict__["_modules"].pop("head")

    def forward(self, words):
        x = self.positions(self.embedding(words))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Positions(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x):
        return x + self.weight


def from_loaded_weights(strategy, path, hook):
    module = Built(path, hook)
    if strategy == "auto":
        # Lightning leaves it to the user to give a meta model memory where there is one device.
        module.configure_model()
        module.to_empty(device="cpu")
        module.load_state_dict(torch.load(path, weights_only=True))
    trainer(strategy).fit(module, loader(strategy))
    return {"losses": module.losses, "parameters": parameters(module)}


@pytest.mark.parametrize(
    ("ranks", "strategy", "hook"),
    [(2, TWO_STAGES, "configure_model"), (2, TWO_STAGES, "on_fit_start"), (4, GRID, "configure_model")],
)
def test_models_built_without_memory_train_from_loaded_weights(run_ranks, tmp_path, ranks, strategy, hook):
    torch.manual_seed(1)
    weights = {f"net.{name}": value.double() for name, value in MetaNet().state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    check(run_ranks(both, ranks, from_loaded_weights, strategy, tmp_path / "weights.pt", hook))
