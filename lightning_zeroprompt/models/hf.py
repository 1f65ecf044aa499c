# SPDX-License-Identifier: Apache-2.0
"""T5 checkpoints of ``transformers``: folders with config.json and safetensors, in and out, without importing it.

The two layouts differ in names and in that our projections of one input are one matrix (rows stacked). Two properties
are easy to get wrong, because ``transformers`` has changed how it stores them:

* *Is the head tied?* ``tie_word_embeddings`` said so until 4.x; 5.x writes ``true`` always and unties when the file
  holds a head that differs from the embedding. Read here from the weights: tied if there is no head or an equal one.
* *Is the head's input scaled?* 4.x: if ``tie_word_embeddings``; 5.x: ``scale_decoder_outputs``, which is derived from
  the former where it is absent. Read here in that order, and both keys are written.

So every saved model loads equal under 5.x, and under 4.x all but an untied *and* scaled one, which 4.x cannot express.
Alternative: build a ``transformers`` model and copy; it needs the import, and the memory of a second model.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_zeroprompt.models.t5 import T5, T5Config

__all__ = [
    "CheckpointError",
    "config_from_hf",
    "config_to_hf",
    "load_t5",
    "save_t5",
    "state_dict_from_hf",
    "state_dict_to_hf",
]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_REPEATED = (
    # Copies of shared.weight, and a bias that early checkpoints hold but no version reads.
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read; the message names the file, what is wrong, and the remedy."""


def config_from_hf(values: Mapping[str, Any], *, tie_head: bool) -> T5Config:
    """Translate the content of a ``transformers`` config.json.

    Args:
        values: The parsed file.
        tie_head: Whether the head shares the embedding's matrix; the weights decide, see the module's text.

    Returns:
        The sizes, with the file's dropout.

    Raises:
        CheckpointError: Another architecture, activation, or other special ids than T5's (pad 0, start 0, eos 1).
    """
    model_type = values.get("model_type")
    if model_type not in ("t5", "mt5"):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}; only 't5' and 'mt5' checkpoints have this architecture."
        )
    activation = values.get("feed_forward_proj", "relu")
    if activation not in ("relu", "gated-gelu"):
        raise CheckpointError(
            f"config.json: feed_forward_proj is {activation!r}; supported are 'relu' (T5 v1.0) and 'gated-gelu' (v1.1)."
        )
    for key, expected in (("pad_token_id", 0), ("decoder_start_token_id", 0), ("eos_token_id", 1)):
        if values.get(key, expected) not in (expected, None):
            raise CheckpointError(f"config.json: {key} is {values[key]}, but this package fixes it at {expected}.")
    try:
        return T5Config(
            vocab_size=values["vocab_size"],
            d_model=values["d_model"],
            d_kv=values["d_kv"],
            d_ff=values["d_ff"],
            num_heads=values["num_heads"],
            num_encoder_layers=values["num_layers"],
            num_decoder_layers=values.get("num_decoder_layers") or values["num_layers"],
            relative_buckets=values.get("relative_attention_num_buckets", 32),
            relative_max_distance=values.get("relative_attention_max_distance", 128),
            dropout=values.get("dropout_rate", 0.1),
            activation=activation,
            tie_head=tie_head,
            scale_decoder_outputs=values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True)),
            norm_eps=values.get("layer_norm_epsilon", 1e-6),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error.args[0]!r}; it is not a complete T5 configuration.") from None


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """Return the content of a ``transformers`` config.json.

    Raises:
        CheckpointError: The model has absolute positions, which T5 has not.
    """
    if config.absolute_positions:
        raise CheckpointError(
            "absolute_positions=True has no place in a T5 checkpoint; save the Lightning checkpoint instead."
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        "feed_forward_proj": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": 1.0,
        # 4.x scales exactly if this says tied; an unscaled tied head is therefore written as an untied, equal one.
        "tie_word_embeddings": config.scale_decoder_outputs,
        "scale_decoder_outputs": config.scale_decoder_outputs,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
    }


