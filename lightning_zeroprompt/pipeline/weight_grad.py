# SPDX-License-Identifier: Apache-2.0
"""Split backward passes: the gradients of Linear weights are left for later, everything else is ordinary autograd.

While a ``WeightGradStore`` records, an ``nn.Linear`` runs with its weight detached, so that autograd makes the gradient
of its input alone, and a hook in front of that appends the pair (input, gradient of the output), detached, to the store
instead of multiplying it out. Where a hook would not do (no gradient for the input, autocast, checkpoints), an
``autograd.Function`` does the same; in compiled code an operator does (``compiled_linear``). ``take`` hands over what
has been appended as a function; calling it is the W of that micro-batch. This is what
``PipelineStage(dw_builder=...)`` of torch asks for.

Alternatives: torch's own split walks the autograd graph once a parameter group. A prototype of this engine ran the same
orders at 0.57 to 0.84 of the no-bubble limit with it, and at 0.92 to 0.98 with deferred Linears (two H200, 2.7B
parameters); it also fails on tied weights, views, shared biases and checkpointed blocks. A ``TorchFunctionMode`` would
catch calls of ``F.linear`` too, at the cost of a Python call for every operation of the model.

What it costs: a Linear's input and the gradient of its output live until W ran. What is no plain ``nn.Linear`` makes
its gradients in B: right, with less left to move. So does a Linear of complex numbers, or whose weight
is computed from other parameters (weight or spectral norm, pruning). Gradients of gradients are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_zeroprompt.pipeline.compiled_linear import compiled_linear, register_linears
from lightning_zeroprompt.pipeline.torch_compat import saving_is_hooked

__all__ = ["DeferredLinear", "GradBuffer", "WeightGradStore", "defer_linears", "restore_linears"]


class GradBuffer(Protocol):
    """Where the gradients of one parameter are summed, if not in its ``.grad``."""

    def add(self, grad: Tensor) -> None:
        """Add a gradient of the parameter's shape, in the type that the backward pass computed in."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """One Linear's call whose weight gradient is still to be made."""

    input: Tensor
    grad_output: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int, int]


class WeightGradStore:
    """Collects what the weight gradients of one backward pass need.

    Args:
        grad_buffer: For a parameter, where its gradients are summed if not in ``.grad``, else None. FSDP's mixed
            precision sums the gradients of gathered weights in another type than theirs.

    Example:
        >>> layer, store = nn.Linear(2, 2), WeightGradStore()
        >>> defer_linears(layer)
        1
        >>> with store.record():
        ...     layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad is None
        True
        >>> store.take()()
        >>> layer.weight.grad
        tensor([[1., 1.],
                [1., 1.]])
    """

    _recording: WeightGradStore | None = None
    """The store that records now; backward passes run in threads of their own, so that this is no thread's property."""
    _records = False

    def __init__(self, grad_buffer: Callable[[Tensor], GradBuffer | None] | None = None) -> None:
        self._grad_buffer = grad_buffer
        self._pending: list[_Pending] = []

    def __len__(self) -> int:
        """The number of Linear calls whose gradients wait to be taken."""
        return len(self._pending)

    def held(self) -> list[Tensor]:
        """The inputs and output gradients of Linear calls whose gradients wait to be taken; some may be one tensor."""
        return [tensor for call in self._pending for tensor in (call.input, call.grad_output)]

    @contextmanager
    def record(self) -> Iterator[None]:
        """Defer the weight gradients of Linears that run within; forward passes *and* backward passes belong within.

        A checkpointed block runs its forward pass again in the backward pass, and must find the same state there.
        """
        outer, WeightGradStore._recording, WeightGradStore._records = WeightGradStore._recording, self, True
        try:
            yield
        finally:
            WeightGradStore._recording, WeightGradStore._records = outer, outer is not None

    def take(self) -> Callable[[], None]:
        """Hand over what was collected since the last call.

        Returns:
            A function that adds the gradients to the parameters, once.
        """
        pending, self._pending = self._pending, []

        def run() -> None:
            with torch.no_grad():
                while pending:
                    self._add(pending.pop())

        return run

    def _add(self, call: _Pending) -> None:
        if call.versions != (call.input._version, call.grad_output._version):
            raise RuntimeError(
                f"what the weight gradient of a Linear of shape {tuple(call.weight.shape)} is made of was changed in "
                "place after its backward pass; change a copy instead"
            )
        x = call.input.reshape(-1, call.input.shape[-1])
        dy = call.grad_output.reshape(-1, call.grad_output.shape[-1])
        # Under autocast the pair has another type than the parameter: one product more has to be held.
        same = x.dtype == call.weight.dtype
        if call.weight.requires_grad:
            self._accumulate(call.weight, lambda: dy.t() @ x, lambda grad: grad.addmm_(dy.t(), x), same)
        if call.bias is not None and call.bias.requires_grad:
            self._accumulate(call.bias, lambda: dy.sum(0), lambda grad: grad.add_(dy.sum(0)), same)

    def _accumulate(
        self, parameter: Tensor, make: Callable[[], Tensor], add: Callable[[Tensor], Any], in_place: bool
    ) -> None:
        buffer = self._grad_buffer(parameter) if self._grad_buffer else None
        if buffer is not None:
            buffer.add(make())
        elif parameter.grad is None:
            parameter.grad = make().to(parameter.dtype)
        elif in_place:
            add(parameter.grad)
        else:
            parameter.grad.add_(make())


