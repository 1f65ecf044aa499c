# SPDX-License-Identifier: Apache-2.0
"""The blocks a T5 is a list of: embedding, encoder layer, decoder layer, head.

Each is a module that can be placed alone, so that a pipeline can cut between any two. Sub-layers are pre-normalised and
residual: ``x + dropout(f(norm(x)))`` (Raffel et al. 2020; T5 v1.1 replaces ReLU with gated GELU, Shazeer 2020).
Projections of one input are one matrix (query, key and value; gate and up): fewer and larger products, because the step
of a small model is bound by launching kernels; checkpoints in other layouts are split and joined in
:mod:`lightning_zeroprompt.models.hf`.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_zeroprompt.models.attention import CrossAttention, OptionGroups, SelfAttention

__all__ = ["Activation", "DecoderLayer", "EncoderLayer", "FeedForward", "Head"]

Activation = Literal["gated-gelu", "relu"]
"""``gated-gelu``: T5 v1.1, GELU in its tanh approximation times a linear gate. ``relu``: T5 v1.0."""


class FeedForward(nn.Module):
    """Position-wise feed-forward network.

    Args:
        d_model: Width of the residual stream.
        d_ff: Hidden width.
        activation: See :data:`Activation`.
        dropout: Probability of dropping a hidden unit in training.
    """

    def __init__(self, d_model: int, d_ff: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.gated = activation == "gated-gelu"
        self.wi = nn.Linear(d_model, 2 * d_ff if self.gated else d_ff, bias=False)
        self.wo = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., d_model]`` to the same shape."""
        hidden = self.wi(x)
        if self.gated:
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = F.gelu(gate, approximate="tanh") * linear
        else:
            hidden = F.relu(hidden)
        out: Tensor = self.wo(self.dropout(hidden))
        return out


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, both directions.

    Args:
        d_model: Width of the residual stream.
        d_kv: Width of a head.
        d_ff: Hidden width of the feed-forward network.
        num_heads: Heads.
        activation: See :data:`Activation`.
        dropout: Probability.
        norm_eps: Added to the mean square in the normalisation.
    """

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        d_ff: int,
        num_heads: int,
        activation: Activation,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = SelfAttention(d_model, d_kv, num_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.feed_forward = FeedForward(d_model, d_ff, activation, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map ``[R, L, d_model]`` to the same shape; ``bias``: scores broadcastable to ``[R, heads, L, L]``, added."""
        x = x + self.dropout(self.attention(self.attention_norm(x), bias))
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward.

    Args:
        d_model: Width of the residual stream.
        d_kv: Width of a head.
        d_ff: Hidden width of the feed-forward network.
        num_heads: Heads.
        activation: See :data:`Activation`.
        dropout: Probability.
        norm_eps: Added to the mean square in the normalisation.
    """

    def __init__(
        self,
        d_model: int,
        d_kv: int,
        d_ff: int,
        num_heads: int,
        activation: Activation,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = SelfAttention(d_model, d_kv, num_heads, dropout)
        self.cross_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.cross_attention = CrossAttention(d_model, d_kv, num_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.feed_forward = FeedForward(d_model, d_ff, activation, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor, bias: Tensor, cross_mask: Tensor | None, groups: OptionGroups | None = None
    ) -> Tensor:
        """Run the layer on whole targets.

        Args:
            x: ``[R, Ld, d_model]``.
            memory: ``[B, Le, d_model]``, the encoder's output; B = R without ``groups``.
            bias: Additive causal scores broadcastable to ``[R, heads, Ld, Ld]``.
            cross_mask: Additive scores for the attention to ``memory``; None: attend to all of it.
            groups: See :class:`~lightning_zeroprompt.models.attention.OptionGroups`.

        Returns:
            The shape of ``x``.
        """
        x = x + self.dropout(self.attention(self.attention_norm(x), bias))
        key, value = self.cross_attention.project(memory)
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), key, value, cross_mask, groups))
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-attention's keys and values ``[B, heads, Le, d_kv]`` of ``memory`` ``[B, Le, d_model]``."""
        return self.cross_attention.project(memory)

    def step(
        self,
        x: Tensor,
        bias: Tensor,
        cache: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        cross_mask: Tensor | None,
        position: int,
    ) -> Tensor:
        """Run the layer on one new token.

        Args:
            x: ``[B, 1, d_model]``.
            bias: ``[1, heads, 1, position + 1]``.
            cache: Keys and values of the tokens so far, ``[B, heads, T, d_kv]``, written in place.
            memory: Keys and values of the encoder's output, ``[B, heads, Le, d_kv]``.
            cross_mask: As in :meth:`forward`.
            position: Index of the token, 0 first.

        Returns:
            ``[B, 1, d_model]``.
        """
        x = x + self.attention.step(self.attention_norm(x), bias, *cache, position)
        x = x + self.cross_attention(self.cross_norm(x), *memory, cross_mask)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Head(nn.Module):
    """Final normalisation of the decoder and projection to the vocabulary.

    Args:
        d_model: Width of the residual stream.
        vocab_size: Entries of the vocabulary.
        tied: Use the embedding's matrix, given at each call, instead of an own one.
        scale: Multiply the decoder's output by ``d_model ** -0.5`` first.
        dropout: Probability.
        norm_eps: Added to the mean square in the normalisation.
    """

    def __init__(
        self, d_model: int, vocab_size: int, *, tied: bool, scale: bool, dropout: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.factor = d_model**-0.5 if scale else None
        self.projection = None if tied else nn.Linear(d_model, vocab_size, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what is multiplied with the vocabulary's matrix: ``[..., d_model]``."""
        x = self.dropout(self.norm(x))
        return x if self.factor is None else x * self.factor

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map ``[..., d_model]`` to logits ``[..., vocab_size]``; ``embedding`` is used if the head is tied."""
        x = self.hidden(x)
        return F.linear(x, embedding) if self.projection is None else self.projection(x)
