# SPDX-License-Identifier: Apache-2.0
"""A GPT of any size on the meta device, to have costs of a model that nobody has built yet.

Decoder layers as in GPT-3: norms in front, fused q, k, v, causal attention without a matrix of scores, an MLP of four
widths with GELU; an embedding in front, a norm, a head and the cross-entropy behind. Nothing is allocated; operations
and kept tensors are counted by ``profile_chain``, which is also how a user's own model is estimated.

Alternative: closed formulas (24 width^2 operations a token and layer, 34 widths of activations). They are another
model of the same thing, which has to be kept right beside the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_zeroprompt.pipeline.costs import Costs, Link
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.meters import Meter
from lightning_zeroprompt.pipeline.profiler import profile_chain

__all__ = ["GPT_SHAPES", "GptShape", "gpt_costs"]


@dataclass(frozen=True, slots=True)
class GptShape:
    """Of a GPT.

    Attributes:
        layers: Decoder layers, which are the pipeline's blocks.
        width: Of the residual stream.
        heads: Of attention; they divide the width.

    Raises:
        ValueError: If a number is below 1, or heads do not divide the width.
    """

    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} cannot be cut into {self.heads} heads; use a multiple of the heads")


GPT_SHAPES = {
    "125m": GptShape(12, 768, 12),
    "350m": GptShape(24, 1024, 16),
    "1.3b": GptShape(24, 2048, 32),
    "2.7b": GptShape(32, 2560, 32),
    "7b": GptShape(32, 4096, 32),
    "13b": GptShape(40, 5120, 40),
    "30b": GptShape(48, 7168, 56),
    "70b": GptShape(80, 8192, 64),
    "175b": GptShape(96, 12288, 96),
}
"""Shapes by name; those of GPT-3 (Brown et al. 2020, table 2.1) and OPT, and the layers and width of Llama 2 70B."""


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return y


class _Gpt(nn.Module):
    def __init__(self, shape: GptShape, vocabulary: int, sequence: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, shape.width), nn.Embedding(sequence, shape.width)
        self.layers = nn.Sequential(*(_Layer(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.layers(x)))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def gpt_costs(
    shape: GptShape,
    meter: Meter,
    *,
    message: Link,
    gather: Link | None = None,
    rows: int = 1,
    sequence: int = 2048,
    vocabulary: int = 50_304,
    dtype: torch.dtype = torch.bfloat16,
) -> Costs:
    """Costs of a GPT that has not been built.

    Args:
        shape: Its size.
        meter: Estimates; on the meta device.
        message: Between pipeline ranks.
        gather: Of gathers and reductions over data-parallel ranks; None is ``message``.
        rows: Of a micro-batch.
        sequence: Tokens of a row.
        vocabulary: Entries of the embedding and of the head.
        dtype: Of weights, gradients and activations; the optimizer's two moments are float32.

    Raises:
        ValueError: If a number is below 1.
    """
    for name, value in (("rows", rows), ("sequence", sequence), ("vocabulary", vocabulary)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    with torch.device(meter.device):
        model = _Gpt(shape, vocabulary, sequence).to(dtype)
        tokens = torch.zeros(rows, sequence, dtype=torch.int64)
    costs = profile_chain(find_chain(model), lambda: model(tokens), meter, message=message, gather=gather)
    # A stand-in for models of this size, whatever their classes are called.
    return replace(costs, model="")
