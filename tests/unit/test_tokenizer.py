# SPDX-License-Identifier: Apache-2.0
"""Tokenisers: round trips, ids of words in any place, reserved ids, determinism."""

import json
import subprocess
import sys

import numpy as np
import pytest

from lightning_zeroprompt.data.tokenizer import (
    NUM_SENTINELS,
    BpeTokenizer,
    ByteTokenizer,
    PretrainedTokenizer,
    TextTokenizer,
    load_tokenizer,
)

WORDS = ["alpha", "beta", "gamma", "delta", "na\u00efve", "\u65e5\u672c", "x"]


def texts(count=400, seed=0):
    rng = np.random.default_rng(seed)
    ends = ["", ".", "\nnext, line"]
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) + rng.choice(ends) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe():
    return BpeTokenizer.train(texts(), 700)


def test_byte_ids_are_utf8_bytes_plus_three():
    tokenizer = ByteTokenizer()
    for text in ["", "abc", "\u65e5\u672c \n\t", "</s> <extra_id_0>"]:
        ids = tokenizer.encode_batch([text])[0]
        assert ids == [b + 3 for b in text.encode()]
        assert tokenizer.decode([0, *ids, 1, tokenizer.sentinel_ids[5]]) == text
    assert tokenizer.vocab_size == 3 + 256 + 100
    assert tokenizer.sentinel_ids[0] == 259


@pytest.mark.parametrize("seed", range(3))
def test_bpe_round_trip(bpe, seed):
    for text in texts(50, seed + 10):
        ids = bpe.encode_batch([text])[0]
        assert max(ids) < bpe.vocab_size
        assert bpe.decode([0, *ids, 1, bpe.sentinel_ids[0]]) == text


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f600 ok",
        "a  b",
        "tab\tbed",
        "x\n\ny",
        "12 345",
        "don't (st)!",
        "\u200b 0",
        "\u03a9\u03bc\u03ad\u03b3\u03b1",
    ],
)
def test_bpe_round_trip_of_unseen_text(bpe, text):
    assert bpe.decode(bpe.encode_batch([text])[0]) == text


def test_bpe_gives_a_word_the_same_ids_everywhere(bpe):
    alone = bpe.encode_batch(["gamma"])[0]
    assert len(alone) == 1
    for text in ["alpha gamma", "gamma beta", "alpha\ngamma", "alpha gamma ", "gamma\n"]:
        assert alone[0] in bpe.encode_batch([text])[0], text


def test_bpe_joined_pieces_equal_the_whole(bpe):
    whole = bpe.encode_batch(["alpha beta gamma\ndelta x"])[0]
    pieces = bpe.encode_batch(["alpha ", "beta gamma\n", "delta x"])
    assert [*pieces[0], *pieces[1], *pieces[2]] == whole


def test_digits_and_punctuation_are_isolated(bpe):
    assert len(bpe.encode_batch(["1234"])[0]) >= 4
    inner = BpeTokenizer.train(["12 12 12, 12,12 (12)"] * 50, 500)
    learned = set(json.loads(json.dumps(inner.state()))["model"]["model"]["vocab"])
    assert not any(sum(c.isdigit() or c in ",()" for c in token) > 1 and not token.startswith("<") for token in learned)


def test_no_text_can_make_a_special_id(bpe):
    special = {0, 1, 2, *bpe.sentinel_ids}
    for tokenizer in (bpe, ByteTokenizer()):
        for text in ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<0x41>", "a</s>b"]:
            ids = tokenizer.encode_batch([text])[0]
            assert not special & set(ids), text
            assert tokenizer.decode(ids) == text


def test_bpe_training_repeats_and_state_restores(bpe):
    again = BpeTokenizer.train(texts(), 700)
    assert again.fingerprint == bpe.fingerprint
    other = BpeTokenizer.train(texts(seed=1), 700)
    assert other.fingerprint != bpe.fingerprint
    loaded = load_tokenizer(json.loads(json.dumps(bpe.state())))
    assert (loaded.fingerprint, loaded.vocab_size) == (bpe.fingerprint, bpe.vocab_size)
    assert loaded.encode_batch(texts(20, 5)) == bpe.encode_batch(texts(20, 5))
    assert isinstance(loaded, TextTokenizer)


def test_alphabet_limit_is_deterministic_across_processes():
    # Many characters of equal count: their choice must not depend on hash order.
    code = (
        "from lightning_zeroprompt.data.tokenizer import BpeTokenizer as B;"
        "print(B.train([chr(0x4E00 + i) + ' ' + chr(0x4E00 + i) for i in range(600)], 500).fingerprint)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""


def test_vocab_size_is_an_upper_limit_with_a_clear_error(bpe):
    assert bpe.vocab_size <= 700
    with pytest.raises(ValueError, match="vocab_size 380 leaves 21 ids"):
        BpeTokenizer.train(["a b"], 380)
    with pytest.raises(ValueError, match="no text"):
        BpeTokenizer.train(["", ""], 1000)


def test_load_tokenizer_refuses_unknown_kinds():
    assert load_tokenizer({"kind": "byte"}).fingerprint == ByteTokenizer().fingerprint
    with pytest.raises(ValueError, match="unknown kind of tokeniser 'x'"):
        load_tokenizer({"kind": "x"})


def _save_pretrained(folder, pad=0, sentinels=0):
    transformers = pytest.importorskip("transformers", reason="install lightning-zeroprompt[hf]")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "good": 3, "bad": 4}
    vocab |= {f"<extra_id_{i}>": 5 + i for i in range(sentinels)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": list(vocab)[pad], "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.mark.parametrize("sentinels", [0, NUM_SENTINELS])
def test_pretrained_folder(tmp_path, sentinels):
    _save_pretrained(tmp_path / "a", sentinels=sentinels)
    tokenizer = PretrainedTokenizer(str(tmp_path / "a"))
    assert tokenizer.encode_batch(["good bad", "bad"]) == [[3, 4], [4]]
    assert tokenizer.decode([0, 3, 1, 4, tokenizer.sentinel_ids[3]]).split() == ["good", "bad"]
    assert tokenizer.sentinel_ids == tuple(range(5, 105))
    assert tokenizer.vocab_size == 105
    assert load_tokenizer(tokenizer.state()).fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="compile the corpus again"):
        load_tokenizer(tokenizer.state() | {"fingerprint": "0" * 64})


def test_pretrained_with_another_padding_id_is_refused(tmp_path):
    _save_pretrained(tmp_path / "a", pad=2)
    with pytest.raises(ValueError, match="padding id 2"):
        PretrainedTokenizer(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="could not be loaded"):
        PretrainedTokenizer(str(tmp_path / "nothing_here"))
