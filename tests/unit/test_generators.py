# SPDX-License-Identifier: Apache-2.0
import itertools
import string

import numpy as np
import pytest
import torch
import transformers
from compiling import compiled, make_task

from lightning_zeroprompt.data.join import Joiner
from lightning_zeroprompt.data.mixture import Draws
from lightning_zeroprompt.data.task import Example
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models.t5 import T5, T5Config
from lightning_zeroprompt.prompts.generators import (
    BackTranslation,
    SentenceContinuation,
    SpanInfiller,
    cut_continuation,
    top_p_choice,
)
from lightning_zeroprompt.prompts.operators import TextRequest

TEXT = string.ascii_lowercase[:20]
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def infilling_model(tmp_path_factory):
    """A T5 trained by the package's own span corruption on one text, in which every gap has one right filling."""
    task = make_task(examples=[Example(input=TEXT, outputs=("x",))])
    corpus = compiled([task], tmp_path_factory.mktemp("infilling") / "corpus")
    count = 64 * 150
    draws = Draws(
        index=np.arange(count),
        task=np.zeros(count, np.int32),
        row=np.zeros(count, np.int64),
        template=np.zeros(count, np.int32),
        denoise=np.ones(count, np.bool_),
        key=np.random.default_rng(0).integers(2**63, size=count).astype(np.uint64),
    )
    inputs, targets = Joiner(corpus, encoder_length=64, decoder_length=16).join(draws)
    # One text has one length, so every example of a batch is as long as the others.
    ids = torch.from_numpy(inputs.tokens.reshape(count, -1)).long()
    labels = torch.from_numpy(targets.tokens.reshape(count, -1)).long()
    model = T5(T5Config.preset("nano", TOKENIZER.vocab_size), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for batch, wanted in zip(ids.split(64), labels.split(64), strict=True):
        logits = model(batch, torch.nn.functional.pad(wanted[:, :-1], (1, 0)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3, f"the fixture's model has not learnt its text (loss {loss:.2f})"
    return model.eval()


def test_a_model_fills_gaps_as_it_has_learnt_to(infilling_model):
    fill = SpanInfiller(infilling_model, TOKENIZER, num_samples=3, top_p=0.5)
    gaps = range(3, 14)
    requests = [TextRequest(TEXT[:gap], TEXT[gap + 3 :]) for gap in gaps]
    found = fill(requests, seed=0)
    right = sum(TEXT[gap : gap + 3] in texts for gap, texts in zip(gaps, found, strict=True))
    assert right >= 9, found
    assert all(len(set(texts)) == len(texts) for texts in found)
    assert fill(requests, seed=0) == found
    assert fill([], seed=0) == []


def test_many_gaps_of_any_length_are_filled_in_batches(infilling_model):
    fill = SpanInfiller(infilling_model, TOKENIZER, num_samples=2, top_p=1e-6)
    requests = [TextRequest(TEXT[:gap], TEXT[gap + 3 :] * (1 + gap % 3)) for gap in range(14)] * 5
    together = fill(requests, seed=0)
    alone = [fill([request], seed=1)[0] for request in requests[:14]]
    # With so small a sum of probabilities the likeliest token is the only one, whatever the seed and the batch.
    assert together == alone * 5


def test_an_untrained_model_gives_nothing_and_keeps_its_mode():
    model = T5(T5Config.preset("nano", TOKENIZER.vocab_size), seed=0).train()
    state = torch.random.get_rng_state()
    found = SpanInfiller(model, TOKENIZER)([TextRequest("do ", " now")] * 3, seed=0)
    assert found == [[], [], []]
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        model.shared.weight.fill_(torch.nan)
    assert SpanInfiller(model, TOKENIZER)([TextRequest("do ", " now")], seed=0) == [[]]


def test_a_filling_ends_at_the_next_mark(monkeypatch):
    model = T5(T5Config.preset("nano", TOKENIZER.vocab_size), seed=0)
    first, second = TOKENIZER.sentinel_ids[:2]
    a, b = TOKENIZER.encode_batch(["ab"])[0]
    rows = [[first, a, b, second, a, 1], [first, b, 1, 0, 0, 0], [second, a, 1, 0, 0, 0], [first, a, a, a, a, a]]
    monkeypatch.setattr(model, "generate", lambda *_, **__: torch.tensor(rows))
    assert SpanInfiller(model, TOKENIZER, num_samples=4)([TextRequest("x", "y")], seed=0) == [["ab", "b"]]


@pytest.mark.parametrize(
    "settings", [{"num_samples": 0}, {"max_new_tokens": 1}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": 0.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        SpanInfiller(T5(T5Config.preset("nano", 359)), TOKENIZER, **settings)


def test_top_p_draws_the_likeliest_tokens_in_proportion():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    choose = top_p_choice(0.75, 1.0, torch.Generator().manual_seed(0))
    drawn = choose(probabilities.log().repeat(20_000, 1))
    shares = torch.bincount(drawn, minlength=5) / 20_000
    # The sum 0.4 + 0.3 does not reach 0.75, so the third token counts; 0.015 is over four standard deviations.
    expected = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.15]) / 0.85
    assert torch.allclose(shares, expected, atol=0.015)
    assert not shares[[0, 2]].any()
    cold = top_p_choice(1.0, 0.01, torch.Generator().manual_seed(0))
    assert set(cold(probabilities.log().repeat(1000, 1)).tolist()) == {1}


@pytest.mark.parametrize(
    ("continuation", "kept"),
    [
        ('Is that one good?" and more "', "Is that one good?"),
        ("no closing quote", None),
        ('two\nlines"', None),
        ('Is it good?"', None),
        ('word"', None),
        ('"', None),
    ],
)
def test_what_is_kept_of_a_continuation(continuation, kept):
    assert cut_continuation("Is it good? ", continuation) == kept


def _save(folder, model):
    model.save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models: a causal one with random weights, and a T5 that answers everything with one text."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    marks = {"vocab_size": 384, "eos_token_id": 1}
    causal = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**marks, bos_token_id=1, n_positions=256, n_embd=16, n_layer=1, n_head=2)
    )
    # With a width of 32 it depends on the machine's rounding whether two places of the answer are told apart.
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    seq2seq = transformers.T5ForConditionalGeneration(transformers.T5Config(**marks, **sizes, decoder_start_token_id=0))
    tokenizer = transformers.ByT5Tokenizer()
    answer = tokenizer(['so it be" and'] * 2, return_tensors="pt").input_ids
    asked = tokenizer(["Is it good?", 'so it be" and'], return_tensors="pt", padding=True).input_ids
    optimizer = torch.optim.AdamW(seq2seq.parameters(), 5e-3)
    for _ in range(200):
        loss = seq2seq(input_ids=asked, labels=answer).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return _save(root / "causal", causal), _save(root / "seq2seq", seq2seq)


def test_local_models_rewrite_sentences(folders):
    causal, seq2seq = folders
    requests = [TextRequest("Is it good?"), TextRequest('Is "it" good or is it something else that is longer?')] * 20
    state = torch.random.get_rng_state()
    # With so small a sum of probabilities the likeliest token is the only one; sampled ones may err now and then.
    found = SentenceContinuation(seq2seq, num_samples=3, top_p=1e-6)(requests, seed=1)
    assert len(found) == 40
    assert found[0] == ["so it be"]
    there_and_back = BackTranslation(seq2seq, seq2seq, num_samples=2, top_p=1e-6)(requests, seed=1)
    assert len(there_and_back) == 40
    assert there_and_back[0][0] == 'so it be" and'
    texts = SentenceContinuation(causal, max_new_tokens=5)
    assert texts(requests[:3], seed=1) == texts(requests[:3], seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random numbers were used"


def test_a_causal_model_gives_back_only_what_it_wrote(folders):
    model = SentenceContinuation(folders[0])._model
    asked = ["Is it good?", "A longer text that fills the row to its start"]
    settings = {"num_samples": 4, "top_p": 1.0, "max_new_tokens": 6}
    written = model.write(asked, seed=3, **settings)
    assert [len(group) for group in written] == [4, 4]
    assert all(len(text) <= 6 for text in itertools.chain.from_iterable(written))
    assert written != model.write(asked, seed=4, **settings)


def test_models_that_are_not_there_are_refused_before_any_work(folders, tmp_path):
    with pytest.raises(ValueError, match=r"there is no model at .*nothing is downloaded"):
        SentenceContinuation(tmp_path / "none")
    with pytest.raises(ValueError, match="there is no model at google/t5"):
        BackTranslation(folders[1], "google/t5")
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(ValueError, match="could not be loaded"):
        SentenceContinuation(tmp_path)
