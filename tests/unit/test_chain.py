# SPDX-License-Identifier: Apache-2.0
"""Blocks taken out of and put back into user code: what is captured, what is refused, in one process.

A chain is compared with the model's own call: capture, run the blocks, replay.
"""

import threading

import pytest
import torch
from torch import nn

from lightning_zeroprompt.pipeline.chain_check import ChainCopy
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.weight_grad import WeightGradStore, defer_linears


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.linear(x)) * scale


class Model(nn.Module):
    """An embedding, a loop over blocks, a head; ``loop`` is what a test puts in the loop's place."""

    def __init__(self, loop=None, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 7)
        self.loop = loop

    def forward(self, tokens):
        x = self.embedding(tokens)
        if self.loop is not None:
            return self.head(self.loop(self, x))
        for index, layer in enumerate(self.layers):
            x = layer(x, scale=index + tokens.shape[0] / 10)
        return self.head(x)


TOKENS = torch.tensor([[1, 2], [3, 6]])


def run_chain(chain, run):
    calls = chain.capture(run)
    return chain.replay(run, chain.run(0, len(chain), calls.args, calls))


def test_list_of_blocks_computes_what_the_model_does():
    model = Model()
    chain = find_chain(model)
    assert (chain.name, len(chain), chain.target) == ("'layers'", 3, None)
    calls = chain.capture(lambda: model(TOKENS))
    torch.testing.assert_close(calls.args, (model.embedding(TOKENS),))
    assert [kwargs for _, kwargs in calls.extra] == [{"scale": 0.2}, {"scale": 1.2}, {"scale": 2.2}]
    torch.testing.assert_close(run_chain(chain, lambda: model(TOKENS)), model(TOKENS), rtol=0, atol=0)
    # The model is what it was.
    assert [type(layer) for layer in model.layers] == [Block] * 3


def test_stages_one_after_another_are_the_whole():
    model = Model()
    chain = find_chain(model)
    calls = chain.capture(lambda: model(TOKENS))
    middle = chain.run(0, 2, calls.args, calls)
    output = chain.run(2, 3, (middle,), calls)
    torch.testing.assert_close(chain.replay(lambda: model(TOKENS), output), model(TOKENS), rtol=0, atol=0)


def test_the_largest_sequential_or_list_is_found():
    small, large = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])
    assert find_chain(nn.ModuleDict({"small": small, "large": large})).blocks == list(large)
    assert find_chain(nn.ModuleDict({"only": small})).target is small
    with pytest.raises(ValueError, match=r"no nn.Sequential and no nn.ModuleList .* configure_pipeline\(\)"):
        find_chain(nn.ModuleDict({"linear": nn.Linear(2, 2)}))


@pytest.mark.parametrize(
    ("stages", "expected"), [(1, "'wide'"), (2, "'wide'"), (3, "'deep'"), (4, "'deep'"), (5, "'wide'")]
)
def test_a_list_with_a_block_for_every_stage_is_preferred(stages, expected):
    """And the largest of all where none has one, which is then refused for what it has."""
    lists = {"low": (4, 4), "deep": (5, 4), "wide": (9, 2)}
    model = nn.ModuleDict({name: nn.ModuleList(map(nn.Linear, [n] * k, [n] * k)) for name, (n, k) in lists.items()})
    assert find_chain(model, stages).name == expected


@pytest.mark.parametrize(("widths", "inside"), [((2, 9), "'net.1'"), ((9, 9), "'net'")])
def test_a_list_inside_a_list_is_cut_where_it_is_most_of_that(widths, inside):
    """Not so one layer of many, such as its experts: then the refusal is of the layers."""
    parts = (nn.Sequential(*(nn.Linear(width, width) for _ in range(4))) for width in widths)
    model = nn.ModuleDict({"net": nn.Sequential(*parts)})
    assert [find_chain(model, stages).name for stages in (2, 4, 5)] == ["'net'", inside, "'net'"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda model: None, "returned NoneType"),
        (lambda model: [], "returned list"),
        (lambda model: (model, ["layers"]), "returned tuple"),
        (lambda model: [nn.Linear(2, 2)], "Linear is no submodule of Model"),
        (lambda model: (nn.Linear(2, 2), list(model.layers)), "Linear is no submodule of Model"),
        (
            lambda model: (model.layers, [*model.layers, model.head]),
            "block 3, a Linear, has parameters weight, bias that are none of ModuleList's",
        ),
        (
            lambda model: (model, [*model.layers, nn.Linear(4, 4)]),
            r"block 3, .* none of Model's, .* with a target that contains all of its blocks",
        ),
        (
            lambda model: (model.layers, [nn.Sequential(layer, model.head) for layer in model.layers]),
            "block 0, a Sequential, has parameters 1.weight, 1.bias that are none of ModuleList's",
        ),
    ],
)
def test_wrong_answers_of_configure_pipeline(answer, message):
    model = Model()
    model.configure_pipeline = lambda: answer(model)
    with pytest.raises(ValueError, match=message):
        find_chain(model)


