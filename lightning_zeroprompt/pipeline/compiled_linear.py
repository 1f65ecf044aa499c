# SPDX-License-Identifier: Apache-2.0
"""Linears whose weight gradients are deferred, within compiled code.

What is compiled has no autograd nodes to hook. There the backward pass of a Linear asks an operator that compilers do
not look into for the gradient of its input, and that puts the pair (input, gradient of the output) aside for the store
that records when it runs. One graph holds for all blocks and stages: which Linear a call is of is found by where its
parameters lie.

Compilers may write over a tensor that their own code reads no more, and the pair is read later. So buffers are neither
reused nor changed in place in what is compiled from here on (``keep_compiled_buffers``); pairs live no longer for it.

Alternatives: a graph that ends in front of every Linear needs no operator, and launches each piece by itself: steps
took 1.7 times as long as with blocks that are not compiled (two H100, 2.7B parameters). Plain Linears within compiled
code leave nothing to W. Copies of all pairs would be reads and writes of all that W reads.
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
        x: ``(..., in_features)``, with a gradient to make, in the type to compute in.
        weight: Of a registered Linear.
        bias: Likewise.

    Returns:
        ``(..., out_features)``.
    """
    _prepare()
    result: Tensor = _Traced.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare() -> bool:
    """Runs while a graph is traced, before it is compiled."""
    keep_compiled_buffers()
    return True


class _Traced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.lightning_zeroprompt.input_gradient(*grad_outputs, *ctx.saved_tensors), None, None


def _input_gradient(grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "CUDA graphs of blocks whose weight gradients are deferred: a graph's memory is written again before they "
            "are made. Compile with another mode than 'reduce-overhead'"
        )
    linear = _linear_of(weight, bias)
    _put[0](x.detach(), grad_output.detach(), linear.weight, linear.bias)
    return grad_output @ weight.to(grad_output.dtype)


# Without the checks of torch.library.custom_op, which take the host longer than the call.
_library: Any = torch.library.Library("lightning_zeroprompt", "DEF")  # type: ignore[no-untyped-call]
_library.define("input_gradient(Tensor grad_output, Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("input_gradient", _input_gradient, "CompositeExplicitAutograd")


def _shape(grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))


torch.library.register_fake("lightning_zeroprompt::input_gradient", _shape, lib=_library)


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