class _Linear(torch.autograd.Function):
    """``F.linear`` whose backward pass gives the input's gradient and leaves the rest to a store."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        store: WeightGradStore,
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Not through save_for_backward: a checkpoint would hand back an alias of the parameter, whose gradient nobody
        # sees.
        ctx.weight, ctx.bias, ctx.store = weight, bias, store
        if weight.dtype != x.dtype:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_output,) = grad_outputs
        (x,) = ctx.saved_tensors
        x, dy = x.detach(), grad_output.detach()
        ctx.store._pending.append(_Pending(x, dy, ctx.weight, ctx.bias, (x._version, dy._version)))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight = ctx.weight.detach()
        return dy @ (weight if weight.dtype == dy.dtype else weight.to(dy.dtype)), None, None, None


class _Catch:
    """A hook in front of a Linear's backward pass: pairs the gradient with the input, which it then lets go of."""

    __slots__ = ("bias", "input", "store", "version", "weight")

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, store: WeightGradStore) -> None:
        self.input: Tensor | None = x
        self.weight, self.bias, self.store, self.version = weight, bias, store, x._version

    def __call__(self, grad_outputs: tuple[Tensor, ...]) -> None:
        (grad_output,) = grad_outputs
        if self.input is None or torch.is_grad_enabled():
            raise RuntimeError(
                "a second backward pass through a Linear whose weight gradient is deferred, or gradients of its "
                "gradients, were asked for; the weight's part of them would be missing"
            )
        x, dy = self.input.detach(), grad_output.detach()
        self.input = None
        self.store._pending.append(_Pending(x, dy, self.weight, self.bias, (self.version, dy._version)))


class DeferredLinear(nn.Linear):
    """An ``nn.Linear`` that defers the gradients of its parameters while a store records."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Linear
        """As ``nn.Linear``.

        Args:
            input: ``(..., in_features)``.

        Returns:
            ``(..., out_features)``.
        """
        if torch.compiler.is_compiling():
            return self._compiled(input)
        store = WeightGradStore._recording
        # Straight from the table: a module's attributes are looked up by slow Python. What is computed is not in it.
        own = self._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if store is None or "bias" not in own or not _defers(weight, bias):
            return super().forward(input)
        return _defer(input, weight, bias, store)

    def _compiled(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        # Whether a store records, and not which one: compiled code would be made anew for each.
        if not WeightGradStore._records or not _defers(weight, bias):
            return super().forward(x)
        kinds = (x.dtype, weight.dtype)
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.requires_grad and (torch.float64 not in kinds if autocast else kinds[0] == kinds[1]):
            return compiled_linear(x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x, weight, bias)
        result: Tensor = _uncompiled(x, weight, bias)
        return result


def _defer(x: Tensor, weight: Tensor, bias: Tensor | None, store: WeightGradStore | None = None) -> Tensor:
    store = store or WeightGradStore._recording
    if store is None:
        return F.linear(x, weight, bias)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    shape = x.shape
    # Without a gradient to make there would be no node to be told of one; autocast would cast, and save, the weight
    # once a call; a checkpoint drops what is saved in its forward pass, and would not drop what a hook holds.
    if x.requires_grad and x.dtype == weight.dtype and not autocast and not saving_is_hooked():
        # With a bias the result for more than a matrix is a view, which loses its node when it is changed in place.
        rows = x.flatten(0, -2) if bias is not None and len(shape) > 2 else x
        output = F.linear(rows, weight.detach(), None if bias is None else bias.detach())
        node: Any = output.grad_fn
        node.register_prehook(_Catch(rows, weight, bias, store))
    else:
        # The Function sees a matrix: autograd refuses to have a view made inside of it changed in place.
        rows = x.flatten(0, -2) if len(shape) > 2 else x
        if autocast and torch.float64 not in (x.dtype, weight.dtype):
            rows = rows.to(torch.get_autocast_dtype(x.device.type))
        output = _Linear.apply(rows, weight, bias, store)  # type: ignore[no-untyped-call]
    return output if rows is x else output.view(*shape[:-1], weight.shape[0])


_uncompiled = torch.compiler.disable(_defer)  # type: ignore[no-untyped-call]
"""Compiled code ends in front of a Linear and goes on behind it. Made once: each call of ``disable`` makes one more
wrapper."""


def _put_aside(x: Tensor, grad_output: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What compiled code does with a pair."""
    store = WeightGradStore._recording
    pair = _Pending(x, grad_output, weight, bias, (x._version, grad_output._version))
    if store is None:
        WeightGradStore()._add(pair)
    else:
        store._pending.append(pair)


def _defers(weight: Tensor | None, bias: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a Linear has gradients to leave for later."""
    return (
        torch.is_grad_enabled()
        and weight is not None
        # What is no leaf is computed from parameters: its gradient has further to go.
        and weight.is_leaf
        and (bias is None or bias.is_leaf)
        and (weight.requires_grad or (bias is not None and bias.requires_grad))
        and not weight.is_complex()
    )


def defer_linears(module: nn.Module) -> int:
    """Make every plain Linear of a module one that can defer; names, parameters and hooks stay.

    Returns:
        How many Linears the module has that can defer now.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = DeferredLinear
    deferred = [part for part in module.modules() if isinstance(part, DeferredLinear)]
    register_linears(deferred, _put_aside)
    return len(deferred)


def restore_linears(module: nn.Module) -> None:
    """Undo ``defer_linears``."""
    for part in module.modules():
        if type(part) is DeferredLinear:
            part.__class__ = nn.Linear  # type: ignore[assignment]
