# SPDX-License-Identifier: Apache-2.0
"""A small language model with every kind of state, and runs of it, for tests of checkpoints."""

import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_zeroprompt.strategies import ZeroPPStrategy

WORDS, WIDTH, LENGTH, BATCH, BATCHES = 11, 8, 5, 8, 5
PIPE = {"num_microbatches": 4}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen += self.training
        return x + torch.tanh(self.linear(self.norm(x)))


class Noted(nn.Module):
    """Has state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.note, self.linear = "new", nn.Linear(WORDS, WORDS)

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]

    def forward(self, x):
        return self.linear(x)


class LM(pl.LightningModule):
    """Tied weights, a parameter that no stage owns, sizes that ranks cannot share evenly, buffers, a frozen part."""

    def __init__(self, optimizer="adamw", blocks=8, words=WORDS):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, words, bias=False)
        self.head.weight = self.embedding.weight
        self.noted = Noted()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(2))
        self.losses = []

    def loss(self, batch):
        tokens, targets = batch
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.noted(self.head(x)).flatten(0, 1), targets.flatten())

    def training_step(self, batch, index):
        self.steps += 1
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, index):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1]},
            {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.03},
        ]
        if self.hparams.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rows(Sampler):
    """Of every batch a data-parallel rank's rows."""

    def __init__(self, parts, part):
        self.parts, self.part = parts, part

    def __len__(self):
        return BATCH * BATCHES // self.parts

    def __iter__(self):
        size = BATCH // self.parts
        for start in range(self.part * size, BATCH * BATCHES, BATCH):
            yield from range(start, start + size)


class Resumable(DataLoader):
    """Goes on where it was; Lightning stores what ``state_dict`` returns."""

    done, skip = 0, 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.skip = state["done"]

    def __iter__(self):
        skip, self.skip = self.skip, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.done = index + 1
                yield batch


def loader(strategy):
    generator = torch.Generator().manual_seed(3)
    size = (BATCH * BATCHES, LENGTH)
    dataset = TensorDataset(*(torch.randint(0, WORDS, size, generator=generator) for _ in range(2)))
    parts = 1 if strategy == "auto" else strategy.get("data_parallel_size", 1)
    return Resumable(dataset, BATCH // parts, sampler=Rows(parts, int(os.environ.get("RANK", 0)) % parts))


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def held(trainer, module):
    """All state that this rank holds, whole, by name."""
    state = {name: whole(t) for name, t in module.state_dict().items() if isinstance(t, torch.Tensor) and not t.is_meta}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, values in optimizer.state.items():
            state |= {f"{names[id(parameter)]}/{key}": whole(value) for key, value in values.items()}
        state["rates"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
        state["steps of the schedule"] = torch.tensor(trainer.lr_scheduler_configs[0].scheduler.last_epoch)
    return state


class Held(Callback):
    """What has been restored."""

    def on_train_start(self, trainer, module):
        self.state = held(trainer, module)


def world():
    # Lightning removes WORLD_SIZE when a fit ends.
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])


def make_trainer(strategy, **more):
    alone = strategy == "auto"
    settings = {
        "accelerator": "cpu",
        "devices": 1 if alone else world(),
        "strategy": "auto" if alone else ZeroPPStrategy(**strategy),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**settings | more)


def fit(strategy, steps, resume="", save=None, optimizer="adamw", dtype=torch.float64, **more):
    """Train to ``steps``: losses, the state after resuming and at the end."""
    torch.set_default_dtype(dtype)
    try:
        module, restored = LM(optimizer), Held()
        trainer = make_trainer(strategy, max_steps=steps, callbacks=[restored, *more.pop("callbacks", [])], **more)
        trainer.fit(module, loader(strategy), ckpt_path=resume or None)
        if save is not None:
            trainer.save_checkpoint(save)
        return {"losses": module.losses, "restored": restored.state, "end": held(trainer, module)}
    finally:
        torch.set_default_dtype(torch.float32)


def dist_rank():
    return int(os.environ.get("RANK", 0))
