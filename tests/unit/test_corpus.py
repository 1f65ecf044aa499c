# SPDX-License-Identifier: Apache-2.0
"""Reading a compiled folder: what it says is what was put in, and damage is refused."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import ARRAYS, Corpus, CorpusError, manifest_fingerprint
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer


def tasks():
    def closed():
        for i in range(40):
            yield Example(input=f"c{i}", outputs=(["no", "yes", "maybe"][i % 3],), options=("no", "yes", "maybe"))

    def free():
        for i in range(30):
            yield Example(input=f"f{i}", outputs=(f"o{i}", "also"), fields={"extra": f"e{i}"})

    verbal = PromptTemplate(name="v", text="Q {options}? {input}", verbalizer=("n", "y", "m"), option_separator=" / ")
    heldout = PromptTemplate(name="h", text="{extra}: {input}!", role="heldout", instruction="do")
    return [
        Task(task_id="closed", category="a", family="a", templates=(verbal,), examples=closed),
        Task(
            task_id="free",
            category="b",
            family="b",
            templates=(PromptTemplate(name="t", text="{input}"), heldout),
            examples=free,
            role="heldout",
            licence="MIT",
            tier=1,
        ),
    ]


@pytest.fixture
def corpus(tmp_path):
    return compile_tasks(tasks(), tmp_path / "c", tokenizer=ByteTokenizer(), progress=False)


def text(corpus, segment):
    return corpus.tokenizer.decode(corpus.segment(segment).tolist())


def test_every_piece_is_where_the_layout_says(corpus):
    by_id = {task.task_id: task for task in tasks()}
    for info in corpus.tasks:
        source = {e.input: e for e in by_id[info.task_id].examples()}
        for row in range(info.first_row, info.first_row + info.num_rows):
            first = int(corpus.row_first_segment[row])
            example = source.pop(text(corpus, first))
            fields = [text(corpus, first + k) for k in range(len(info.fields))]
            assert fields == [example.field(name) for name in info.fields]
            outputs = [text(corpus, first + len(info.fields) + k) for k in range(corpus.row_num_outputs[row])]
            assert tuple(outputs) == example.outputs
            options = int(corpus.row_option_segment[row])
            if example.options is None:
                assert (options, corpus.row_num_options[row], corpus.row_label[row]) == (-1, 0, -1)
            else:
                shown = tuple(text(corpus, options + k) for k in range(corpus.row_num_options[row]))
                assert shown == example.options
                assert shown[corpus.row_label[row]] == example.outputs[0]
        assert not source


def test_templates_round_trip(corpus):
    for info in corpus.templates:
        task = corpus.tasks[info.task]
        assert task.first_template <= info.index < task.first_template + task.num_templates
        codes = corpus.template_codes[corpus.template_offsets[info.index] : corpus.template_offsets[info.index + 1]]
        names = [text(corpus, c) if c >= 0 else "{options}" if c == -1 else f"{{{task.fields[-2 - c]}}}" for c in codes]
        assert "".join(names) == info.text
        assert text(corpus, corpus.template_separator[info.index]) == info.option_separator
        verbalizer = int(corpus.template_verbalizer[info.index])
        if info.verbalizer is None:
            assert verbalizer == -1
        else:
            assert tuple(text(corpus, verbalizer + k) for k in range(len(task.labels))) == info.verbalizer
        assert corpus.template_role[info.index] == (info.role == "heldout")


def test_task_records(corpus):
    closed, free = corpus.tasks
    assert (closed.labels, closed.kind) == (("no", "yes", "maybe"), "choice")
    assert (free.labels, free.kind) == (None, "generation")
    assert (free.fields, free.licence, free.tier, free.role) == (("input", "extra"), "MIT", 1, "heldout")
    assert (closed.first_row, closed.num_rows, free.first_row, free.num_rows) == (0, 40, 40, 30)
    assert closed.num_train_rows == 38
    assert (free.num_train_rows, free.class_counts, free.num_heldout_rows) == (0, (), 0)
    options = corpus.row_option_segment[:40]
    assert len(np.unique(options)) == 1


def test_closed_labels_lie_in_groups(corpus):
    closed = corpus.tasks[0]
    labels = corpus.row_label[: closed.num_train_rows]
    assert sum(closed.class_counts) == closed.num_train_rows
    assert labels.tolist() == np.repeat(np.arange(3), closed.class_counts).tolist()


def test_types_and_memory_maps(corpus):
    assert corpus.tokens.dtype == np.uint16
    for name in ARRAYS:
        assert isinstance(getattr(corpus, name), np.memmap) == (not name.startswith("template")), name
    for name in ARRAYS[1:]:
        array = getattr(corpus, name)
        narrow = array.dtype in (np.int8, np.int16) or np.abs(array).max() > np.iinfo(np.int16).max
        assert narrow or (name.startswith("template") and array.dtype == np.int64), name
    assert corpus.segment_offsets[-1] == len(corpus.tokens)


def test_verify_finds_one_changed_byte(corpus):
    corpus.verify()
    file = corpus.path / "tokens.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=r"tokens\.npy"):
        Corpus.open(corpus.path).verify()


@pytest.mark.parametrize("name", [f"{name}.npy" for name in ARRAYS] + ["tokenizer.json"])
def test_a_truncated_or_missing_file_is_refused_at_open(corpus, name):
    file = corpus.path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorpusError, match=f"{name} has .* the manifest says"):
        Corpus.open(corpus.path)
    file.unlink()
    with pytest.raises(CorpusError, match=f"{name} is missing"):
        Corpus.open(corpus.path)


def test_bad_manifests_are_refused(corpus, tmp_path):
    manifest = corpus.path / "manifest.json"
    good = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(good | {"settings": {}}))
    with pytest.raises(CorpusError, match="was changed"):
        Corpus.open(corpus.path)
    manifest.write_text(json.dumps(good | {"format": 99}))
    with pytest.raises(CorpusError, match="format 99"):
        Corpus.open(corpus.path)
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(CorpusError, match="is damaged"):
        Corpus.open(corpus.path)
    manifest.unlink()
    with pytest.raises(CorpusError, match="half-written"):
        Corpus.open(corpus.path)
    with pytest.raises(CorpusError, match="no compiled corpus"):
        Corpus.open(tmp_path / "nowhere")


def test_fingerprint_is_of_content_not_place(corpus, tmp_path):
    moved = tmp_path / "elsewhere"
    corpus.path.rename(moved)
    again = compile_tasks(tasks(), tmp_path / "c", tokenizer=ByteTokenizer(), progress=False)
    assert Corpus.open(moved).fingerprint == again.fingerprint
    other = compile_tasks(tasks(), tmp_path / "d", tokenizer=ByteTokenizer(), progress=False, seed=1)
    assert other.fingerprint != again.fingerprint
    assert manifest_fingerprint({"a": 1, "fingerprint": "x"}) == manifest_fingerprint({"a": 1})


def test_pickling_carries_the_path_and_not_the_arrays(corpus):
    content = pickle.dumps(corpus)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again.fingerprint == corpus.fingerprint
    assert np.array_equal(again.tokens, corpus.tokens)


def test_opening_imports_nothing_heavy(corpus):
    code = (
        "import sys; from lightning_zeroprompt.data.corpus import Corpus;"
        f"c = Corpus.open({str(corpus.path)!r}); c.segment(0);"
        "bad = {'datasets', 'pyarrow', 'torch', 'lightning', 'tokenizers', 'transformers', 'jinja2'};"
        "bad &= set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_drawing_needs_of_the_tokenizer_stands_in_the_manifest(corpus):
    assert corpus.vocab_size == corpus.tokenizer.vocab_size
    assert corpus.eos_id == corpus.tokenizer.eos_id
    assert corpus.sentinel_ids == tuple(corpus.tokenizer.sentinel_ids)
