# SPDX-License-Identifier: Apache-2.0
"""A ``transformers`` checkpoint meets a corpus: what was tokenised differently is refused."""

import warnings

import pytest
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_zeroprompt.cli.build import build_module
from lightning_zeroprompt.cli.checkpoints import load_module
from lightning_zeroprompt.cli.config import config_dir
from lightning_zeroprompt.data import Task, compile_tasks
from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.data.tokenizer import PretrainedTokenizer
from lightning_zeroprompt.models import T5, T5Config, save_t5


def save_tokenizer(folder, words):
    transformers = pytest.importorskip("transformers", reason="install lightning-zeroprompt[hf]")
    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """Weights with room for every tokenizer here, and no tokenizer yet."""
    save_t5(T5(T5Config.preset("nano", 512)), tmp_path / "t5")
    return tmp_path / "t5"


@pytest.fixture(params=["zeroprompt-train", "zeroprompt-eval"])
def start(request, checkpoint):
    """Build the model from the folder, as each of the programs does."""

    def build(corpus):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            if request.param == "zeroprompt-train":
                return build_module(compose("train", [f"init_from={checkpoint}"]), corpus, 1)
            return load_module(compose("eval", [f"checkpoint={checkpoint}"]), corpus)

    return build


def test_another_tokenizer_is_refused(start, checkpoint, evaluation_corpus):
    save_tokenizer(checkpoint, ["good", "bad"])
    theirs, ours = PretrainedTokenizer(str(checkpoint)), evaluation_corpus.tokenizer
    with pytest.raises(ValueError, match="was compiled with byte of 359 ids") as raised:
        start(evaluation_corpus)
    for told in ("105 ids", theirs.fingerprint[:16], ours.fingerprint[:16], f"--tokenizer {checkpoint}"):
        assert told in str(raised.value)


def test_equal_tokenizers_are_accepted_wherever_they_lie(start, checkpoint, tmp_path):
    task = Task(
        task_id="t",
        category="c",
        family="f",
        templates=(PromptTemplate(name="a", text="is it good {input}"),),
        examples=lambda: (Example(input=f"bad {n}", outputs=("good",)) for n in range(4)),
    )
    elsewhere = PretrainedTokenizer(str(save_tokenizer(tmp_path / "elsewhere", ["good", "bad"])))
    corpus = compile_tasks([task], tmp_path / "corpus", tokenizer=elsewhere, progress=False)
    save_tokenizer(checkpoint, ["good", "bad"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = start(corpus)
    assert module.config.vocab_size == 512
    # As many ids in another order are another tokenizer.
    save_tokenizer(checkpoint, ["bad", "good"])
    with pytest.raises(ValueError, match="105 ids"):
        start(corpus)


def test_a_folder_without_a_tokenizer_is_accepted_with_a_warning(start, evaluation_corpus):
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        assert start(evaluation_corpus).config.vocab_size == 512
