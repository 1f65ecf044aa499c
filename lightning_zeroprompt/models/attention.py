# SPDX-License-Identifier: Apache-2.0
"""T5's attention: relative position bias, segment masks, and multi-head attention on SDPA.

T5 adds to the attention scores a learned number per head and *bucket* of relative distance (Raffel et al. 2020, section
2.1), and does not scale the scores. The numbers are the same in all layers of a stack, so the model computes the ``[1,
heads, L, L]`` bias once per forward pass and hands it to every layer.

The bias is a Toeplitz matrix: it depends on the distance alone. Looking the bucket of every (query, key) pair up, as
other implementations do, makes the backward pass scatter L*L gradients into some 32 rows. Here only the 2L-1 distances
are looked up; :func:`toeplitz` lays them out with reshapes, whose backward pass is one dense sum.

Masks are *additive* and finite (:data:`MASKED`): a query with nothing to attend to (padding) gets a harmless average
and finite gradients where minus infinity would give NaN. Alternatives considered: boolean masks (SDPA converts them
again in each layer) and FlexAttention, which skips blocks of other segments but is fast only under ``torch.compile``;
the step benchmark has both. Cost: a mask of packed rows adds 0 to 3 % to an uncompiled step (H200, rows of 512).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MASKED",
    "CrossAttention",
    "OptionGroups",
    "RelativeBias",
    "SelfAttention",
    "compute_dtype",
    "relative_buckets",
    "segment_mask",
    "segment_positions",
    "toeplitz",
]

MASKED = -30000.0
"""Additive score of a pair that must not attend: its ``exp`` is 0, and two of them still fit into float16."""

_ALIGNMENT = 16
"""Elements to which SDPA's fused kernel wants the bias's rows aligned; otherwise it copies the bias in every layer."""


def relative_buckets(distances: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Map signed distances to buckets: exact for near tokens, logarithmic up to ``max_distance``, one bucket beyond.

    Args:
        distances: int64, any shape; position of the key minus position of the query, in tokens.
        bidirectional: Half of the buckets are for keys after the query (encoder). Otherwise those share bucket 0
            (decoder).
        num_buckets: Number of buckets.
        max_distance: First distance, in tokens, that lies in the last bucket.

    Returns:
        int64 in ``[0, num_buckets)``, same shape. Source: Raffel et al. 2020, section 2.1, in Mesh TensorFlow's
        formula.
    """
    if bidirectional:
        num_buckets //= 2
        offset = (distances > 0).long() * num_buckets
        distances = distances.abs()
    else:
        offset = torch.zeros_like(distances)
        distances = (-distances).clamp(min=0)
    num_exact = num_buckets // 2
    # The order of operations is Mesh TensorFlow's: another one rounds a few distances into the neighbouring bucket.
    scale = torch.log(distances.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (scale * (num_buckets - num_exact)).long()
    return offset + torch.where(distances < num_exact, distances, logarithmic.clamp(max=num_buckets - 1))


def toeplitz(values: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Lay values per distance out as a matrix per head: ``out[h, i, j] = values[h, j - i + num_queries - 1]``.

    Args:
        values: ``[heads, num_queries + num_keys - 1]``, for distances ``-(num_queries - 1) .. num_keys - 1``.
        num_queries: Rows.
        num_keys: Columns.

    Returns:
        ``[heads, num_queries, num_keys]``, contiguous. Built by repeating the values and reading them back with rows
        one shorter than they were written, so that each row starts one distance earlier.
    """
    heads, period = values.shape[0], num_queries + num_keys
    flat = F.pad(values, (0, 1)).unsqueeze(1).expand(-1, num_queries, -1).reshape(heads, num_queries * period)
    start, row = num_queries - 1, period - 1
    return flat[:, start : start + num_queries * row].view(heads, num_queries, row)[:, :, :num_keys].contiguous()


class RelativeBias(nn.Module):
    """The learned relative position bias of one stack.

    Args:
        num_heads: Attention heads.
        num_buckets: Buckets of :func:`relative_buckets`.
        max_distance: Tokens; see :func:`relative_buckets`.
        bidirectional: True for an encoder, False for a decoder (whose keys after the query are masked as well).
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))

    def forward(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return the additive bias ``[1, heads, length, length]`` in ``dtype``; causal unless bidirectional."""
        padded = -(-length // _ALIGNMENT) * _ALIGNMENT
        distances = torch.arange(1 - length, padded, device=self.weight.device)
        buckets = relative_buckets(
            distances, bidirectional=self.bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        values = F.embedding(buckets, self.weight)
        if not self.bidirectional:
            values = values.masked_fill((distances > 0).unsqueeze(1), MASKED)
        return toeplitz(values.to(dtype).t(), length, padded)[:, :, :length].unsqueeze(0)


def segment_mask(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask ``[R, 1, Lq, Lk]`` that keeps packed examples apart.

    Args:
        queries: ``[R, Lq]`` integer segment numbers, 0 = padding.
        keys: ``[R, Lk]`` segment numbers of the keys.
        dtype: Floating dtype of the result.

    Returns:
        0 where the segments are equal (padding attends to padding, whose output nobody uses), :data:`MASKED` elsewhere.
    """
    allowed = queries.unsqueeze(2) == keys.unsqueeze(1)
    return torch.zeros(allowed.shape, dtype=dtype, device=keys.device).masked_fill(~allowed, MASKED).unsqueeze(1)


def segment_positions(segments: Tensor) -> Tensor:
    """Return each token's position (int64, ``[R, L]``) within its run of equal segment numbers ``[R, L]``."""
    index = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which attention will run: autocast's where it is on, else that of ``weight``."""
    device = weight.device.type
    if device == "meta":
        # Nothing runs there, and asking for its autocast is an error.
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class OptionGroups(NamedTuple):
    """Which rows of a decoder batch share one encoder row: N answer options of B examples, at most S an example.

    Attributes:
        gather: ``[B, S]`` int64, the row of each example's s-th option; rows past its last option repeat row 0.
        scatter: ``[N]`` int64, where each option stands in the flattened ``gather``.
    """

    gather: Tensor
    scatter: Tensor

    @staticmethod
    def from_examples(option_example: Tensor, num_examples: int) -> "OptionGroups":
        """Group sorted example numbers.

        Args:
            option_example: ``[N]`` int64, sorted, the example of each option.
            num_examples: B.

        Raises:
            ValueError: The numbers are not sorted, or not all in ``[0, num_examples)``.
        """
        if option_example.numel() == 0:
            raise ValueError("option_example is empty: there are no options to score; leave such batches out.")
        first, last = int(option_example[0]), int(option_example[-1])
        if first < 0 or last >= num_examples or bool((option_example[1:] < option_example[:-1]).any()):
            raise ValueError(
                f"option_example must be sorted and in [0, {num_examples}), one number a row of the encoder batch, but "
                f"runs from {first} to {last}; sort the options by example."
            )
        counts = torch.bincount(option_example, minlength=num_examples)
        slots = int(counts.max())
        rank = (
            torch.arange(len(option_example), device=option_example.device)
            - (counts.cumsum(0) - counts)[option_example]
        )
        scatter = option_example * slots + rank
        gather = torch.zeros(num_examples * slots, dtype=torch.int64, device=option_example.device)
        gather[scatter] = torch.arange(len(option_example), device=option_example.device)
        return OptionGroups(gather.view(num_examples, slots), scatter)


def _heads(x: Tensor, parts: int, num_heads: int) -> Sequence[Tensor]:
    """Cut ``[R, L, parts * heads * d]`` into ``parts`` views ``[R, heads, L, d]``."""
    return x.view(*x.shape[:2], parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        d_model: Width of the residual stream.
        d_kv: Width of a head.
        num_heads: Heads.
        dropout: Probability of dropping an attention weight in training.
    """

    def __init__(self, d_model: int, d_kv: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * num_heads * d_kv, bias=False)
        self.o = nn.Linear(num_heads * d_kv, d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend within rows.

        Args:
            x: ``[R, L, d_model]``.
            bias: Additive scores broadcastable to ``[R, heads, L, L]``.

        Returns:
            ``[R, L, d_model]``.
        """
        query, key, value = _heads(self.qkv(x), 3, self.num_heads)
        return self._output(query, key, value, bias)

    def step(self, x: Tensor, bias: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """Attend from one new token to all tokens so far and store its key and value.

        Args:
            x: ``[B, 1, d_model]``.
            bias: ``[1, heads, 1, position + 1]``.
            keys: ``[B, heads, T, d_kv]``, written at ``position``.
            values: Like ``keys``.
            position: Index of the token, 0 first.

        Returns:
            ``[B, 1, d_model]``.
        """
        query, key, value = _heads(self.qkv(x), 3, self.num_heads)
        keys[:, :, position : position + 1] = key
        values[:, :, position : position + 1] = value
        return self._output(query, keys[:, :, : position + 1], values[:, :, : position + 1], bias)

    def _output(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class CrossAttention(nn.Module):
    """Multi-head attention from the decoder to the encoder's output; it has no position bias.

    Args:
        d_model: Width of the residual stream.
        d_kv: Width of a head.
        num_heads: Heads.
        dropout: Probability of dropping an attention weight in training.
    """

    def __init__(self, d_model: int, d_kv: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(d_model, num_heads * d_kv, bias=False)
        self.kv = nn.Linear(d_model, 2 * num_heads * d_kv, bias=False)
        self.o = nn.Linear(num_heads * d_kv, d_model, bias=False)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, heads, Le, d_kv]`` of the encoder's output ``[B, Le, d_model]``."""
        key, value = _heads(self.kv(memory), 2, self.num_heads)
        return key, value

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, groups: OptionGroups | None = None
    ) -> Tensor:
        """Attend to the encoder's output.

        Args:
            x: ``[R, Ld, d_model]``; with ``groups``, ``[N, T, d_model]``.
            key: ``[B, heads, Le, d_kv]`` from :meth:`project`; B = R without ``groups``.
            value: Like ``key``.
            mask: Additive, broadcastable to ``[B, heads, Ld, Le]``; None: attend to everything.
            groups: Lets N options read the keys and values of their B examples without a copy: their queries stand one
                after another in the example's row, which is the same computation because there is no position bias.

        Returns:
            The shape of ``x``.
        """
        (query,) = _heads(self.q(x), 1, self.num_heads)
        if groups is not None:
            query = query[groups.gather].transpose(1, 2).flatten(2, 3)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)
        out = out.transpose(1, 2).flatten(2)
        if groups is not None:
            out = out.reshape(groups.gather.numel(), -1, out.shape[-1])[groups.scatter]
        projected: Tensor = self.o(out)
        return projected
