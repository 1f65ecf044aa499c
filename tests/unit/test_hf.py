# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: logits equal to transformers' (1e-5, float32) in both directions, packed or not; clear errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_zeroprompt.models.hf import CheckpointError, load_t5, save_t5
from lightning_zeroprompt.models.t5 import T5, T5Config

transformers = pytest.importorskip("transformers", reason="install lightning-zeroprompt[hf]")

VOCAB = 99
TOLERANCE = 1e-5


def peer_model(
    *, tied: bool, scaled: bool, activation: str = "gated-gelu"
) -> "transformers.T5ForConditionalGeneration":
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
        feed_forward_proj=activation,
        tie_word_embeddings=scaled,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights of 1 and a tiny bias would hide a mix-up; large projections are ill-conditioned.
            parameter.normal_(std=1.0 if "norm" in name or "relative" in name else 0.1)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    return model


def batch(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(2, VOCAB, (rows, 70), generator=generator)
    targets = torch.randint(2, VOCAB, (rows, 13), generator=generator)
    return inputs, targets


CASES = [
    pytest.param(True, True, "relu", id="v1.0"),
    pytest.param(False, False, "gated-gelu", id="v1.1"),
    pytest.param(True, True, "gated-gelu", id="gated-tied-scaled"),
    pytest.param(True, False, "gated-gelu", id="gated-tied-unscaled"),
    pytest.param(False, True, "relu", id="untied-scaled"),
]


@pytest.mark.parametrize(("tied", "scaled", "activation"), CASES)
def test_loaded_logits_equal_transformers(tmp_path: Path, tied: bool, scaled: bool, activation: str) -> None:
    peer = peer_model(tied=tied, scaled=scaled, activation=activation)
    peer.save_pretrained(tmp_path)
    ours = load_t5(tmp_path).eval()
    assert (ours.config.tie_head, ours.config.scale_decoder_outputs) == (tied, scaled)
    inputs, targets = batch()
    with torch.no_grad():
        expected = peer(input_ids=inputs, decoder_input_ids=targets).logits
        torch.testing.assert_close(ours(inputs, targets), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_packed_logits_equal_transformers_one_by_one(tmp_path: Path) -> None:
    peer = peer_model(tied=False, scaled=False)
    peer.save_pretrained(tmp_path)
    ours = load_t5(tmp_path).eval()
    inputs, targets = batch(rows=1)
    input_lengths, target_lengths = [20, 1, 45], [5, 2, 3]
    input_segments, decoder_segments = torch.zeros(1, 70, dtype=torch.int32), torch.zeros(1, 13, dtype=torch.int32)
    start = decoder_start = 0
    expected = []
    for index, (length, decoder_length) in enumerate(zip(input_lengths, target_lengths, strict=True), 1):
        input_segments[0, start : start + length] = index
        decoder_segments[0, decoder_start : decoder_start + decoder_length] = index
        with torch.no_grad():
            expected.append(
                peer(
                    input_ids=inputs[:, start : start + length],
                    decoder_input_ids=targets[:, decoder_start : decoder_start + decoder_length],
                ).logits
            )
        start, decoder_start = start + length, decoder_start + decoder_length
    with torch.no_grad():
        logits = ours(inputs, targets, input_segments=input_segments, decoder_segments=decoder_segments)
    torch.testing.assert_close(logits[:, :decoder_start], torch.cat(expected, 1), atol=TOLERANCE, rtol=TOLERANCE)


def test_padded_batch_equals_transformers_with_attention_mask(tmp_path: Path) -> None:
    peer = peer_model(tied=True, scaled=True)
    peer.save_pretrained(tmp_path)
    ours = load_t5(tmp_path).eval()
    inputs, targets = batch()
    mask = torch.arange(70).expand(3, 70) < torch.tensor([[70], [31], [5]])
    with torch.no_grad():
        expected = peer(input_ids=inputs, attention_mask=mask.long(), decoder_input_ids=targets).logits
        memory = ours.encode(inputs, mask.int())
        logits = ours.decode(targets, memory, memory_segments=mask.int())
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_greedy_generation_equals_transformers(tmp_path: Path) -> None:
    peer = peer_model(tied=False, scaled=False)
    peer.save_pretrained(tmp_path)
    ours = load_t5(tmp_path).eval()
    inputs, _ = batch(rows=8)
    mask = torch.arange(70).expand(8, 70) < torch.tensor([70, 60, 50, 40, 30, 20, 10, 1])[:, None]
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": 1}
    expected = peer.generate(input_ids=inputs, attention_mask=mask.long(), **options)[:, 1:]
    generated = ours.generate(inputs, mask.int(), 24)
    assert len(set(map(tuple, generated.tolist()))) > 1
    torch.testing.assert_close(generated, expected[:, : generated.shape[1]])


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    peer = peer_model(tied=True, scaled=True).eval()
    peer.save_pretrained(tmp_path)
    ours = load_t5(tmp_path).eval()
    inputs, targets = batch()
    peer(input_ids=inputs, labels=targets).loss.backward()
    shifted = torch.nn.functional.pad(targets[:, :-1], (1, 0))
    torch.nn.functional.cross_entropy(ours(inputs, shifted).flatten(0, 1), targets.flatten()).backward()
    attention = peer.encoder.block[0].layer[0].SelfAttention
    pairs = [
        (ours.shared.weight, peer.shared.weight),
        (ours.encoder_bias.weight, attention.relative_attention_bias.weight),
        (ours.encoder[0].attention.o.weight, attention.o.weight),
    ]
    for mine, theirs in pairs:
        assert theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize(("tied", "scaled", "activation"), CASES)
def test_saved_model_loads_in_transformers_and_here(tmp_path: Path, tied: bool, scaled: bool, activation: str) -> None:
    config = T5Config.preset(
        "nano",
        VOCAB,
        tie_head=tied,
        scale_decoder_outputs=scaled,
        activation=activation,
        dropout=0.1,
        num_decoder_layers=1,
    )
    ours = T5(config, seed=3).eval()
    save_t5(ours, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # transformers 4.x knows the first key only, and scales exactly where it is true.
    assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == (scaled, scaled)
    peer = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    again = load_t5(tmp_path / "out").eval()
    assert again.config == config
    inputs, targets = batch()
    with torch.no_grad():
        logits = ours(inputs, targets)
        expected = peer(input_ids=inputs, decoder_input_ids=targets).logits
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(again(inputs, targets), logits, atol=0, rtol=0)


def test_sharded_checkpoint_and_dtype(tmp_path: Path) -> None:
    peer = peer_model(tied=False, scaled=False)
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    inputs, targets = batch()
    with torch.no_grad():
        expected = peer(input_ids=inputs, decoder_input_ids=targets).logits
        torch.testing.assert_close(load_t5(tmp_path).eval()(inputs, targets), expected, atol=TOLERANCE, rtol=TOLERANCE)
    model = load_t5(tmp_path, dtype=torch.bfloat16, dropout=0.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dropout == 0.0
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match="fetch all files"):
        load_t5(tmp_path)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "model_type is 'umt5'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"pad_token_id": 5}, "pad_token_id is 5"),
        ({"num_layers": 5}, "weights do not fit"),
        ({"d_ff": 64}, "config.json says"),
    ],
)
def test_unsupported_configurations_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_t5(T5(T5Config.preset("nano", VOCAB)), tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_t5(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_t5(tmp_path)
    save_t5(T5(T5Config.preset("nano", VOCAB)), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_t5(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_t5(tmp_path)


def test_superfluous_tensor_is_named(tmp_path: Path) -> None:
    save_t5(T5(T5Config.preset("nano", VOCAB)), tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "encoder.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 superfluous \['encoder.extra.weight'\]"):
        load_t5(tmp_path)


def test_what_t5_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absolute_positions"):
        save_t5(T5(T5Config.preset("nano", VOCAB, absolute_positions=True)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_import_needs_no_transformers() -> None:
    code = "import sys, lightning_zeroprompt.models.hf; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
