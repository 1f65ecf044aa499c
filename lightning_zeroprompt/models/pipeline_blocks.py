# SPDX-License-Identifier: Apache-2.0
"""A T5 as blocks in a row, for a pipeline: embedding, encoder layers, boundary, decoder layers, head.

Each block holds the T5's own submodules and runs the T5's own code on them, so that one process and a pipeline compute
the same and parameters keep their names. What travels from block to block is the encoder's stream first; behind the
boundary the encoder's output and the decoder's stream, since every decoder layer reads the former; then the decoder's
stream alone. Token ids and segments do not travel: every stage has the batch. Nor do attention scores: each stage makes
them once a micro-batch from its copy of the bias tables, and the copies' gradients are summed.

Sending the scores along instead would cost ``heads x L x L`` numbers a row and message, several times the stream.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_zeroprompt.models.blocks import DecoderLayer
from lightning_zeroprompt.models.t5 import T5
from lightning_zeroprompt.pipeline.chain import StageMemo
from lightning_zeroprompt.pipeline.partition import module_cost

__all__ = ["pipeline_blocks"]

_TARGET_SHARE = 0.25
"""Decoder positions an encoder position; the data module's rows have 512 and 128."""

_Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class _Inputs(NamedTuple):
    """The arguments of :meth:`T5.forward`."""

    input_ids: Tensor
    decoder_input_ids: Tensor
    input_segments: Tensor | None = None
    decoder_segments: Tensor | None = None
    task_ids: Tensor | None = None


def _given(call: _Call) -> _Inputs:
    return _Inputs(*call[0], **call[1])


class _Block(nn.Module):
    """Some submodules of a T5.

    Args:
        model: The T5, which is no submodule of the block.
        parts: Its submodules that the block uses; None where the model has none.

    Attributes:
        pipeline_cost: Work of the block, in parameters multiplied an encoder position.
    """

    def __init__(self, model: T5, *parts: nn.Module | None, cost: float = 0.0) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        self.parts = nn.ModuleList(part for part in parts if part is not None)
        self.pipeline_cost = cost

    @property
    def model(self) -> T5:
        """The T5."""
        model: T5 = self.__dict__["_model"]
        return model


class _EncoderStart(_Block):
    def forward(self, *args: Any, inputs: _Call, **kwargs: Any) -> Tensor:
        given = _given(inputs)
        return self.model.embed_inputs(given.input_ids, given.input_segments, given.task_ids)


class _EncoderBlock(_Block):
    def forward(self, x: Tensor, *, inputs: _Call, memo: StageMemo) -> Tensor:
        scores = memo.once("encoder", lambda: self.model.encoder_scores(x, _given(inputs).input_segments))
        out: Tensor = self.parts[0](x, scores)
        return out


class _DecoderStart(_Block):
    def forward(self, x: Tensor, *, inputs: _Call) -> tuple[Tensor, Tensor]:
        given = _given(inputs)
        return self.model.end_encoder(x), self.model.embed_targets(given.decoder_input_ids, given.decoder_segments)


class _DecoderBlock(_Block):
    def __init__(self, model: T5, layer: nn.Module) -> None:
        super().__init__(model, layer, model.decoder_bias, cost=_decoder_cost(layer))
        # Asked here: compilers do not see that a module is the same one by two names.
        self.is_last = layer is model.decoder[-1]

    def forward(self, memory: Tensor, x: Tensor, *, inputs: _Call, memo: StageMemo) -> tuple[Tensor, Tensor] | Tensor:
        def scores() -> tuple[Tensor, Tensor | None]:
            given = _given(inputs)
            return self.model.decoder_scores(x, given.input_segments, given.decoder_segments)

        bias, cross_mask = memo.once("decoder", scores)
        x = self.parts[0](x, memory, bias, cross_mask)
        # Nothing behind the last layer reads the encoder's output.
        return x if self.is_last else (memory, x)


class _Head(_Block):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.head(x, self.model.shared.weight)
        return logits


def pipeline_blocks(model: T5) -> list[nn.Module]:
    """The blocks of a T5 in order; what the last returns for the T5's arguments is what the T5 returns.

    Args:
        model: Its submodules are used as they are; it is not changed.

    Returns:
        As many blocks as layers, and three.
    """
    config = model.config
    head_parts = (model.head, model.shared) if config.tie_head else (model.head,)
    head_cost = _TARGET_SHARE * config.d_model * config.vocab_size
    return [
        _EncoderStart(model, model.shared, model.soft_prompt, model.encoder_positions),
        *(_EncoderBlock(model, layer, model.encoder_bias, cost=module_cost(layer)) for layer in model.encoder),
        _DecoderStart(model, model.encoder_norm, model.shared, model.decoder_positions),
        *(_DecoderBlock(model, layer) for layer in model.decoder),
        _Head(model, *head_parts, cost=head_cost),
    ]


def _decoder_cost(layer: nn.Module) -> float:
    if not isinstance(layer, DecoderLayer):
        raise TypeError(f"{type(layer).__name__} is no DecoderLayer")
    # Keys and values of the encoder's output are made for all of its positions.
    memory = module_cost(layer.cross_attention.kv)
    return memory + _TARGET_SHARE * (module_cost(layer) - memory)
