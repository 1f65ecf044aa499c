# SPDX-License-Identifier: Apache-2.0
"""T5 as a list of blocks in plain PyTorch: forward pass over packed rows, greedy generation, scoring of options.

The architecture is T5 v1.1's (Raffel et al. 2020; Shazeer 2020): RMSNorm without bias, relative position bias shared by
the layers of a stack, unscaled attention, gated GELU. ``relu`` gives T5 v1.0. Whether the head shares the embedding's
matrix and whether its input is scaled are separate, explicit fields: released checkpoints mix them.

*Packed rows.* Several examples lie in one row, numbered by ``segments`` (0 = padding), and attend only within
themselves. Relative distances need no care, since an example is contiguous. Without segments no mask is built at all.

*Options.* :meth:`T5.option_logprobs` scores all answer options of a batch with one encoder pass; options of one example
read the same encoder keys and values, without a copy (see
:class:`~lightning_zeroprompt.models.attention.OptionGroups`).

*Weights.* :meth:`T5.init_weights` seeds every tensor by its name, so a model built on the meta device, a shard of one,
or one stage of a pipeline gets the same weights as the whole model built at once. Cost: the draws run on the CPU, 55M
parameters a second on one core.

*Speed.* A bf16 training step on one H200 (``benchmarks/t5_step.py``, unpacked) does 1.9 to 2.0 times the tokens/s of
``transformers``' T5 at 0.43 to 0.53 of its memory, and 2.5 to 3.0 times when compiled whole.
A CPU has no fused kernel for a learned bias: short rows are fastest there (nano, one core: 51,000 tokens/s in rows of
64, 27,000 in rows of 256).
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_zeroprompt.models.attention import (
    MASKED,
    OptionGroups,
    RelativeBias,
    compute_dtype,
    segment_mask,
    segment_positions,
)
from lightning_zeroprompt.models.blocks import DecoderLayer, EncoderLayer, Head
from lightning_zeroprompt.models.soft_prompt import SoftPrompt
from lightning_zeroprompt.models.t5_config import T5Config

__all__ = ["T5", "T5Config"]

_LOGITS_AT_ONCE = 2**25
"""Logits that scoring options holds at a time: 128 MiB in float32."""


class T5(nn.Module):
    """A T5 encoder-decoder.

    Args:
        config: Its sizes.
        seed: Seed of :meth:`init_weights`. Ignored on the meta device: call ``to_empty`` and :meth:`init_weights`
            later.
        soft_prompt: Optional learned prompts, put into the encoder's embeddings.
    """

    def __init__(self, config: T5Config, *, seed: int = 0, soft_prompt: SoftPrompt | None = None) -> None:
        super().__init__()
        self.config = config
        bias = (config.num_heads, config.relative_buckets, config.relative_max_distance)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.soft_prompt = soft_prompt
        positions = config.absolute_positions
        self.encoder_positions = nn.Embedding(config.max_positions, config.d_model) if positions else None
        self.decoder_positions = nn.Embedding(config.max_positions, config.d_model) if positions else None
        self.encoder_bias = RelativeBias(*bias, bidirectional=True)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.encoder_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.decoder_bias = RelativeBias(*bias, bidirectional=False)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.head = Head(config)
        self.dropout = nn.Dropout(config.dropout)
        if not self.shared.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all parameters anew and clear buffers, in place, on any device, sharded (DTensor) or whole.

        The standard deviations are Mesh TensorFlow's (as in ``transformers``), but an untied head, and an embedding
        tied to an unscaled head, get ``d_model ** -0.5``, so that first logits are of order 1. Each tensor has its own
        generator, seeded by ``seed`` and the tensor's name, and is drawn in float32 on the CPU.

        Args:
            seed: Any integer.
        """
        config = self.config
        inner = config.num_heads * config.d_kv
        query, narrow = (config.d_model * config.d_kv) ** -0.5, config.d_model**-0.5
        stds: dict[str, list[tuple[int, float]]] = {
            "qkv.weight": [(inner, query), (2 * inner, narrow)],
            "q.weight": [(inner, query)],
            "o.weight": [(config.d_model, inner**-0.5)],
            "wo.weight": [(config.d_model, config.d_ff**-0.5)],
            "shared.weight": [
                (config.vocab_size, narrow if config.tie_head and not config.scale_decoder_outputs else 1.0)
            ],
        }
        for buffer in self.buffers():
            # ``to_empty`` leaves soft prompts' buffers undefined.
            buffer.zero_()
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)
            whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parts = stds.get(".".join(name.split(".")[-2:]), [(whole.shape[0], narrow)])
            for rows, (_, std) in zip(torch.split(whole, [rows for rows, _ in parts]), parts, strict=True):
                rows.normal_(std=std, generator=generator)
            if isinstance(parameter, DTensor):
                # Every rank has drawn the same tensor: no source rank, nothing is sent.
                local = whole.to(parameter.device, parameter.dtype)
                parameter.copy_(
                    distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
                )
            else:
                parameter.copy_(whole)

    def compile_blocks(self, **options: Any) -> None:
        """Compile every layer in place, with fixed shapes (``torch.compile``).

        Layers of a stack share one compiled graph, so this costs seconds where compiling the whole model costs minutes,
        and names in the state dict stay as they are. Each new shape is compiled anew: run evaluation, whose shapes
        vary, under ``torch.compiler.set_stance("force_eager")``.
        """
        for layer in (*self.encoder, *self.decoder):
            layer.compile(dynamic=False)

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        *,
        input_segments: Tensor | None = None,
        decoder_segments: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the next token at every decoder position.

        Args:
            input_ids: ``[R, Le]`` int64; ids of soft prompt positions included, if the model has one.
            decoder_input_ids: ``[R, Ld]`` int64, the targets shifted right by a pad token.
            input_segments: ``[R, Le]`` int, the example of each token, 0 = padding. None: a row is one example, no
                padding.
            decoder_segments: ``[R, Ld]`` int, the same numbers.
            task_ids: ``[R, Le]`` int, see :class:`~lightning_zeroprompt.models.soft_prompt.SoftPrompt`.

        Returns:
            ``[R, Ld, vocab_size]``.

        Raises:
            ValueError: Only one of the two segments is given.
        """
        if (input_segments is None) != (decoder_segments is None):
            given = "decoder_segments" if input_segments is None else "input_segments"
            raise ValueError(f"only {given} is given; packed rows need the segments of both sides, plain rows neither.")
        memory = self.encode(input_ids, input_segments, task_ids)
        return self.decode(decoder_input_ids, memory, memory_segments=input_segments, decoder_segments=decoder_segments)

    def encode(self, input_ids: Tensor, input_segments: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        """Return the encoder's output ``[R, Le, d_model]``; arguments as in :meth:`forward`."""
        x = self.embed_inputs(input_ids, input_segments, task_ids)
        bias = self.encoder_scores(x, input_segments)
        for layer in self.encoder:
            x = layer(x, bias)
        return self.end_encoder(x)

    def embed_inputs(self, input_ids: Tensor, input_segments: Tensor | None, task_ids: Tensor | None) -> Tensor:
        """Return what the first encoder layer is given, ``[R, Le, d_model]``; arguments as in :meth:`forward`."""
        if self.soft_prompt is None:
            x = self.shared(input_ids)
        else:
            x = self.soft_prompt(input_ids, self.shared, task_ids, input_segments)
        embedded: Tensor = self.dropout(self._add_positions(x, self.encoder_positions, input_segments))
        return embedded

    def encoder_scores(self, x: Tensor, input_segments: Tensor | None) -> Tensor:
        """Return the additive scores of all encoder layers, ``[R or 1, heads, Le, Le]``, for ``x`` ``[R, Le, d]``."""
        bias: Tensor = self.encoder_bias(x.shape[1], compute_dtype(x))
        if input_segments is None:
            return bias
        return bias + segment_mask(input_segments, input_segments, bias.dtype)

    def end_encoder(self, x: Tensor) -> Tensor:
        """Return the encoder's output for the last encoder layer's, both ``[R, Le, d_model]``."""
        memory: Tensor = self.dropout(self.encoder_norm(x))
        return memory

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        *,
        memory_segments: Tensor | None = None,
        decoder_segments: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``[R, Ld, vocab_size]``.

        Args:
            decoder_input_ids: ``[R, Ld]`` int64.
            memory: ``[R, Le, d_model]`` from :meth:`encode`.
            memory_segments: ``[R, Le]``, the encoder's segments. Without ``decoder_segments`` only its padding counts.
            decoder_segments: ``[R, Ld]``. None: each row is one example, padding only at its end.
        """
        x = self._decoder_hidden(decoder_input_ids, memory, memory_segments, decoder_segments, None)
        logits: Tensor = self.head(x, self.shared.weight)
        return logits

    def option_logprobs(
        self, memory: Tensor, memory_segments: Tensor | None, option_labels: Tensor, option_example: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score answer options, all options of an example on one encoder pass.

        Args:
            memory: ``[B, Le, d_model]``, one example a row.
            memory_segments: ``[B, Le]``, 0 = padding; None: no padding.
            option_labels: ``[N, T]`` int64, -100 = padding at the end; the options' tokens with their final eos.
            option_example: ``[N]`` int64, sorted: the row of ``memory`` each option belongs to.

        Returns:
            The sum of the tokens' log-probabilities ``[N]`` (float32, nats) and the number of tokens ``[N]`` (int64).

        Raises:
            ValueError: ``option_example`` is empty, unsorted or out of range.
        """
        groups = OptionGroups.from_examples(option_example, memory.shape[0])
        x = self._decoder_hidden(_shift_right(option_labels), memory, memory_segments, None, groups)
        real = option_labels != -100
        hidden, targets = x[real], option_labels[real]
        # Logits of all options at once would be the largest tensor of an evaluation.
        rows = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        losses = [
            F.cross_entropy(self.head(part, self.shared.weight).float(), part_targets, reduction="none")
            for part, part_targets in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        ]
        # Under precision "bf16-true" and "64-true" the default dtype is not float32.
        logprobs = torch.zeros(option_labels.shape, dtype=torch.float32, device=x.device)
        logprobs[real] = -torch.cat(losses)
        return logprobs.sum(1), real.sum(1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        input_segments: Tensor | None = None,
        max_new_tokens: int = 64,
        *,
        task_ids: Tensor | None = None,
        memory: Tensor | None = None,
        eos_id: int = 1,
        pad_id: int = 0,
        stop_early: bool = True,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Decode greedily, or as ``choose`` says, one example a row, keys and values cached.

        Args:
            input_ids: ``[B, Le]`` int64.
            input_segments: ``[B, Le]``, 1 = token, 0 = padding; None: no padding.
            max_new_tokens: Limit of the result's length.
            task_ids: ``[B, Le]``, see :meth:`forward`.
            memory: The encoder's output for these inputs, where it is known already.
            eos_id: Ends a row.
            pad_id: Starts the decoder, and fills rows after their end.
            stop_early: Stop when all rows have ended. Ranks that share a sharded model must not: each step gathers
                weights, which all ranks have to do equally often.
            choose: Picks the next tokens, ``[B]`` int64, from logits ``[B, vocab_size]``; the likeliest when None.

        Returns:
            ``[B, T]`` int64, T <= max_new_tokens: without the start token, eos included where a row has ended.

        Raises:
            ValueError: ``max_new_tokens`` is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1.")
        if memory is None:
            memory = self.encode(input_ids, input_segments, task_ids)
        layers = [layer for layer in self.decoder if isinstance(layer, DecoderLayer)]
        projected = [layer.project_memory(memory) for layer in layers]
        batch, config = len(memory), self.config
        cache = projected[0][0].new_zeros(len(layers), 2, batch, config.num_heads, max_new_tokens, config.d_kv)
        bias = self.decoder_bias(max_new_tokens, cache.dtype)
        cross_mask = None if input_segments is None else _padding_mask(input_segments, cache.dtype)
        tokens = torch.full((batch, max_new_tokens), pad_id, dtype=torch.int64, device=memory.device)
        last = torch.full((batch,), pad_id, dtype=torch.int64, device=memory.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=memory.device)
        for position in range(max_new_tokens):
            x = self.embed_targets(last.unsqueeze(1), None, position)
            row = bias[:, :, position : position + 1, : position + 1]
            for index, layer in enumerate(layers):
                x = layer.step(x, row, (cache[index, 0], cache[index, 1]), projected[index], cross_mask, position)
            logits: Tensor = self.head(x[:, 0], self.shared.weight)
            last = (logits.argmax(-1) if choose is None else choose(logits)).masked_fill(ended, pad_id)
            tokens[:, position] = last
            ended |= last == eos_id
            if stop_early and bool(ended.all()):
                return tokens[:, : position + 1]
        return tokens

    def _decoder_hidden(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        memory_segments: Tensor | None,
        decoder_segments: Tensor | None,
        groups: OptionGroups | None,
    ) -> Tensor:
        """Return the last decoder layer's output ``[R, Ld, d_model]``, before the head's normalisation."""
        x = self.embed_targets(decoder_input_ids, decoder_segments)
        bias, cross_mask = self.decoder_scores(x, memory_segments, decoder_segments)
        for layer in self.decoder:
            x = layer(x, memory, bias, cross_mask, groups)
        return x

    def decoder_scores(
        self, x: Tensor, memory_segments: Tensor | None, decoder_segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the additive scores of all decoder layers: self-attention's, and those to the encoder's output.

        Args:
            x: ``[R, Ld, d_model]``.
            memory_segments: As in :meth:`decode`.
            decoder_segments: As in :meth:`decode`.
        """
        bias: Tensor = self.decoder_bias(x.shape[1], compute_dtype(x))
        cross_mask = None
        if decoder_segments is not None:
            bias = bias + segment_mask(decoder_segments, decoder_segments, bias.dtype)
            if memory_segments is not None:
                cross_mask = segment_mask(decoder_segments, memory_segments, bias.dtype)
        elif memory_segments is not None:
            cross_mask = _padding_mask(memory_segments, bias.dtype)
        return bias, cross_mask

    def embed_targets(self, ids: Tensor, segments: Tensor | None, start: int = 0) -> Tensor:
        """Embed decoder tokens ``[R, Ld]`` whose first stands at position ``start``: ``[R, Ld, d_model]``."""
        x: Tensor = self.dropout(self._add_positions(self.shared(ids), self.decoder_positions, segments, start))
        return x

    def _add_positions(self, x: Tensor, table: nn.Module | None, segments: Tensor | None, start: int = 0) -> Tensor:
        """Add learned positions within each example, where the model has them."""
        if table is None:
            return x
        index = torch.arange(start, start + x.shape[1], device=x.device)
        positions = index if segments is None else segment_positions(segments)
        embedded: Tensor = x + table(positions.clamp(max=self.config.max_positions - 1))
        return embedded


def _shift_right(labels: Tensor, pad_id: int = 0) -> Tensor:
    """Return decoder inputs for labels ``[N, T]``: a pad token, then all labels but the last; -100 becomes padding."""
    return F.pad(labels[:, :-1], (1, 0), value=pad_id).masked_fill(F.pad(labels[:, :-1], (1, 0)) == -100, pad_id)


def _padding_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask ``[B, 1, 1, Le]`` of padding in the encoder's output."""
    mask = torch.zeros(segments.shape, dtype=dtype, device=segments.device).masked_fill(segments == 0, MASKED)
    return mask[:, None, None]
