# SPDX-License-Identifier: Apache-2.0
"""Deferred weight gradients against an ordinary backward pass of a copy, in float64: relative error at most 1e-12.

An error is the largest difference of a gradient's entries over its largest entry. Each case also says how many calls
of Linears it defers, because a store that never defers would be exact too.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from split_backward import (
    Net,
    Scaled,
    assert_close,
    assert_same_gradients,
    compare,
    full_backward,
    inputs,
    mean_square,
    split_backward,
    straight,
)
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lightning_zeroprompt.models.t5 import T5, T5Config
from lightning_zeroprompt.pipeline.weight_grad import WeightGradStore, defer_linears

pytestmark = pytest.mark.usefixtures("double_precision")


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["stage", "first stage"])
def test_compiled_blocks_of_several_stages(bias: bool, requires_grad: bool) -> None:
    # The code of a block is compiled once, and used with the stores of all stages and, behind them, with none.
    torch._dynamo.reset()
    linears = [[nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)] for _ in range(4)]
    blocks = [nn.Sequential(nn.LayerNorm(6), up, nn.GELU(), down) for up, down in linears]
    stages = [nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])]
    references = copy.deepcopy(stages)
    for stage in stages:
        defer_linears(stage)
        for block in stage:
            block.compile(backend="aot_eager")
    for stage, reference in zip(stages, references, strict=True):
        batches = inputs(3, 5, 6, requires_grad=requires_grad)
        theirs = [batch.detach().clone().requires_grad_(requires_grad) for batch in batches]
        assert split_backward(stage, batches, mean_square, WeightGradStore()) == [4, 4]
        full_backward(reference, theirs, mean_square)
        assert_same_gradients(stage, reference)
        if requires_grad:
            for our, their in zip(batches, theirs, strict=True):
                assert our.grad is not None
                assert_close(our.grad, their.grad)
    for stage, reference in zip(stages, references, strict=True):
        full_backward(stage, batches, mean_square)
        full_backward(reference, theirs, mean_square)
        assert_same_gradients(stage, reference)


def compiled_like(net: nn.Module, *, backend: str = "aot_eager") -> tuple[nn.Module, nn.Module]:
    """A module that defers and is compiled, and a copy that is neither."""
    torch._dynamo.reset()
    reference = copy.deepcopy(net)
    defer_linears(net)
    net.compile(backend=backend)
    return net, reference


@pytest.mark.parametrize("case", ["shared weight", "shared bias", "frozen weight, trainable bias", "unused Linear",
                                  "one Linear twice in a row", "two outputs", "multi-head attention"])  # fmt: skip
def test_compiled_modules(case: str) -> None:
    net, reference = compiled_like(CASES[case][0]())
    batches = inputs(3, 5, 6)
    theirs = [batch.detach().clone().requires_grad_() for batch in batches]
    assert split_backward(net, batches, mean_square, WeightGradStore()) == [CASES[case][1]] * 2
    full_backward(reference, theirs, mean_square)
    assert_same_gradients(net, reference)


def test_compiled_code_without_a_store_makes_all_gradients() -> None:
    net, reference = compiled_like(Net(straight))
    batches = inputs(3, 5, 6)
    with WeightGradStore().record():
        loss = mean_square(net, batches[0])  # the forward pass alone has a store
    loss.backward()
    full_backward(net, batches[1:], mean_square)
    full_backward(reference, [batch.detach() for batch in batches], mean_square)
    assert_same_gradients(net, reference)


def test_a_compiled_block_is_checkpointed() -> None:
    net, reference = compiled_like(Net(straight))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return mean_square(lambda x: checkpoint(model, x, use_reentrant=False), batch)  # type: ignore[arg-type]

    batches = inputs(3, 5, 6)
    theirs = [batch.detach().clone().requires_grad_() for batch in batches]
    assert split_backward(net, batches, loss, WeightGradStore()) == [3, 3]
    full_backward(reference, theirs, mean_square)
    assert_same_gradients(net, reference)


def test_a_copy_that_is_not_known_is_refused() -> None:
    net, _ = compiled_like(Net(straight))
    stranger = copy.deepcopy(net)
    stranger.compile(backend="aot_eager")
    with WeightGradStore().record():
        loss = mean_square(stranger, torch.randn(3, 6, requires_grad=True))
        with pytest.raises(RuntimeError, match="copied after defer_linears"):
            loss.backward()
