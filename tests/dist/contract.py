# SPDX-License-Identifier: Apache-2.0
"""A small language model and runs of it, alone (strategy="auto") and on a pipeline, that tests compare.

Everything is float64 where a test says nothing else: then only the order of sums differs.
"""

import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_zeroprompt.strategies import ZeroPPStrategy

WORDS, LENGTH = 11, 5


class Block(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, scale=0.5):
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x))))) * scale


class Net(nn.Module):
    """Tied embedding and head, a parameter of the module that holds the blocks, blocks called in a loop."""

    def __init__(self, width=8, blocks=6, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(self.norm(x))


class LM(pl.LightningModule):
    """A LightningModule that knows nothing of pipelines."""

    def __init__(self, optimizer="sgd", **net):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(**net)
        self.optimizer = optimizer
        self.losses = []

    def loss(self, batch):
        tokens, targets = batch
        return F.cross_entropy(self.net(tokens).flatten(0, 1), targets.flatten())

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        decayed = [p for name, p in self.named_parameters() if not name.endswith("bias") and "norm" not in name]
        rest = [p for name, p in self.named_parameters() if name.endswith("bias") or "norm" in name]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.03}]
        return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


def tokens(rows=40, seed=3):
    """Random tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(*(torch.randint(0, WORDS, (rows, LENGTH), generator=generator) for _ in range(2)))


def loader(strategy, rows=40, batch=8, seed=3, **more):
    """Batches of ``batch`` rows over all data-parallel ranks: of each the rank has every D-th row."""
    dataset = tokens(rows, seed)
    parts = 1 if strategy == "auto" else strategy.get("data_parallel_size", 1)
    sampler = DistributedSampler(dataset, parts, int(os.environ["RANK"]) % parts, shuffle=False) if parts > 1 else None
    return DataLoader(dataset, batch // parts, sampler=sampler, **more)


def trainer(strategy, **more):
    """A quiet Trainer; ``strategy`` is "auto" or keyword arguments of ZeroPPStrategy."""
    alone = strategy == "auto"
    settings = {
        "accelerator": "cpu",
        "devices": 1 if alone else dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]),
        "strategy": "auto" if alone else ZeroPPStrategy(**strategy),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**settings | more)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parameters(module):
    """Those that this rank holds, by name, unsharded."""
    return {name: whole(p) for name, p in module.named_parameters() if not p.is_meta}


def numbers(values):
    return {name: value.item() for name, value in values.items()}


def both(run, strategy, *args):
    """What ``run("auto", *args)`` and ``run(strategy, *args)`` return, in one rank."""
    torch.set_default_dtype(torch.float64)
    alone = run("auto", *args)
    return alone, run(strategy, *args)


def same(found, expected, tolerance, at=""):
    """Compare nested values; ``found`` may lack parameters that another rank holds."""
    if isinstance(expected, dict):
        holds_part = at.endswith("parameters")
        assert found.keys() <= expected.keys() if holds_part else found.keys() == expected.keys(), (at, found, expected)
        for key in found:
            same(found[key], expected[key], tolerance, f"{at}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), (at, found, expected)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, tolerance, f"{at}[{index}]")
    elif isinstance(expected, (float, torch.Tensor)):
        torch.testing.assert_close(
            torch.as_tensor(found).double(),
            torch.as_tensor(expected).double(),
            atol=tolerance,
            rtol=0,
            equal_nan=True,
            msg=lambda text: f"{at}: {text}",
        )
    else:
        assert found == expected, (at, found, expected)


def mean_losses(ranks):
    """The losses of data-parallel ranks as one: their mean, step by step."""
    return [sum(step) / len(step) for step in zip(*(found["losses"] for found in ranks), strict=True)]


def check(ranks, tolerance=1e-9):
    """Compare what ``both`` returned on all ranks; losses over data-parallel ranks in the mean."""
    for alone, _ in ranks:
        same(alone, ranks[0][0], 0.0)
    expected = ranks[0][0]
    if "losses" in expected:
        same(mean_losses([found for _, found in ranks]), expected["losses"], tolerance, "losses")
    for _, found in ranks:
        same(
            {key: value for key, value in found.items() if key != "losses"},
            {key: value for key, value in expected.items() if key != "losses"},
            tolerance,
        )
    held = [found["parameters"].keys() for _, found in ranks if "parameters" in found]
    if held:
        assert set().union(*held) == expected["parameters"].keys()
