# SPDX-License-Identifier: Apache-2.0
"""Linears whose weight gradients are deferred, within compiled code.

What is compiled has no autograd nodes to hook. There a Linear is an operator that compilers do not look into, and so is
what its backward pass asks for: the gradient of the input, which puts the pair (input, gradient of the output) aside
for the store that records when it runs. One graph holds for all blocks and stages: which Linear a call is of is found
by where its parameters lie.

Compilers may write over a tensor that their own code reads no more, and the pair is read later. So buffers are neither
reused nor changed in place in what is compiled from here on (``keep_compiled_buffers``); pairs live no longer for it.

Alternatives: a graph that ends in front of every Linear needs no operator, and launches each piece by itself: it took
1.7 times as long as blocks that are not compiled (two H100, 2.7B parameters). Plain Linears within the compiled code
leave nothing to W. Copies of all pairs would be some 3 % of a transformer's traffic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_zeroprompt.pipeline.torch_compat import keep_compiled_buffers

__all__ = ["compiled_linear", "register_linears"]

_Put = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
_put: list[_Put] = []
_linears: weakref.WeakSet[nn.Linear] = weakref.WeakSet()
_found: dict[tuple[int, int], weakref.ref[nn.Linear]] = {}


def register_linears(linears: Iterable[nn.Linear], put: _Put) -> None:
    """Make Linears known.

    Args:
        linears: That defer.
        put: Called as ``put(input, grad_output, weight, bias)`` where a pair is put aside.
    """
    _linears.update(linears)
    _put[:] = [put]


def compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for code that is being compiled; its weight gradients are put aside.

    Args:
        x: ``(..., in_features)``, with a gradient to make.
        weight: Of a registered Linear.
        bias: Likewise.

    Returns:
        ``(..., out_features)``.
    """
    _prepare()
    result: Tensor = torch.ops.lightning_zeroprompt.linear(x, weight, bias)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare() -> bool:
    """Runs while a graph is traced, before it is compiled."""
    keep_compiled_buffers()
    return True


@torch.library.custom_op("lightning_zeroprompt::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


@torch.library.custom_op("lightning_zeroprompt::input_gradient", mutates_args=())
def _input_gradient(grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "CUDA graphs of blocks whose weight gradients are deferred: a graph's memory is written again before they "
            "are made. Compile with another mode than 'reduce-overhead'"
        )
    linear = _linear_of(weight, bias)
    _put[0](x.detach(), grad_output.detach(), linear.weight, linear.bias)
    return grad_output @ weight


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_input_gradient.register_fake
def _(grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    x, weight, bias = ctx.saved_tensors
    return torch.ops.lightning_zeroprompt.input_gradient(grad_output, x, weight, bias), None, None


_linear.register_autograd(_backward, setup_context=_keep)


def _place(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr()


def _linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The Linear whose parameters lie where these do; gathered weights lie elsewhere each time."""
    place = _place(weight, bias)
    known = _found.get(place)
    linear = None if known is None else known()
    if linear is None or _place(linear.weight, linear.bias) != place:
        _found.clear()
        _found.update(
            {_place(each.weight, each.bias): weakref.ref(each) for each in _linears if not each.weight.is_meta}
        )
        known = _found.get(place)
        linear = None if known is None else known()
    if linear is None:
        raise RuntimeError(
            f"a compiled Linear of shape {tuple(weight.shape)} is not known: it was copied after defer_linears; call "
            "that again for the copy"
        )
    return linear
