# SPDX-License-Identifier: Apache-2.0
"""Deferred weight gradients against an ordinary backward pass of a copy, in float64: relative error at most 1e-12.

An error is the largest difference of a gradient's entries over its largest entry. Each case also says how many calls
of Linears it defers, because a store that never defers would be exact too.
"""

import contextlib
import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_zeroprompt.models.t5 import T5, T5Config
from lightning_zeroprompt.pipeline.weight_grad import DeferredLinear, WeightGradStore, defer_linears, restore_linears

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


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


def part_in_place(net: Net, x: Tensor) -> Tensor:
    out = net.a(x)
    out[..., :2] *= 3
    out[..., 3:].tanh_()
    return net.c(out)


def without_bias() -> Net:
    net = Net(straight)
    net.b = nn.Linear(6, 6, bias=False)
    return net


def shared(part: str) -> Net:
    net = Net(straight)
    setattr(net.b, part, getattr(net.a, part))
    return net


def frozen(*names: str) -> Net:
    net = Net(straight)
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    return net


def checkpointed(*, use_reentrant: bool) -> Net:
    def run(net: Net, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: torch.tanh(net.b(torch.tanh(net.a(x)))), x, use_reentrant=use_reentrant)
        return net.c(net.drop(x))

    return Net(run, drop=nn.Dropout(0.3))


CASES: dict[str, tuple[Callable[[], Net], int]] = {
    "biases": (lambda: Net(straight), 3),
    "no bias": (without_bias, 3),
    "shared weight": (lambda: shared("weight"), 3),
    "shared bias": (lambda: shared("bias"), 3),
    "one Linear twice in a row": (lambda: Net(lambda n, x: n.c(torch.tanh(n.a(torch.sin(n.a(x)))))), 3),
    "one Linear twice side by side": (lambda: Net(lambda n, x: n.c(n.a(x) * torch.sigmoid(n.a(2 * x)))), 3),
    "frozen weight, trainable bias": (lambda: frozen("b.weight"), 3),
    "trainable weight, frozen bias": (lambda: frozen("b.bias"), 3),
    "frozen Linear in the middle": (lambda: frozen("b.weight", "b.bias"), 2),
    "frozen first Linear": (lambda: frozen("a.weight", "a.bias"), 2),
    "unused Linear": (lambda: Net(lambda n, x: n.c(n.a(x))), 2),
    "Linear off the path to the loss": (lambda: Net(lambda n, x: (n.b(x), n.c(n.a(x)))[1]), 2),
    "Linear whose output is detached": (lambda: Net(lambda n, x: n.c(n.a(x) * n.b(x).detach())), 2),
    "reentrant checkpoint": (lambda: checkpointed(use_reentrant=True), 3),
    "checkpoint": (lambda: checkpointed(use_reentrant=False), 3),
    "dropout": (lambda: Net(lambda n, x: n.c(n.drop(n.a(n.drop(x)))), drop=nn.Dropout(0.5)), 2),
    "ends in a view": (lambda: Net(lambda n, x: n.c(n.a(x)).transpose(0, -1).reshape(-1, 2)), 2),
    "gradient is expanded": (
        lambda: Net(lambda n, x: n.c(n.a(x)).sum(0, keepdim=True).expand(3, *x.shape[1:-1], 4)),
        2,
    ),
    "input is a strided view": (lambda: Net(lambda n, x: n.c(n.b(n.a(x).transpose(0, 1)[::2]))), 3),
    "input is expanded": (lambda: Net(lambda n, x: n.c(n.a(x[:1].expand(3, *x.shape[1:])))), 2),
    "output changed in place": (lambda: Net(lambda n, x: n.c(n.relu(n.a(x)) * 2), relu=nn.ReLU(inplace=True)), 2),
    "last output changed in place": (lambda: Net(lambda n, x: n.a(x).add_(n.b(x)).mul_(2)), 2),
    "part of the output changed in place": (lambda: Net(part_in_place), 2),
    "two outputs": (lambda: Net(lambda n, x: torch.cat([n.c(n.a(x)), n.c(x).square()])), 3),
    "multi-head attention": (
        lambda: Net(
            lambda n, x: n.c(n.attention(n.a(x), x, x, need_weights=False)[0]),
            attention=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        2,
    ),
    "encoder layer": (
        lambda: Net(lambda n, x: n.c(n.layer(n.a(x))), layer=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
        4,
    ),
    "GRU": (lambda: Net(lambda n, x: n.c(n.gru(n.a(x))[0]), gru=nn.GRU(6, 6, batch_first=True)), 2),
    "bilinear and convolution": (
        lambda: Net(
            lambda n, x: n.c(n.bilinear(n.a(x), n.conv(x.transpose(1, 2)).transpose(1, 2))),
            bilinear=nn.Bilinear(6, 6, 6),
            conv=nn.Conv1d(6, 6, 3, padding=1),
        ),
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["stage", "first stage"])
def test_gradients_are_those_of_a_full_backward(case: str, requires_grad: bool) -> None:
    make, deferred = CASES[case]
    compare(
        make(),
        inputs(3, 5, 6, requires_grad=requires_grad),
        deferred - (case == "reentrant checkpoint" and not requires_grad) * 2,
    )


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 1, 3, 2, 6)], ids=str)
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    compare(Net(straight), inputs(*shape), 3)


