# SPDX-License-Identifier: Apache-2.0
"""What Lightning does around a step, on a pipeline and alone: losses and parameters are equal to 1e-9 in float64."""

import pytest
import torch
from contract import LM, both, check, loader, numbers, parameters, tokens, trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

TWO_STAGES = {"num_microbatches": 4}
OVERLAP = {"num_microbatches": 4, "unit": 2, "schedule": "zeropp_overlap"}
GRID = {"data_parallel_size": 2, "num_microbatches": 2}


def train(strategy, module, train_loader=None, **settings):
    """Fit; what a user can see of it."""
    fitting = trainer(strategy, **settings)
    fitting.fit(module, train_loader or loader(strategy), loader(strategy, rows=16))
    return {
        "losses": module.losses,
        "parameters": parameters(module),
        "metrics": {k: v for k, v in numbers(fitting.callback_metrics).items() if k.startswith("val")},
        "rates": [scheduler.scheduler.get_last_lr() for scheduler in fitting.lr_scheduler_configs],
        "steps": fitting.global_step,
    }


class Scheduled(LM):
    def __init__(self, scheduler, **more):
        super().__init__(**more)
        self.scheduler = scheduler

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.scheduler == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        if self.scheduler == "warm":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Adafactor(LM):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=0.05)


class Adagrad(LM):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.05, eps=1e-3)


class NoOptimizer(LM):
    def configure_optimizers(self):
        return None


class OwnClipping(LM):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.05 * (1 + self.global_step), gradient_clip_algorithm="norm")


class Frozen(LM):
    def __init__(self, blocks, **more):
        super().__init__(**more)
        for index in blocks:
            self.net.layers[index].requires_grad_(False)
        if 0 in blocks:
            self.net.embedding.requires_grad_(False)
            self.net.positions.requires_grad_(False)


class ThawsLater(Frozen):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net.layers.requires_grad_(True)


class OwnCheckpointing(LM):
    """User code calls its blocks through checkpoint()."""

    def loss(self, batch):
        net = self.net
        x = net.embedding(batch[0]) + net.positions
        for layer in net.layers:
            x = checkpoint(layer, x, 0.5, use_reentrant=False)
        return nn.functional.cross_entropy(net.head(net.norm(x)).flatten(0, 1), batch[1].flatten())


class WrappedBlocks(LM):
    def __init__(self, **more):
        super().__init__(**more)
        blocks = set(self.net.layers)
        apply_activation_checkpointing(self.net, check_fn=lambda part: part in blocks)


class Lengths(torch.utils.data.Dataset):
    """A batch an item: lengths change from step to step."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        length = (5, 3, 5, 1, 4, 3)[index]
        return tuple(part[index : index + 8, :length] for part in tokens(20).tensors)


def plain(strategy):
    return train(strategy, LM())


def accumulation(strategy):
    return train(strategy, LM("adamw"), accumulate_grad_batches=2, gradient_clip_val=0.3, max_epochs=2)


def accumulation_scheduler(strategy):
    return train(strategy, LM(), callbacks=[GradientAccumulationScheduler({0: 1, 1: 3})], max_epochs=2)


def clip_norm(strategy):
    return train(strategy, LM(), gradient_clip_val=0.05)


def clip_value(strategy):
    return train(strategy, LM("adamw"), gradient_clip_val=0.002, gradient_clip_algorithm="value")


def own_clipping(strategy):
    return train(strategy, OwnClipping())


def adafactor(strategy):
    return train(strategy, Adafactor())


def adagrad(strategy):
    return train(strategy, Adagrad())


def no_optimizer(strategy):
    return train(strategy, NoOptimizer())


def plateau(strategy):
    return train(strategy, Scheduled("plateau"), max_epochs=3)


def warm(strategy):
    return train(strategy, Scheduled("warm", optimizer="adamw"))


def one_cycle(strategy):
    return train(strategy, Scheduled("cycle", optimizer="adamw"), max_epochs=2)


def frozen_first(strategy):
    return train(strategy, Frozen([0, 1]))


def frozen_middle(strategy):
    return train(strategy, Frozen([2, 3]))


def frozen_last(strategy):
    return train(strategy, Frozen([4, 5]))


def thaws(strategy):
    return train(strategy, ThawsLater([0, 1, 4]), max_epochs=2)


def uneven_last_batch(strategy):
    return train(strategy, LM(), loader(strategy, rows=30), max_epochs=2)


def fewer_rows_than_micro_batches(strategy):
    return train(strategy, LM(), loader(strategy, rows=19), max_epochs=2)


def lengths(strategy):
    return train(strategy, LM(), DataLoader(Lengths(), batch_size=None), max_epochs=2)


def own_checkpointing(strategy):
    return train(strategy, OwnCheckpointing())


def wrapped_blocks(strategy):
    return train(strategy, WrappedBlocks())


TWO = [
    (plain, TWO_STAGES),
    (plain, OVERLAP),
    (accumulation, TWO_STAGES),
    (accumulation_scheduler, OVERLAP),
    (clip_norm, TWO_STAGES),
    (clip_value, TWO_STAGES),
    (own_clipping, TWO_STAGES),
    (adafactor, TWO_STAGES),
    (adagrad, TWO_STAGES),
    (no_optimizer, TWO_STAGES),
    (plateau, TWO_STAGES),
    (warm, TWO_STAGES),
    (one_cycle, TWO_STAGES),
    (frozen_first, TWO_STAGES),
    (frozen_middle, TWO_STAGES),
    (frozen_last, TWO_STAGES),
    (thaws, TWO_STAGES),
    (uneven_last_batch, TWO_STAGES),
    (fewer_rows_than_micro_batches, {}),
    (lengths, TWO_STAGES),
    (plain, TWO_STAGES | {"activation_checkpointing": True}),
    (own_checkpointing, OVERLAP),
    (wrapped_blocks, TWO_STAGES),
]
FOUR = [accumulation, clip_norm, clip_value, frozen_first, frozen_last, uneven_last_batch, plateau, own_checkpointing]


def names(values):
    return [run.__name__ + "".join(f"-{v}" for k, v in kw.items() if k != "num_microbatches") for run, kw in values]


@pytest.mark.parametrize(("run", "strategy"), TWO, ids=names(TWO))
def test_two_ranks_train_as_one(run_ranks, run, strategy):
    check(run_ranks(both, 2, run, strategy))


@pytest.mark.parametrize("run", FOUR)
def test_pipelines_side_by_side_train_as_one(run_ranks, run):
    check(run_ranks(both, 4, run, GRID))
