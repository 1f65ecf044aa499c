# SPDX-License-Identifier: Apache-2.0
"""What is deferred over many micro-batches, stages and steps: order, types, memory, and what the module stays."""

import contextlib
import copy
import io
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from split_backward import (
    Net,
    Scaled,
    assert_same_gradients,
    full_backward,
    inputs,
    mean_square,
    split_backward,
    straight,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_zeroprompt.pipeline.weight_grad import DeferredLinear, WeightGradStore, defer_linears, restore_linears

pytestmark = pytest.mark.usefixtures("double_precision")


# Many micro-batches, stages and steps


def test_b_and_w_in_any_order_over_steps() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        net = Net(straight)
        reference, store = copy.deepcopy(net), WeightGradStore()
        defer_linears(net)
        for _ in range(2):  # gradients accumulate
            batches = inputs(2, 6, count=6)
            full_backward(reference, batches, mean_square)
            losses: list[Tensor] = []
            waiting: list[Callable[[], None]] = []
            while len(losses) < 6 or any(loss is not None for loss in losses) or waiting:
                kind = draw.choice("FBW")
                if kind == "F" and len(losses) < 6:
                    with store.record():
                        losses.append(mean_square(net, batches[len(losses)]))
                elif kind == "B" and any(loss is not None for loss in losses):
                    at = draw.choice([i for i, loss in enumerate(losses) if loss is not None])
                    with store.record():
                        losses[at].backward()
                    losses[at] = None  # type: ignore[call-overload]
                    waiting.append(store.take())
                elif kind == "W" and waiting:
                    waiting.pop(draw.randrange(len(waiting)))()
            assert_same_gradients(net, reference)


def test_stages_with_a_store_each() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    reference, x = copy.deepcopy(nn.Sequential(first, second)), torch.randn(3, 6)
    stores = WeightGradStore(), WeightGradStore()
    defer_linears(nn.ModuleList([first, second]))
    with stores[0].record():
        sent = first(x)
        with stores[1].record():
            received = sent.detach().requires_grad_()
            loss = second(received).square().sum()
        assert isinstance(first(x).grad_fn, type(sent.grad_fn)), "the outer store records again"
    with stores[0].record():
        loss.backward()  # a Linear's gradient goes where its forward pass was recorded
        sent.backward(received.grad)
    assert [len(store) for store in stores] == [1, 1]
    stores[0].take()()
    assert first.weight.grad is not None
    assert second.weight.grad is None
    stores[1].take()()
    full_backward(reference, [x], lambda model, batch: model(batch).square().sum())
    assert_same_gradients(nn.Sequential(first, second), reference)


def test_w_is_what_has_been_left_out() -> None:
    net, store = Net(straight), WeightGradStore()
    assert defer_linears(net) == 3
    with store.record():
        mean_square(net, torch.randn(3, 6)).backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    weight_task = store.take()
    assert store.take() is not weight_task
    store.take()()
    assert all(parameter.grad is None for parameter in net.parameters())
    weight_task()
    once = {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert len(once) == 6
    weight_task()
    assert all(torch.equal(net.get_parameter(name).grad, grad) for name, grad in once.items())


def test_gradients_accumulate_in_place() -> None:
    net, store = Net(straight), WeightGradStore()
    defer_linears(net)
    split_backward(net, inputs(3, 6), mean_square, store)
    where = {name: parameter.grad for name, parameter in net.named_parameters()}
    split_backward(net, inputs(3, 6), mean_square, store)
    assert all(parameter.grad is where[name] for name, parameter in net.named_parameters())


def test_nothing_is_deferred_outside_a_recording_nor_after_one_that_failed() -> None:
    net, store = Net(straight), WeightGradStore()
    defer_linears(net)
    with contextlib.suppress(ZeroDivisionError), store.record():
        raise ZeroDivisionError
    mean_square(net, torch.randn(3, 6)).backward()
    assert len(store) == 0
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_deferred_without_gradients(mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    net, store, x = Net(straight), WeightGradStore(), torch.randn(3, 6)
    expected = net(x)
    defer_linears(net)
    with store.record(), mode():
        out = net(x)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert len(store) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_gradients_are_those_of_autocast(compiled: bool) -> None:
    torch._dynamo.reset()
    counters.clear()
    net, store = Net(straight).float(), WeightGradStore()
    reference, batches = copy.deepcopy(net), [x.float() for x in inputs(3, 6, requires_grad=False)]
    if compiled:
        net.compile(backend="aot_eager")
        batches = [x.requires_grad_() for x in batches]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mean_square(model, batch)

    defer_linears(net)
    assert min(split_backward(net, batches, loss, store)) > 0
    full_backward(reference, batches, loss)
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        # The same products of the same bfloat16 numbers, summed in another order.
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-2, atol=1e-2 * theirs.grad.abs().max().item())
    # Or it would be as many pieces of code as Linears.
    assert not counters["graph_break"]


# Types


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


class Buffer:
    """Sums one parameter's gradients in float32."""

    def __init__(self, parameter: Tensor) -> None:
        self.sum = torch.zeros_like(parameter, dtype=torch.float32)

    def add(self, grad: Tensor) -> None:
        self.sum += grad


def test_bf16_within_its_rounding_and_sums_in_fp32_where_asked() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16()
    batches = [torch.randn(32, 64).bfloat16() for _ in range(32)]
    exact, ordinary, buffered = copy.deepcopy(net).double(), copy.deepcopy(net), copy.deepcopy(net)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch.to(next(model.parameters()).dtype)).square().sum()

    full_backward(exact, batches, loss)
    full_backward(ordinary, batches, loss)
    buffers = {parameter: Buffer(parameter) for parameter in buffered.parameters()}
    for model, store in ((net, WeightGradStore()), (buffered, WeightGradStore(buffers.__getitem__))):
        defer_linears(model)
        assert split_backward(model, batches, loss, store) == [2] * 32
    assert all(parameter.grad is None for parameter in buffered.parameters())
    for ours, theirs, summed, reference in zip(
        net.parameters(), ordinary.parameters(), buffered.parameters(), exact.parameters(), strict=True
    ):
        assert reference.grad is not None
        in_bf16 = relative_error(ours.grad, reference.grad)
        assert ours.grad.dtype is torch.bfloat16
        assert in_bf16 <= 1.25 * relative_error(theirs.grad, reference.grad), "the ordinary backward's own rounding"
        assert relative_error(buffers[summed].sum, reference.grad) < in_bf16 / 1.5


# Memory


def watch_linears(net: nn.Module) -> tuple[list[StorageWeakRef], list[StorageWeakRef]]:
    """Storages of the Linears' inputs, and of the gradients of their outputs, from now on."""
    seen: tuple[list[StorageWeakRef], list[StorageWeakRef]] = [], []

    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        seen[0].append(StorageWeakRef(args[0].untyped_storage()))
        out.register_hook(lambda grad: seen[1].append(StorageWeakRef(grad.untyped_storage())))

    for part in net.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(hook)
    return seen


def test_inputs_and_gradients_live_from_b_to_w_and_no_longer() -> None:
    net, store = Net(straight), WeightGradStore()
    defer_linears(net)
    xs, dys = watch_linears(net)
    waiting = []
    for _ in range(2):
        with store.record():
            mean_square(net, torch.randn(3, 6)).backward()
        waiting.append(store.take())
    assert [ref.expired() for ref in xs + dys] == [False] * 12
    waiting[1]()
    for refs in (xs, dys):
        assert [ref.expired() for ref in refs] == [False] * 3 + [True] * 3
    waiting[0]()
    assert [ref.expired() for ref in xs + dys] == [True] * 12


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations within have made and that are alive, but for some old ones."""

    def __init__(self, old: Sequence[Tensor]) -> None:
        super().__init__()
        self.old = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in old}
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self.old:
                    self.sizes[ref.cdata] = (ref, tensor.untyped_storage().nbytes())
        return out

    def count(self) -> int:
        self.sizes = {key: (ref, size) for key, (ref, size) in self.sizes.items() if not ref.expired()}
        return sum(size for _, size in self.sizes.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_in_1f1b_order_is_flat_and_that_of_its_formula(checkpointing: bool) -> None:
    # A first stage of four: up to four micro-batches between F and B, W right behind B.
    width, ahead, micro_batches = 64, 4, 10

    def run(net: nn.Module, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
        return x

    layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(3))
    net, store = Net(run, layers=layers), WeightGradStore()
    defer_linears(net)
    batch, grad = torch.randn(128, width, requires_grad=True), torch.randn(128, width)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    peaks, first_forward = [], 0
    for _ in range(50):
        with LiveBytes([batch, grad, *net.parameters()]) as live:
            outputs: list[Tensor] = []
            highest = 0
            for number in range(micro_batches + ahead - 1):
                if number < micro_batches:
                    with store.record():
                        outputs.append(net(batch))
                    highest = max(highest, live.count())
                    first_forward = first_forward or live.count()
                if number >= ahead - 1:
                    with store.record():
                        outputs.pop(0).backward(grad)
                    weight_task = store.take()
                    weight_task()
            optimizer.step()
            optimizer.zero_grad()
            batch.grad = None
            assert live.count() == 0, "a step leaves nothing behind"
        peaks.append(highest)
    assert len(set(peaks)) == 1, peaks
    gradients = sum(parameter.nbytes for parameter in net.layers.parameters()) + batch.nbytes
    assert peaks[0] <= 1.05 * (ahead * first_forward + gradients)
    assert peaks[0] >= ahead * first_forward, "the measurement sees what lives"


# The module stays what it was


def test_a_module_with_deferred_linears_is_copied_saved_and_restored_like_any_other() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    plain, parameters, x = copy.deepcopy(net), list(net.parameters()), torch.randn(3, 6)
    called: list[int] = []
    net[0].register_forward_hook(lambda *_: called.append(1))
    assert defer_linears(net) == defer_linears(net) == 2
    assert all(now is then for now, then in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    net(x)
    assert called == [1], "hooks stay"
    net[0]._forward_hooks.clear()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert isinstance(other[0], DeferredLinear)
        reference = copy.deepcopy(plain)
        assert split_backward(other, [x], mean_square, WeightGradStore()) == [2]
        full_backward(reference, [x], mean_square)
        assert_same_gradients(other, reference)
        assert all(parameter.grad is None for parameter in parameters)
    restore_linears(net)
    assert [type(part) for part in net] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(now is then for now, then in zip(net.parameters(), parameters, strict=True))
    assert split_backward(net, [x], mean_square, WeightGradStore()) == [0]


def test_only_plain_linears_are_changed_and_only_these_are_restored() -> None:
    parts = nn.ModuleList(
        [nn.Linear(2, 2), Scaled(2, 2), nn.MultiheadAttention(2, 1), nn.LazyLinear(3), nn.Bilinear(2, 2, 2)]
    )
    before = [type(part) for part in parts.modules()]
    assert defer_linears(parts) == 1
    assert [type(part) for part in parts.modules()] == [before[0], DeferredLinear, *before[2:]]
    restore_linears(parts)
    assert [type(part) for part in parts.modules()] == before