class Target(nn.Module):
    """Blocks pass on two tensors; the second one is a skip connection."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.first, self.last, self.change = First(), Second(), change

    def forward(self, x, *, factor):
        return self.change(self.last(*self.first(x), inputs=((x,), {"factor": factor})))

    def configure_pipeline(self):
        return self, [self.first, self.last]


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, factor=None):
        return self.linear(x), x


class Second(nn.Module):
    def forward(self, y, x, *, inputs):
        return y * inputs[1]["factor"] + x


def test_target_whose_blocks_pass_on_tuples_and_read_its_arguments():
    model = Target()
    chain = find_chain(model)
    x = torch.randn(3, 4)
    expected = model(x, factor=3.0)
    torch.testing.assert_close(run_chain(chain, lambda: model(x, factor=3.0)), expected, rtol=0, atol=0)
    assert "forward" not in vars(model)


def test_target_that_does_more_than_its_blocks_is_refused():
    x = torch.randn(3, 4)
    for change in (lambda y: 2 * y, lambda y: (y, y)):
        model = Target(change)
        chain = find_chain(model)
        checked = ChainCopy.of(chain)
        with pytest.raises(ValueError, match=r"do not return what Target returns for the same input \("):
            checked.compare(chain.capture(lambda model=model: model(x, factor=3.0)))
    model = Target()
    chain = find_chain(model)
    ChainCopy.of(chain).compare(chain.capture(lambda: model(x, factor=3.0)))


def test_what_is_not_checked(monkeypatch):
    assert ChainCopy.of(find_chain(Model())) is None
    assert ChainCopy.of(find_chain(nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}))) is None
    with torch.device("meta"):
        assert ChainCopy.of(find_chain(Target())) is None
    model = Target()
    model.lock = threading.Lock()
    with pytest.warns(UserWarning, match="could not be copied"):
        assert ChainCopy.of(find_chain(model)) is None
    monkeypatch.setattr("lightning_zeroprompt.pipeline.chain_check.LARGEST", 19)
    assert ChainCopy.of(find_chain(Target())) is None


# -- what a list of called blocks cannot be ---------------------------------------------------------------------------


def backwards(model, x):
    for layer in reversed(model.layers):
        x = layer(x)
    return x


def twice(model, x):
    for layer in model.layers:
        x = layer(layer(x))
    return x


def changed_between(model, x):
    for layer in model.layers:
        x = layer(x) * 2
    return x


def residual_around(model, x):
    first = model.layers[0](x)
    return model.layers[2](model.layers[1](first) + first)


def skip_connection(model, x):
    y = model.layers[1](model.layers[0](x), x)
    return model.layers[2](y)


def gate_from_stream(model, x):
    for layer in model.layers:
        x = layer(x, scale=float((x.detach() > 0).sum()))
    return x


def by_keyword(model, x):
    for layer in model.layers:
        x = layer(x=x)
    return x


def some(model, x):
    return model.layers[0](x)


def none(model, x):
    return x


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (backwards, "block 2 is called where block 0 was next"),
        (twice, "block 0 is called again"),
        (changed_between, "block 1 is not given what block 0 returned"),
        (residual_around, "block 2 is not given what block 1 returned"),
        (skip_connection, r"block 1 is given a tensor of shape \(2, 2, 4\) besides the stream that carries gradients"),
        (gate_from_stream, "block 1 is given something besides the stream that is computed from"),
        (by_keyword, "block 0 is called without a tensor as first positional argument"),
        (some, "the step ended without calling 'layers'"),
        (none, "the step ended without calling 'layers'"),
    ],
)
def test_no_chain(loop, message):
    model = Model(loop)
    with pytest.raises(ValueError, match=message):
        find_chain(model).capture(lambda: model(TOKENS))


def test_second_call_of_the_model_is_refused():
    for model, run in (
        (Model(), lambda model: model(TOKENS) + model(TOKENS)),
        (Target(), lambda model: model(torch.ones(1, 4), factor=1) + model(torch.ones(1, 4), factor=1)),
    ):
        chain = find_chain(model)
        with pytest.raises(ValueError, match="called more than once in a step"):
            chain.replay(lambda model=model, run=run: run(model), torch.zeros(2, 2, 4))


def test_hidden_states_between_blocks_are_nan_in_a_replay():
    states = []

    def loop(model, x):
        for layer in model.layers:
            x = layer(x)
            states.append(x)
        return x

    model = Model(loop)
    chain = find_chain(model)
    output = torch.ones(2, 2, 4)
    chain.replay(lambda: model(TOKENS), output)
    assert states[-1] is output
    assert all(bool(state.isnan().all()) for state in states[:-1])


def test_what_a_block_leaves_on_itself_is_not_read():
    def loop(model, x):
        for layer in model.layers:
            x = layer(x)
        return x + model.layers[0].statistics

    model = Model(loop)
    model.layers[0].statistics = torch.zeros(())
    with pytest.raises(RuntimeError, match="reads 'statistics' of Block, a tensor that the block makes when it runs"):
        find_chain(model).replay(lambda: model(TOKENS), torch.zeros(2, 2, 4))


class Cache:
    """As transformers' caches look to a block."""

    def __init__(self, length=0):
        self.length = length

    def get_seq_length(self):
        return self.length

    def update(self, key, value, index):
        raise AssertionError("a block was given a cache")


