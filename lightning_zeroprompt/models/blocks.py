# SPDX-License-Identifier: Apache-2.0
"""The blocks a T5 is a list of: embedding, encoder layer, decoder layer, head.

Each is a module that can be placed alone, so that a pipeline can cut between any two. Sub-layers are pre-normalised and
residual: ``x + dropout(f(norm(x)))`` (Raffel et al. 2020; T5 v1.1 replaces ReLU with gated GELU, Shazeer 2020).
Projections of one input are one matrix (query, key and value; gate and up): fewer and larger products, because the step
of a small model is bound by launching kernels; checkpoints in other layouts are split and joined in
:mod:`lightning_zeroprompt.models.hf`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_zeroprompt.models.attention import CrossAttention, OptionGroups, SelfAttention
from lightning_zeroprompt.models.t5_config import T5Config

__all__ = ["DecoderLayer", "EncoderLayer", "FeedForward", "Head"]


class FeedForward(nn.Module):
    """Position-wise feed-forward network.

    Args:
        config: Gives its widths, activation and dropout.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.activation == "gated-gelu"
        self.wi = nn.Linear(config.d_model, 2 * config.d_ff if self.gated else config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

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
        config: Gives its widths, heads, activation and dropout.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = SelfAttention(config.d_model, config.d_kv, config.num_heads, config.dropout)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map ``[R, L, d_model]`` to the same shape; ``bias``: scores broadcastable to ``[R, heads, L, L]``, added."""
        x = x + self.dropout(self.attention(self.attention_norm(x), bias))
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward.

    Args:
        config: Gives its widths, heads, activation and dropout.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        attention = (config.d_model, config.d_kv, config.num_heads, config.dropout)
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = SelfAttention(*attention)
        self.cross_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.cross_attention = CrossAttention(*attention)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

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
        config: Says whether the embedding's matrix, given at each call, is used instead of an own one (``tie_head``),
            and whether the decoder's output is multiplied by ``d_model ** -0.5`` first (``scale_decoder_outputs``).
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.factor = config.d_model**-0.5 if config.scale_decoder_outputs else None
        self.projection = None if config.tie_head else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what is multiplied with the vocabulary's matrix: ``[..., d_model]``."""
        x = self.dropout(self.norm(x))
        return x if self.factor is None else x * self.factor

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map ``[..., d_model]`` to logits ``[..., vocab_size]``; ``embedding`` is used if the head is tied."""
        x = self.hidden(x)
        return F.linear(x, embedding) if self.projection is None else self.projection(x)
