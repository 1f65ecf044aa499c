# SPDX-License-Identifier: Apache-2.0
"""T5's sizes: the numbers that fix a model, checked, and the named presets.

From *small* on the presets are the released T5 v1.1 sizes (Raffel et al. 2020); the three below them train on a laptop
in minutes. A head is tied to the embedding and scaled unless asked otherwise, because in small models the vocabulary is
most of the parameters; the released v1.1 checkpoints are neither, and their config.json says so.
"""

import dataclasses
from typing import Any, Literal

__all__ = ["Activation", "T5Config"]

Activation = Literal["gated-gelu", "relu"]
"""``gated-gelu``: T5 v1.1, GELU in its tanh approximation times a linear gate. ``relu``: T5 v1.0."""

_PRESETS = {
    # name: d_model, d_kv, d_ff, heads, layers of each stack
    "nano": (64, 16, 128, 4, 2),
    "tiny": (128, 32, 384, 4, 3),
    "mini": (256, 64, 1024, 4, 4),
    "small": (512, 64, 1024, 6, 8),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 16, 24),
    "xl": (2048, 64, 5120, 32, 24),
    "xxl": (4096, 64, 10240, 64, 24),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Everything that fixes the parameters' shapes and the function they compute.

    Attributes:
        vocab_size: Entries of the vocabulary.
        d_model: Width of the residual stream.
        d_kv: Width of an attention head.
        d_ff: Hidden width of the feed-forward networks.
        num_heads: Attention heads.
        num_encoder_layers: Encoder layers.
        num_decoder_layers: Decoder layers.
        relative_buckets: Buckets of the relative position bias.
        relative_max_distance: Distance, in tokens, from which all share the last bucket.
        dropout: Probability, everywhere T5 drops.
        activation: ``gated-gelu`` (v1.1) or ``relu`` (v1.0).
        tie_head: The head shares the embedding's matrix.
        scale_decoder_outputs: Multiply the head's input by ``d_model ** -0.5`` (v1.0; not the released v1.1).
        norm_eps: Added to the mean square in the normalisation.
        absolute_positions: Add learned positions within each packed example to the embeddings. Not T5; very small
            models copy and count much better with them.
        max_positions: Number of learned positions; tokens beyond share the last one.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout: float = 0.0
    activation: Activation = "gated-gelu"
    tie_head: bool = True
    scale_decoder_outputs: bool = True
    norm_eps: float = 1e-6
    absolute_positions: bool = False
    max_positions: int = 512

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A size is not positive, the buckets don't divide, or the activation is unknown.
        """
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError(
                f"relative_buckets={self.relative_buckets}: must be a multiple of 4 (half for each direction, "
                "half of those exact); T5 uses 32."
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_max_distance={self.relative_max_distance} must exceed the exact buckets, "
                f"relative_buckets / 2 = {self.relative_buckets // 2}; T5 uses 128."
            )
        if self.activation not in ("gated-gelu", "relu"):
            raise ValueError(f"activation={self.activation!r}: use 'gated-gelu' (T5 v1.1) or 'relu' (T5 v1.0).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1).")

    @classmethod
    def preset(cls, name: str, vocab_size: int, **overrides: Any) -> "T5Config":
        """Return a named size.

        Args:
            name: nano (0.2M parameters without a large vocabulary), tiny (2M), mini (10M), or a released size: small,
                base, large, xl, xxl.
            vocab_size: Entries of the vocabulary.
            **overrides: Any other field.

        Raises:
            ValueError: The name or a field is unknown.
        """
        if name not in _PRESETS:
            raise ValueError(
                f"unknown T5 size {name!r}; known sizes: {', '.join(_PRESETS)}, or give the numbers to T5Config."
            )
        unknown = set(overrides) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown T5Config fields {sorted(unknown)}.")
        d_model, d_kv, d_ff, num_heads, layers = _PRESETS[name]
        numbers: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "d_kv": d_kv,
            "d_ff": d_ff,
            "num_heads": num_heads,
            "num_encoder_layers": layers,
            "num_decoder_layers": layers,
        }
        return cls(**(numbers | overrides))