class Scaled(nn.Linear):
    """A Linear with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * self.weight.mean()


def test_a_subclass_of_linear_makes_its_gradients_in_b() -> None:
    compare(Net(lambda n, x: n.c(n.scaled(n.a(x))), scaled=Scaled(6, 6)), inputs(3, 6), 2)


REWRITTEN: dict[str, Callable[[nn.Linear], Any]] = {
    "weight_norm": lambda linear: nn.utils.weight_norm(linear),
    "spectral_norm": lambda linear: nn.utils.spectral_norm(linear),
    "parametrized weight_norm": lambda linear: nn.utils.parametrizations.weight_norm(linear),
    "parametrized orthogonal": lambda linear: nn.utils.parametrizations.orthogonal(linear),
    "pruning": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    "pruned bias": lambda linear: prune.random_unstructured(linear, "bias", 0.5),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_weights_that_are_computed_from_others_get_their_gradients_in_b(how: str) -> None:
    # The Linear's weight is then no parameter: its gradient has further to go.
    nets = []
    for _ in range(2):  # a copy of the first would refuse to be made
        torch.manual_seed(0)
        nets.append(Net(straight))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            REWRITTEN[how](nets[-1].b)
    net, reference = nets
    defer_linears(net)
    for _ in range(2):  # spectral_norm has a state that every forward pass moves
        batches = inputs(3, 6, count=1)
        assert split_backward(net, batches, mean_square, WeightGradStore()) == [2]
        full_backward(reference, batches, mean_square)
        assert_same_gradients(net, reference)


def test_weights_given_to_a_functional_call() -> None:
    net, x = Net(straight), torch.randn(3, 6)
    base = torch.randn(6, 6, requires_grad=True)
    defer_linears(net)
    with WeightGradStore().record():
        torch.func.functional_call(net, {"b.weight": base * 2}, (x,)).sum().backward()
    ours, base.grad = base.grad, None
    torch.func.functional_call(net, {"b.weight": base * 2}, (x,)).sum().backward()
    assert_close(ours, base.grad)


def test_complex_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 5, dtype=torch.complex128), nn.Linear(5, 3, dtype=torch.complex128))
    reference, store = copy.deepcopy(net), WeightGradStore()
    batches = [torch.randn(3, 4, dtype=torch.complex128, requires_grad=True) for _ in range(2)]
    weights = torch.randn(3, 3, dtype=torch.complex128)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * weights).abs().square().sum()

    defer_linears(net)
    split_backward(net, batches, loss, store)
    ours = [batch.grad for batch in batches]
    for batch in batches:
        batch.grad = None
    full_backward(reference, batches, loss)
    assert_same_gradients(net, reference)
    torch.testing.assert_close(ours, [batch.grad for batch in batches], rtol=1e-12, atol=0)


def test_differentiating_twice_is_refused() -> None:
    # A gradient penalty needs the graph of B, which a deferred Linear does not make.
    net, store, x = Net(straight), WeightGradStore(), torch.randn(3, 6, requires_grad=True)
    defer_linears(net)
    with store.record(), pytest.raises(RuntimeError, match=r"gradients of its gradients"):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


def test_an_embedding_tied_to_the_head() -> None:
    model = TiedLanguageModel()
    compare(model, [torch.randint(11, (2, 5)) for _ in range(3)], 2)
    assert model.head.weight is model.embedding.weight


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], batch["decoder_input_ids"])
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def token_batches(vocabulary: int) -> list[dict[str, Tensor]]:
    names = {"input_ids": 7, "decoder_input_ids": 5, "labels": 5}
    return [{name: torch.randint(vocabulary, (2, n)) for name, n in names.items()} for _ in range(2)]


@pytest.mark.parametrize("tie_head", [True, False])
def test_our_t5_with_relative_bias(tie_head: bool) -> None:
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_encoder_layers=2, num_decoder_layers=2,
        dropout=0.1, tie_head=tie_head,
    )  # fmt: skip
    model = T5(config).double()
    linears = sum(type(part) is nn.Linear for part in model.modules())
    compare(model, token_batches(30), linears, token_loss)
    bias = model.encoder_bias.weight if hasattr(model.encoder_bias, "weight") else next(model.encoder_bias.parameters())
    assert bias.grad is not None


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["whole", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_t5(tied: bool, checkpointing: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2, num_decoder_layers=2,
        dropout_rate=0.1, tie_word_embeddings=tied, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).double().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return token_loss(lambda ids, targets: model(input_ids=ids, decoder_input_ids=targets), batch)  # type: ignore[arg-type]

    linears = sum(type(part) is nn.Linear for part in model.modules())
    compare(model, token_batches(30), linears, loss)


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


def test_under_autocast_gradients_are_those_of_autocast() -> None:
    net, store = Net(straight).float(), WeightGradStore()
    reference, batches = copy.deepcopy(net), [x.float() for x in inputs(3, 6, requires_grad=False)]

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
