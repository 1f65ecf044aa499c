# SPDX-License-Identifier: Apache-2.0
"""Split backward passes beside ordinary ones of a copy, for tests of deferred weight gradients."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zeroprompt.pipeline.weight_grad import WeightGradStore, defer_linears

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).square().sum()


def full_backward(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> None:
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        loss(model, batch).backward()


def split_backward(model: nn.Module, batches: Sequence[Batch], loss: Loss, store: WeightGradStore) -> list[int]:
    """B of all micro-batches, then their W; how many Linear calls each deferred."""
    waiting, deferred = [], []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        with store.record():
            loss(model, batch).backward()
        deferred.append(len(store))
        waiting.append(store.take())
        assert len(store) == 0
    for weight_task in waiting:
        weight_task()
    return deferred


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    expected = dict(reference.named_parameters())
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        wanted, got = expected[name].grad, parameter.grad
        assert (got is None) == (wanted is None), f"{name}: {got} instead of {wanted}"
        if got is None or wanted is None:
            continue
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
        assert got.grad_fn is None, f"{name}: its gradient keeps a graph"
        assert_close(got, wanted, name)


def assert_close(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    if theirs.numel():
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300)
        assert error <= 1e-12, f"{name}: relative error {error:.1e}"


def compare(model: nn.Module, batches: Sequence[Batch], deferred: int, loss: Loss = mean_square) -> None:
    """A split backward pass of ``model`` gives the gradients of an ordinary one of a copy, of inputs too."""
    reference, their_batches = copy.deepcopy((model, batches))
    store = WeightGradStore()
    defer_linears(model)
    assert split_backward(model, batches, loss, store) == [deferred] * len(batches)
    full_backward(reference, their_batches, loss)
    assert_same_gradients(model, reference)
    for ours, theirs in zip(batches, their_batches, strict=True):
        if isinstance(theirs, Tensor) and theirs.requires_grad:
            assert ours.grad is not None
            assert_close(ours.grad, theirs.grad)


def inputs(*shape: int, count: int = 2, requires_grad: bool = True) -> list[Tensor]:
    return [torch.randn(*shape).requires_grad_(requires_grad) for _ in range(count)]


class Net(nn.Module):
    """Three Linears put together by a function."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        for name, module in more.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def straight(net: Net, x: Tensor) -> Tensor:
    return net.c(torch.tanh(net.b(torch.tanh(net.a(x)))))


class Scaled(nn.Linear):
    """A Linear with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * self.weight.mean()
