# SPDX-License-Identifier: Apache-2.0
"""A pipeline for a model that knows nothing of pipelines: one changed argument.

A small GPT after nanoGPT (https://github.com/karpathy/nanoGPT), as a plain LightningModule, learns to continue counting
rhymes. It is trained on one process and, from the same weights, on two that hold half of its blocks each. Both print
the same losses. In a minute, on a laptop:

    python examples/drop_in.py
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_zeroprompt  # noqa: F401 - makes the name "zeropp" known to Lightning

TEXT = "one two three four five six seven eight nine ten " * 40
LETTERS = sorted(set(TEXT))
LENGTH = 32


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, -1)]
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(LightningModule):
    """nanoGPT's layout: wte, wpe, h, ln_f, and a head that shares the embedding's weight."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 8) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(len(LETTERS), width),
                "wpe": nn.Embedding(LENGTH, width),
                "h": nn.ModuleList(Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, len(LETTERS), bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name in ("wte", "wpe"):
            nn.init.normal_(self.transformer[name].weight, std=0.02)
        self.losses: list[float] = []

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    def training_step(self, batch, index):
        (tokens,) = batch
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(model: GPT, strategy: str, devices: int, steps: int) -> list[float]:
    """Train a model; returns the loss of every step."""
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    windows = text.unfold(0, LENGTH + 1, 3)
    data = DataLoader(TensorDataset(windows), batch_size=16, drop_last=True)
    trainer = Trainer(
        strategy=strategy,
        devices=devices,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    seed_everything(0)
    model = GPT()
    again = copy.deepcopy(model)
    alone = train(model, "auto", 1, steps)
    cut = train(again, "zeropp", 2, steps)
    # Lightning has started this program once more for the second rank; one of them reports.
    if again.global_rank == 0:
        for step in sorted({0, steps // 4, steps // 2, steps - 1}):
            print(f"step {step}: loss {alone[step]:.4f} on one process, {cut[step]:.4f} on a pipeline of two")
        print(f"largest difference: {max(abs(a - b) for a, b in zip(alone, cut, strict=True)):.0e}")


if __name__ == "__main__":
    main()