def state_dict_from_hf(weights: Mapping[str, Tensor], config: T5Config) -> dict[str, Tensor]:
    """Rename and stack the tensors of a ``transformers`` T5.

    Args:
        weights: Its state dict.
        config: From :func:`config_from_hf`.

    Returns:
        The state dict of :class:`~lightning_zeroprompt.models.t5.T5`.

    Raises:
        CheckpointError: A tensor is missing, superfluous or of another shape than the configuration says.
    """
    names = dict(_names(config))
    known = {theirs for group in names.values() for theirs in group}
    missing = sorted(known - weights.keys())
    superfluous = sorted(weights.keys() - known - {*_REPEATED, "lm_head.weight"})
    if missing or superfluous:
        raise CheckpointError(
            f"weights do not fit config.json ({config.num_encoder_layers} + {config.num_decoder_layers} layers, "
            f"{config.activation}): {len(missing)} missing {missing[:3]}, "
            f"{len(superfluous)} superfluous {superfluous[:3]}."
        )
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in T5(config).state_dict().items()}
    result = {}
    for name, group in names.items():
        parts = [weights[theirs] for theirs in group]
        result[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if result[name].shape != expected[name]:
            shapes = " + ".join(str(list(part.shape)) for part in parts)
            raise CheckpointError(
                f"{' + '.join(group)}: shape {shapes}, but config.json says {list(expected[name])} in total "
                f"(d_model={config.d_model}, d_kv={config.d_kv}, num_heads={config.num_heads}, d_ff={config.d_ff}, "
                f"vocab_size={config.vocab_size})."
            )
    return result


def state_dict_to_hf(weights: Mapping[str, Tensor], config: T5Config) -> dict[str, Tensor]:
    """Rename and split our tensors; the inverse of :func:`state_dict_from_hf`.

    Args:
        weights: The state dict of a :class:`~lightning_zeroprompt.models.t5.T5` (whole tensors, no shards).
        config: Its configuration.

    Returns:
        Contiguous tensors under the names of ``transformers``.

    Raises:
        CheckpointError: The model has tensors that a T5 checkpoint cannot hold, such as soft prompts.
    """
    names = dict(_names(config))
    foreign = sorted(weights.keys() - names.keys())
    if foreign:
        raise CheckpointError(f"a T5 checkpoint has no place for {foreign[:3]}; keep the Lightning checkpoint.")
    result = {}
    for name, group in names.items():
        rows = len(weights[name]) // len(group)
        for index, theirs in enumerate(group):
            result[theirs] = weights[name][index * rows : (index + 1) * rows].contiguous()
    if config.tie_head and not config.scale_decoder_outputs:
        result["lm_head.weight"] = result["shared.weight"].clone()
    return result


def load_t5(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **overrides: Any) -> T5:
    """Load a T5 from a local ``transformers`` checkpoint folder, whole or in shards.

    Args:
        folder: Holds config.json and model.safetensors, or model.safetensors.index.json and the files it names.
        dtype: Of the parameters; None keeps the file's.
        **overrides: Fields of :class:`~lightning_zeroprompt.models.t5.T5Config` that change no shape, such as
            ``dropout``.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        CheckpointError: A file is missing or broken, or the architecture is not supported.
    """
    folder = Path(folder)
    values = _read_json(folder / "config.json")
    weights = _read_weights(folder)
    head, embedding = weights.get("lm_head.weight"), weights.get("shared.weight")
    tied = head is None or (embedding is not None and torch.equal(head, embedding))
    config = dataclasses.replace(config_from_hf(values, tie_head=tied), **overrides)
    with torch.device("meta"):
        model = T5(config)
    model.load_state_dict(state_dict_from_hf(weights, config), assign=True)
    return model.to(dtype) if dtype is not None else model


def save_t5(model: T5, folder: str | os.PathLike[str], *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Save a T5 as a folder that ``transformers`` loads with ``from_pretrained``.

    Args:
        model: The model.
        folder: Made if missing; its config.json and model.safetensors are replaced.
        weights: The model's whole state dict, for a model whose parameters are sharded; None: ``model.state_dict()``.

    Raises:
        CheckpointError: The model has parts that a T5 checkpoint cannot hold.
    """
    folder = Path(folder)
    values = config_to_hf(model.config)
    tensors = state_dict_to_hf(model.state_dict() if weights is None else weights, model.config)
    values["dtype"] = str(tensors["shared.weight"].dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_WEIGHTS}.partial"
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(folder / _WEIGHTS)
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "config.json")


def _names(config: T5Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each of our tensors with the ``transformers`` tensors whose rows it stacks."""
    yield "shared.weight", ("shared.weight",)
    if not config.tie_head:
        yield "head.projection.weight", ("lm_head.weight",)
    gate_and_up = ("wi_0", "wi_1") if config.activation == "gated-gelu" else ("wi",)
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{stack}_bias.weight", (first,)
        norm = "encoder_norm.weight" if stack == "encoder" else "head.norm.weight"
        yield norm, (f"{stack}.final_layer_norm.weight",)
        for index in range(layers):
            ours, theirs = f"{stack}.{index}", f"{stack}.block.{index}.layer"
            self_attention = f"{theirs}.0.SelfAttention"
            yield f"{ours}.attention_norm.weight", (f"{theirs}.0.layer_norm.weight",)
            yield f"{ours}.attention.qkv.weight", tuple(f"{self_attention}.{part}.weight" for part in "qkv")
            yield f"{ours}.attention.o.weight", (f"{self_attention}.o.weight",)
            last = 1
            if stack == "decoder":
                last, cross = 2, f"{theirs}.1.EncDecAttention"
                yield f"{ours}.cross_norm.weight", (f"{theirs}.1.layer_norm.weight",)
                yield f"{ours}.cross_attention.q.weight", (f"{cross}.q.weight",)
                yield f"{ours}.cross_attention.kv.weight", (f"{cross}.k.weight", f"{cross}.v.weight")
                yield f"{ours}.cross_attention.o.weight", (f"{cross}.o.weight",)
            dense = f"{theirs}.{last}.DenseReluDense"
            yield f"{ours}.feed_forward_norm.weight", (f"{theirs}.{last}.layer_norm.weight",)
            yield f"{ours}.feed_forward.wi.weight", tuple(f"{dense}.{part}.weight" for part in gate_and_up)
            yield f"{ours}.feed_forward.wo.weight", (f"{dense}.wo.weight",)


def _read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the folder of a saved transformers T5.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch or save the checkpoint again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a JSON object.")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors, of one file or of the shards that an index names."""
    files = [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        listed = _read_json(folder / _INDEX).get("weight_map", {})
        files = [folder / name for name in sorted(set(listed.values()))]
    weights: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            remedy = "fetch all files of the checkpoint"
            if (folder / "pytorch_model.bin").is_file():
                remedy = (
                    "pytorch_model.bin is a pickle and is not read; save the model again with a recent transformers"
                )
            raise CheckpointError(f"{path} does not exist; {remedy}.")
        try:
            weights.update(load_file(path))
        except Exception as error:  # safetensors raises its own type, which is no subclass of anything useful
            raise CheckpointError(f"{path} cannot be read ({error}); fetch or save the checkpoint again.") from error
    return weights
