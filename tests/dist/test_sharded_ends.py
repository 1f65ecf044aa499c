# SPDX-License-Identifier: Apache-2.0
"""A rank with the first and the last stage, sharded: the embedding is not gathered when code behind the blocks runs."""

import os

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_zeroprompt.strategies import ZeroPPStrategy


class Module(pl.LightningModule):
    """An embedding and a head that share nothing, around a list of blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.head = nn.Linear(8, 12)

    def training_step(self, batch, batch_idx):
        hidden = self.embedding(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(hidden.tanh()).flatten(0, 1), batch[0].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(strategy):
    torch.set_default_dtype(torch.float64)
    try:
        words = torch.randint(12, (24, 5), generator=torch.Generator().manual_seed(1))
        data = 1 if strategy is None else strategy["data_parallel_size"]
        trainer = pl.Trainer(
            strategy="auto" if strategy is None else ZeroPPStrategy(**strategy),
            accelerator="cpu",
            devices=data,
            max_epochs=1,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module()
        mine = words if data == 1 else words[int(os.environ["RANK"]) :: data]
        loaders = [DataLoader(TensorDataset(mine), 8 // data) for _ in range(2)]
        trainer.fit(module, *loaders)
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in module.named_parameters()
        }
        return weights, float(trainer.callback_metrics["loss"])
    finally:
        torch.set_default_dtype(torch.float32)


def test_like_one_process(run_ranks):
    expected, loss = train(None)
    strategy = {"pipeline_parallel_size": 1, "data_parallel_size": 2, "stages_per_rank": 4, "num_microbatches": 2}
    for weights, theirs in run_ranks(train, 2, strategy):
        assert theirs == pytest.approx(loss, rel=1e-9)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)
