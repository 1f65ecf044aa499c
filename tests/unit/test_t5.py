# SPDX-License-Identifier: Apache-2.0
"""T5's parts against brute force, and the model's promises: packing, generation, option scores, initialisation.

Logits are compared in float32 within 1e-5; equality with transformers is in test_hf.py.
"""

import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_zeroprompt.models import t5 as t5_module
from lightning_zeroprompt.models.attention import (
    OptionGroups,
    RelativeBias,
    relative_buckets,
    segment_positions,
    toeplitz,
)
from lightning_zeroprompt.models.t5 import T5, T5Config

VOCAB = 61


def tiny(seed: int = 0, **overrides: object) -> T5:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 3, "relative_buckets": 16, "relative_max_distance": 30}
    model = T5(T5Config.preset("nano", VOCAB, **{**sizes, **overrides}), seed=seed).eval()
    with torch.no_grad():
        model.encoder_bias.weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.decoder_bias.weight.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pack(parts: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Lay token sequences into one row: ids and segments, both [1, length]."""
    ids, segments = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int32)
    start = 0
    for number, part in enumerate(parts, 1):
        ids[0, start : start + len(part)] = part
        segments[0, start : start + len(part)] = number
        start += len(part)
    return ids, segments


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (8, 1000)])
def test_buckets_equal_transformers(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    module = pytest.importorskip("transformers.models.t5.modeling_t5", reason="install lightning-zeroprompt[hf]")
    peer = module.T5Attention._relative_position_bucket
    distances = torch.arange(-1500, 1500)
    ours = relative_buckets(distances, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    assert torch.equal(ours, peer(distances, bidirectional, num_buckets, max_distance))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 1), (4, 9), (9, 4), (6, 6)])
def test_toeplitz_and_its_gradient_equal_indexing(queries: int, keys: int) -> None:
    values = torch.randn(3, queries + keys - 1, dtype=torch.float64, requires_grad=True)
    index = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] + queries - 1
    upstream = torch.randn(3, queries, keys, dtype=torch.float64)
    ours, expected = toeplitz(values, queries, keys), values[:, index]
    assert torch.equal(ours, expected)
    (mine,) = torch.autograd.grad((ours * upstream).sum(), values)
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), values)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 5, 16, 33])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_equals_a_lookup_per_pair(length: int, bidirectional: bool) -> None:
    bias = RelativeBias(3, 16, 20, bidirectional=bidirectional)
    torch.nn.init.normal_(bias.weight)
    distances = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    buckets = relative_buckets(distances, bidirectional=bidirectional, num_buckets=16, max_distance=20)
    expected = bias.weight[buckets].permute(2, 0, 1)
    if not bidirectional:
        expected = expected.masked_fill(distances > 0, -30000.0)
    out = bias(length, torch.float32)
    assert torch.equal(out[0], expected)
    # Aligned rows keep the fused attention kernel from copying the bias in each layer.
    assert out.stride(2) % 16 == 0


def test_segment_positions_restart_in_every_run() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    expected = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert torch.equal(segment_positions(segments), expected)


@pytest.mark.parametrize("absolute_positions", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_packed_logits_equal_single_examples(absolute_positions: bool, seed: int) -> None:
    model = tiny(seed, absolute_positions=absolute_positions, max_positions=16)
    lengths = torch.randint(1, 30, (5, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs = [random_ids(a, seed=10 * seed + i) for i, (a, _) in enumerate(lengths)]
    targets = [random_ids(b, seed=100 * seed + i) for i, (_, b) in enumerate(lengths)]
    ids, segments = pack(inputs, 160)
    decoder_ids, decoder_segments = pack(targets, 155)
    with torch.no_grad():
        packed = model(ids, decoder_ids, input_segments=segments, decoder_segments=decoder_segments)[0]
        single = torch.cat([model(a[None], b[None])[0] for a, b in zip(inputs, targets, strict=True)])
    torch.testing.assert_close(packed[: len(single)], single, atol=1e-5, rtol=1e-5)


def test_padding_gives_no_nan_in_logits_or_gradients() -> None:
    model = tiny().train()
    ids, segments = pack([random_ids(6)], 20)
    decoder_ids, decoder_segments = pack([random_ids(3)], 8)
    ids, segments = torch.cat((ids, torch.zeros_like(ids))), torch.cat((segments, torch.zeros_like(segments)))
    decoder_ids = torch.cat((decoder_ids, torch.zeros_like(decoder_ids)))
    decoder_segments = torch.cat((decoder_segments, torch.zeros_like(decoder_segments)))
    logits = model(ids, decoder_ids, input_segments=segments, decoder_segments=decoder_segments)
    assert logits.isfinite().all()
    labels = torch.full((2, 8), -100)
    labels[0, :3] = 5
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_later_targets_and_other_segments_do_not_leak() -> None:
    model = tiny()
    ids, targets = random_ids(2, 12), random_ids(2, 9, seed=1)
    changed = targets.clone()
    changed[:, 5:] = random_ids(2, 4, seed=2)
    with torch.no_grad():
        before, after = model(ids, targets), model(ids, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=0, rtol=0)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_plain_rows_build_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5_module, "segment_mask", None)
    monkeypatch.setattr(t5_module, "_padding_mask", None)
    model = tiny()
    model(random_ids(2, 9), random_ids(2, 4))
    model.generate(random_ids(2, 9), None, 3)


def test_one_sided_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="only input_segments"):
        tiny()(random_ids(1, 4), random_ids(1, 4), input_segments=torch.ones(1, 4, dtype=torch.int32))


@pytest.mark.parametrize("absolute_positions", [False, True])
def test_generation_equals_uncached_argmax(absolute_positions: bool) -> None:
    # An untied, unscaled head with spread logits: greedy text that varies instead of repeating the start token.
    model = tiny(4, absolute_positions=absolute_positions, max_positions=8, tie_head=False, scale_decoder_outputs=False)
    rows, limit = 6, 15
    ids = random_ids(rows, 20)
    segments = (torch.arange(20).expand(rows, 20) < torch.tensor([20, 17, 12, 8, 3, 1])[:, None]).int()
    with torch.no_grad():
        model.head.projection.weight[1] *= 4
        memory = model.encode(ids, segments)
        decoder = torch.zeros(rows, 1, dtype=torch.int64)
        for _ in range(limit):
            logits = model.decode(decoder, memory, memory_segments=segments)
            following = logits[:, -1].argmax(-1)
            ended = (decoder[:, 1:] == 1).any(1)
            decoder = torch.cat((decoder, following.masked_fill(ended, 0)[:, None]), 1)
    generated = model.generate(ids, segments, limit)
    assert (generated == 1).any(), "no row has ended: the test would not see what follows an end"
    assert len(set(generated.flatten().tolist())) > 5
    assert torch.equal(generated, decoder[:, 1 : generated.shape[1] + 1])


def test_generation_stops_when_all_rows_have_ended() -> None:
    model = tiny(tie_head=False)
    with torch.no_grad():
        model.head.projection.weight.zero_()
    ids = random_ids(2, 5)
    assert model.generate(ids, None, 7, eos_id=0).tolist() == [[0], [0]]
    assert model.generate(ids, None, 7).tolist() == [[0] * 7, [0] * 7]
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.generate(ids, None, 0)


@pytest.mark.parametrize(
    ("padded", "logits_at_once", "example", "sizes", "together"),
    [
        # Examples 2 and 3 have no options.
        (True, 2**25, [0, 0, 1, 1, 1, 1, 1, 4, 4], [6, 1, 2, 3, 4, 5, 6, 1, 3], False),
        (False, 2**25, [0, 0, 1, 1, 1, 1, 1, 4, 4], [6, 1, 2, 3, 4, 5, 6, 1, 3], False),
        (True, 5 * VOCAB, [0, 0, 1, 1, 1, 1, 1, 4, 4], [6, 1, 2, 3, 4, 5, 6, 1, 3], False),
        (True, 1, [0, 0, 1, 1, 1, 1, 1, 4, 4], [6, 1, 2, 3, 4, 5, 6, 1, 3], False),
        (True, 2**25, [0, 0, 0, 1, 1, 1, 3, 3, 4, 4, 4], [6, 1, 1, 2, 4, 2, 6, 2, 3, 1, 4], True),
        (False, 5 * VOCAB, [0, 0, 0, 1, 1, 1, 3, 3, 4, 4, 4], [6, 1, 1, 2, 4, 2, 6, 2, 3, 1, 4], True),
    ],
)
def test_option_scores_equal_one_forward_per_option(
    padded: bool,
    logits_at_once: int,
    example: list[int],
    sizes: list[int],
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(t5_module, "_LOGITS_AT_ONCE", logits_at_once)
    model = tiny(3, absolute_positions=True, max_positions=5)
    ids = random_ids(5, 18)
    lengths = torch.tensor([18, 4, 9, 1, 13]) if padded else torch.full((5,), 18)
    segments = (torch.arange(18).expand(5, 18) < lengths[:, None]).int()
    labels = random_ids(len(example), 6, seed=1)
    for row, length in enumerate(sizes):
        labels[row, length:] = -100
    calls: list[int] = []
    original = model._options_hidden
    monkeypatch.setattr(model, "_options_hidden", lambda *given: (calls.append(1), original(*given))[1])
    with torch.no_grad():
        memory = model.encode(ids, segments if padded else None)
        total, count = model.option_logprobs(memory, segments if padded else None, labels, torch.tensor(example))
        assert bool(calls) == together
        for row, index in enumerate(example):
            tokens = labels[row][labels[row] >= 0][None]
            logits = model(ids[index : index + 1, : lengths[index]], F.pad(tokens[:, :-1], (1, 0)))
            expected = logits.log_softmax(-1).gather(2, tokens[..., None]).sum()
            torch.testing.assert_close(total[row], expected, atol=1e-4, rtol=1e-5)
            assert int(count[row]) == tokens.shape[1]


@pytest.mark.parametrize("example", [[], [1, 0], [0, 3], [-1, 0]])
def test_wrong_option_examples_are_refused(example: list[int]) -> None:
    with pytest.raises(ValueError, match="option_example"):
        OptionGroups.from_examples(torch.tensor(example, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("name", "vocab", "millions"),
    [
        ("nano", 330, 0.2188), ("tiny", 8192, 2.5256), ("mini", 32128, 17.668), ("small", 32128, 60.512),
        ("base", 32128, 222.904), ("large", 32128, 750.251), ("xl", 32128, 2783.959), ("xxl", 32128, 11003.736),
    ],
)  # fmt: skip
def test_presets_have_their_sizes_on_the_meta_device(name: str, vocab: int, millions: float) -> None:
    with torch.device("meta"):
        model = T5(T5Config.preset(name, vocab))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=1e-3)


def test_wrong_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'huge'; known sizes: nano, tiny, mini, small, base, large, xl, xxl"):
        T5Config.preset("huge", 100)
    with pytest.raises(ValueError, match="unknown T5Config fields"):
        T5Config.preset("nano", 100, heads=3)
    for field, value in (("d_model", 0), ("relative_buckets", 6), ("relative_max_distance", 8), ("dropout", 1.0)):
        with pytest.raises(ValueError, match=field):
            T5Config.preset("nano", 100, **{field: value})
    with pytest.raises(ValueError, match="activation"):
        T5Config.preset("nano", 100, activation="silu")


def test_meta_construction_then_initialisation_gives_the_same_weights() -> None:
    config = T5Config.preset("nano", VOCAB, absolute_positions=True, tie_head=False)
    direct = T5(config, seed=7).state_dict()
    with torch.device("meta"):
        late = T5(config)
    late.to_empty(device="cpu").init_weights(7)
    assert direct.keys() == late.state_dict().keys()
    assert all(torch.equal(tensor, direct[name]) for name, tensor in late.state_dict().items())
    assert not torch.equal(T5(config, seed=8).shared.weight, direct["shared.weight"])
    assert not torch.equal(direct["encoder.0.attention.qkv.weight"], direct["encoder.1.attention.qkv.weight"])


def test_initial_deviations_are_mesh_tensorflows() -> None:
    config = T5Config.preset("mini", 4000)
    model = T5(config)
    inner = config.num_heads * config.d_kv
    layer = model.decoder[1]
    query, key = layer.attention.qkv.weight[:inner], layer.attention.qkv.weight[inner : 2 * inner]
    expected = [
        (model.shared.weight, 1.0),
        (query, (config.d_model * config.d_kv) ** -0.5),
        (key, config.d_model**-0.5),
        (layer.cross_attention.q.weight, (config.d_model * config.d_kv) ** -0.5),
        (layer.cross_attention.kv.weight, config.d_model**-0.5),
        (layer.attention.o.weight, inner**-0.5),
        (layer.feed_forward.wi.weight, config.d_model**-0.5),
        (layer.feed_forward.wo.weight, config.d_ff**-0.5),
    ]
    for weight, std in expected:
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.02)
        assert abs(float(weight.detach().mean())) < 0.02 * std
    assert torch.equal(layer.cross_norm.weight, torch.ones(config.d_model))


@pytest.fixture
def one_process_group() -> Iterator[None]:
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_sharded_initialisation_gives_the_same_weights() -> None:
    config = T5Config.preset("nano", VOCAB)
    mesh = init_device_mesh("cpu", (1,))
    with torch.device("meta"):
        model = T5(config)
    for layer in (*model.encoder, *model.decoder):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.init_weights(7)
    for name, tensor in T5(config, seed=7).state_dict().items():
        assert torch.equal(model.state_dict()[name].full_tensor(), tensor), name


def test_dropout_only_in_training() -> None:
    model = tiny(dropout=0.3)
    ids, targets = random_ids(2, 9), random_ids(2, 4)
    assert torch.equal(model(ids, targets), model(ids, targets))
    model.train()
    assert not torch.equal(model(ids, targets), model(ids, targets))


def test_half_precision_and_autocast_stay_close_to_float32() -> None:
    model = tiny()
    ids, segments = pack([random_ids(9), random_ids(5)], 20)
    decoder_ids, decoder_segments = pack([random_ids(4), random_ids(2)], 8)
    options = {"input_segments": segments, "decoder_segments": decoder_segments}
    with torch.no_grad():
        expected = model(ids, decoder_ids, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(ids, decoder_ids, **options)
        half = model.to(torch.bfloat16)(ids, decoder_ids, **options)
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: errors of a few percent of the logits' spread.
    for logits in (mixed, half):
        assert float((logits[0, :6].float() - expected[0, :6]).abs().max()) < 0.1 * float(expected.std())


def test_compiled_blocks_give_the_same_logits_from_two_graphs() -> None:
    model, ids, targets = tiny(num_encoder_layers=4, num_decoder_layers=4), random_ids(2, 9), random_ids(2, 4)
    expected = model(ids, targets)
    names = list(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks(backend="eager")
    torch.testing.assert_close(model(ids, targets), expected, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