def test_empty_caches_are_left_out_and_others_refused():
    def loop(model, x):
        for layer in model.layers:
            x = layer(x, scale=cache)
        return x

    cache = Cache()
    model = Model(loop)
    calls = find_chain(model).capture(lambda: model(TOKENS))
    assert calls.extra == [((), {"scale": None})] * 3
    cache = Cache(5)
    with pytest.raises(ValueError, match="a Cache of 5 earlier positions"):
        find_chain(model).capture(lambda: model(TOKENS))


def test_compiled_model_is_refused_and_compiled_blocks_are_not():
    model = Model()
    with pytest.raises(ValueError, match="'net' is compiled as a whole"):
        find_chain(nn.ModuleDict({"net": torch.compile(model)}))
    model.compile()
    with pytest.raises(ValueError, match="'net' is compiled as a whole"):
        find_chain(nn.ModuleDict({"net": model}))
    model = Model()
    for layer in model.layers:
        layer.compile()
    assert len(find_chain(model)) == 3


def in_a_loop(model, x):
    for layer in model.layers:
        x = layer(x)
    return x


def test_a_row_is_compiled_as_one_and_shared_by_rows_of_like_blocks():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = Model(in_a_loop, blocks=6)
    chain = find_chain(model)
    calls = chain.capture(lambda: model(TOKENS))
    expected = chain.run(0, 6, calls.args, calls)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in model.layers.parameters()]
    model.zero_grad()
    chain.compile_rows(backend=backend)
    defer_linears(model)
    store, streams = WeightGradStore(), [calls.args[0].detach().requires_grad_()]
    with store.record():
        for first in (0, 2, 4):
            streams.append(chain.run(first, first + 2, (streams[-1],), calls))
        torch.testing.assert_close(streams[-1], expected, rtol=0, atol=1e-6)
        streams[-1].sum().backward()
    assert len(graphs) == 1
    assert all(parameter.grad is None for parameter in model.layers.parameters())
    store.take()()
    for parameter, gradient in zip(model.layers.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6)


# -- modules on other ranks -------------------------------------------------------------------------------------------


def test_modules_outside_the_blocks():
    model = Model()
    model.loose = nn.Parameter(torch.zeros(1))
    before, behind, loose = find_chain(model).outside()
    assert (before, behind) == ([model.embedding], [model.head])
    assert [id(parameter) for parameter in loose] == [id(model.loose)]


def test_absent_modules_return_nothing_in_the_right_shape():
    model = Model()
    chain = find_chain(model)
    chain.leave_out([model.embedding], before=False, behind=True)
    calls = chain.capture(lambda: model(TOKENS))
    (stream,) = calls.args
    assert stream.shape == (2, 2, 4)
    assert bool(stream.isnan().all())
    chain.leave_out([model.embedding], before=True, behind=False)
    with pytest.raises(ValueError, match="module 'embedding' runs before 'layers' but is registered on the other side"):
        chain.capture(lambda: model(TOKENS))


def test_parameters_of_other_ranks_are_not_read():
    model = Model(lambda model, x: x @ model.layers[2].weight)
    model.layers[2].weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    with pytest.raises(RuntimeError, match="reads the parameter 'weight' of Block, which another rank holds"):
        find_chain(model).capture(lambda: model(TOKENS))


def test_checkpointed_calls_stay_checkpointed():
    ran = []

    def loop(model, x):
        for layer in model.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x

    model = Model(loop)
    chain = find_chain(model)
    model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    calls = chain.capture(lambda: model(TOKENS))
    assert calls.checkpointed
    chain.run(0, 3, calls.args, calls).sum().backward()
    assert len(ran) == 2
    plain = Model()
    assert not find_chain(plain).capture(lambda: plain(TOKENS)).checkpointed
