# SPDX-License-Identifier: Apache-2.0
"""A causal language model of Hugging Face on a pipeline, unchanged.

A Llama with random weights (any of Llama, Qwen2, Mistral, Gemma 2, GPT-NeoX works like it; ``from_pretrained`` too)
learns to copy: batches have padding, labels of -100, and rows of different length. Two ranks hold half of its layers
each. In a minute, on a laptop:

    python examples/hf_causal.py
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_zeroprompt.strategies import ZeroPPStrategy

PAD, SEPARATOR, WORDS = 0, 1, 20


class Causal(LightningModule):
    """What one writes for a Hugging Face model, and ``loss_weight``."""

    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=PAD,
                tie_word_embeddings=True,
            )
        )

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def loss_weight(self, batch):
        """Tokens that the loss of a (micro-)batch is a mean over: so the mean of the whole batch stays one."""
        return (batch["labels"][:, 1:] != -100).sum()

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Some words, a separator, and the same words; the loss is of the second half."""
    made = []
    for _ in range(count):
        words = torch.randint(2, WORDS, (int(torch.randint(2, 7, ())),))
        ids = torch.cat([words, torch.tensor([SEPARATOR]), words])
        padding = 13 - len(ids)
        labels = torch.cat([torch.full((len(words) + 1,), -100), words, torch.full((padding,), -100)])
        made.append(
            {
                "input_ids": torch.cat([ids, torch.full((padding,), PAD)]),
                "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros(padding, dtype=ids.dtype)]),
                "labels": labels,
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    seed_everything(0)
    trainer = Trainer(
        strategy=ZeroPPStrategy(num_microbatches=4),
        devices=2,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Causal()
    trainer.fit(model, DataLoader(rows(2048), batch_size=16))
    if trainer.is_global_zero:
        print(f"loss of the first step {model.losses[0]:.3f}, of the last {model.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
