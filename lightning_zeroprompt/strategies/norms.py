# SPDX-License-Identifier: Apache-2.0
"""Clipping, and ``lightning.pytorch.utilities.grad_norm``, of a model that is cut over a pipeline.

Lightning's documentation has users call it in ``on_before_optimizer_step`` and log what it returns. A rank holds some
of the gradients, or shards of them; names would differ from rank to rank. While a pipeline trains, the function is made
to ask the pipeline about modules that are part of it, on all of its ranks. It is a function that user code has
imported, perhaps long before: so it is its code that is exchanged, and put back.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.grads import grad_norm
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_zeroprompt.pipeline.pipeline import Pipeline

__all__ = ["clip_whole", "whole_grad_norm", "whole_grad_norms"]

_CODE = grad_norm.__code__
_LIGHTNINGS = types.FunctionType(_CODE, grad_norm.__globals__, "grad_norm", grad_norm.__defaults__)
_training: list[Pipeline] = []


def _exchanged(module: Any, norm_type: Any, group_separator: str = "/") -> Any:
    from lightning_zeroprompt.strategies.norms import whole_grad_norm

    return whole_grad_norm(module, norm_type, group_separator)


@contextmanager
def whole_grad_norms(pipeline: Pipeline) -> Iterator[None]:
    """Let Lightning's ``grad_norm`` see all gradients of a model; all ranks of the pipeline have to call it then."""
    _training.append(pipeline)
    grad_norm.__code__ = _exchanged.__code__
    try:
        yield
    finally:
        _training.remove(pipeline)
        if not _training:
            grad_norm.__code__ = _CODE


def clip_whole(plugin: Precision, pipeline: Pipeline) -> None:
    """Let a precision plugin clip by the whole model's gradients: it sees this rank's parameters alone.

    Args:
        plugin: Of the Trainer; changed in place.
        pipeline: The model.
    """

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: float) -> None:
        pipeline.clip_grad_norm(list(plugin.main_params(optimizer)), float(clip_val))

    def clip_grad_by_value(optimizer: Optimizer, clip_val: float) -> None:
        pipeline.clip_grad_value(list(plugin.main_params(optimizer)), float(clip_val))

    plugin.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
    plugin.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]


def whole_grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Any]:
    """Norms of the gradients of a module's parameters and of all together, under Lightning's names.

    Args:
        module: The model that is trained, or a part of it; of any other it is Lightning's own answer.
        norm_type: p, or ``"inf"``.
        group_separator: Between the prefix and the parameter's name.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for pipeline in _training:
        known = {id(parameter): name for name, parameter in pipeline.chain.root.named_parameters()}
        if not names.keys() <= known.keys():
            continue
        norm_type = float(norm_type)
        if norm_type <= 0:
            raise ValueError(f"`norm_type` must be a positive number or 'inf' (infinity norm). Got {norm_type}")
        norms = pipeline.grad_norms(norm_type)
        found: dict[str, Tensor] = {
            f"grad_{norm_type}_norm{group_separator}{name}": norms[known[key]]
            for key, name in names.items()
            if known[key] in norms
        }
        if found:
            found[f"grad_{norm_type}_norm_total"] = torch.stack(list(found.values())).norm(norm_type)
        return found
    result: dict[str, Any] = _LIGHTNINGS(module, norm_type, group_separator)
    return result
