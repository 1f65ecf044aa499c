# SPDX-License-Identifier: Apache-2.0
"""Compiling: equal bytes for any workers and after a kill, folders in use, full disks, sources by name."""

import collections
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from compiling import LABELS, compiled, files, leftovers, make_task

from lightning_zeroprompt.data import compile as compile_module
from lightning_zeroprompt.data.compile import BpeSpec, compile_tasks
from lightning_zeroprompt.data.corpus import Corpus, CorpusError
from lightning_zeroprompt.data.prepare import choose_tokenizer, compile_source, source_tasks
from lightning_zeroprompt.data.task import Example, TaskError
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

# -- the same result, always -------------------------------------------------------------------------------------------


def several():
    labelled = [make_task(n, 60, labels=LABELS) for n in range(3)]
    return [*labelled, *(make_task(n, 50) for n in range(3, 7)), make_task(9, 30, role="heldout")]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BpeSpec(vocab_size=500)], ids=["byte", "bpe"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer):
    results = []
    for workers in (0, 1, 2, 5):
        corpus = compiled(several(), tmp_path / str(workers), tokenizer=tokenizer, num_workers=workers)
        corpus.verify()
        results.append(files(corpus.path))
    assert all(result == results[0] for result in results)


class Interrupted(BaseException):
    pass


def stop_at(number):
    def examples():
        raise Interrupted

    return [dataclasses.replace(t, examples=examples) if i >= number else t for i, t in enumerate(several())]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BpeSpec(vocab_size=500)], ids=["byte", "bpe"])
def test_an_interrupted_run_is_taken_up(tmp_path, tokenizer, monkeypatch):
    whole = files(compiled(several(), tmp_path / "whole", tokenizer=tokenizer).path)
    folder = tmp_path / "c"
    if isinstance(tokenizer, BpeSpec):
        # The sample reads every task, so the interrupt has to come while parts are made.
        real = compile_module.write_part
        seen = []

        def write(part, path):
            seen.append(path)
            if len(seen) > 3:
                raise Interrupted
            real(part, path)

        monkeypatch.setattr(compile_module, "write_part", write)
        with pytest.raises(Interrupted):
            compiled(several(), folder, tokenizer=tokenizer, num_workers=1)
        monkeypatch.undo()
    else:
        with pytest.raises(Interrupted):
            compiled(stop_at(5), folder, tokenizer=tokenizer, num_workers=1)
    assert not folder.exists()
    parts = list((tmp_path / "c.partial" / "parts").glob("*.npz"))
    assert len(parts) >= 3
    read = []
    counted = [dataclasses.replace(t, examples=lambda t=t: read.append(t.task_id) or t.examples()) for t in several()]
    corpus = compiled(counted, folder, tokenizer=tokenizer)
    assert files(corpus.path) == whole
    assert len(set(read)) == len(counted) - len(parts)
    assert leftovers(folder) == ["c"]


def test_a_killed_process_is_taken_up(tmp_path):
    program = """
        import sys, time
        sys.path.insert(0, {tests!r})
        from test_compile import several, compiled
        import dataclasses
        def slow(task):
            def examples():
                time.sleep(0.15)
                yield from task.examples()
            return dataclasses.replace(task, examples=examples)
        compiled([slow(t) for t in several()], sys.argv[1])
    """
    code = textwrap.dedent(program).format(tests=str(Path(__file__).parent))
    folder = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    parts = tmp_path / "c.partial" / "parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    corpus = compiled(several(), folder)
    assert files(corpus.path) == files(compiled(several(), tmp_path / "whole").path)


def test_damaged_and_other_parts_are_not_used(tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(Interrupted):
        compiled(stop_at(6), folder, num_workers=1)
    for part in (tmp_path / "c.partial" / "parts").glob("*.npz"):
        part.write_bytes(part.read_bytes()[:100])
    assert files(compiled(several(), folder).path) == files(compiled(several(), tmp_path / "whole").path)
    with pytest.raises(Interrupted):
        compiled(stop_at(6), tmp_path / "d", num_workers=1)
    other = compiled(several(), tmp_path / "d", seed=3)
    assert files(other.path) == files(compiled(several(), tmp_path / "whole3", seed=3).path)


def test_bpe_learns_nothing_from_heldout_tasks(tmp_path):
    heldout = [Example(input="zebrazebra zebrazebra", outputs=("zebrazebra",))] * 50
    tasks = [make_task(0, 60), make_task(1, examples=heldout, role="heldout")]
    corpus = compiled(tasks, tmp_path / "c", tokenizer=BpeSpec(vocab_size=600))
    assert len(corpus.tokenizer.encode_batch(["zebrazebra"])[0]) > 3
    alone = compiled(tasks[1:], tmp_path / "d", tokenizer=BpeSpec(vocab_size=600))
    assert len(alone.tokenizer.encode_batch(["zebrazebra"])[0]) == 1


def test_vocabularies_beyond_16_bits_get_wider_tokens(tmp_path):
    class Wide(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 70_000

        def encode_batch(self, texts):
            return [[69_000 + b for b in text.encode()] for text in texts]

    corpus = compiled([make_task()], tmp_path / "c", tokenizer=Wide())
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.min() >= 69_000


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folders_in_use(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    corpus = compiled([make_task()], folder)
    with pytest.raises(CorpusError, match="already holds a compiled corpus"):
        compiled([make_task()], folder)
    assert compiled([make_task()], folder, existing="reuse").fingerprint == corpus.fingerprint
    with pytest.raises(CorpusError, match=r"other settings \(seed: there 0, asked for 1\)"):
        compiled([make_task()], folder, existing="reuse", seed=1)
    assert compiled([make_task()], folder, existing="replace", seed=1).settings["seed"] == 1
    (folder / "manifest.json").unlink()
    for existing in ("refuse", "reuse", "replace"):
        with pytest.raises(CorpusError, match="holds no whole corpus"):
            compiled([make_task()], folder, existing=existing)
    assert (folder / "tokens.npy").exists()


def test_a_foreign_partial_folder_is_refused(tmp_path):
    foreign = tmp_path / "c.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(CorpusError, match="was not left by a compilation"):
        compiled([make_task()], tmp_path / "c")
    assert (foreign / "thesis.txt").read_text() == "mine"
    (foreign / "thesis.txt").unlink()
    (foreign / "compiling.tmp").write_text("{")
    assert compiled([make_task()], tmp_path / "c").counts["tasks"] == 1


def test_reuse_lists_no_tasks(tmp_path):
    compiled([make_task()], tmp_path / "c")

    def never():
        raise AssertionError("listed")

    assert compiled(never, tmp_path / "c", existing="reuse").tasks[0].task_id == "task 0"


def test_without_a_source_nothing_old_is_used(tmp_path):
    def texts(corpus):
        return sorted(corpus.tokenizer.decode(corpus.segment(int(first))) for first in corpus.row_first_segment)

    old, new = ([make_task(count=4), make_task(1, 1, examples=[Example(input=t, outputs=("o",))])] for t in "xy")
    first = compiled(old, tmp_path / "c", source=None)
    with pytest.raises(ValueError, match="without source nothing tells whether the tasks have changed"):
        compiled(new, tmp_path / "c", source=None, existing="reuse")
    assert "x" in texts(first)
    assert "y" in texts(compiled(new, tmp_path / "c", source=None, existing="replace"))
    with pytest.raises(Interrupted):
        compiled([*old, dataclasses.replace(make_task(2), examples=stop_at(0)[0].examples)], tmp_path / "d",
                 source=None, num_workers=0)  # fmt: skip
    assert list((tmp_path / "d.partial" / "parts").glob("*.npz"))
    assert "y" in texts(compiled([*new, make_task(2)], tmp_path / "d", source=None))


def test_two_processes_make_one_corpus(tmp_path):
    program = """
        import sys
        sys.path.insert(0, {tests!r})
        from test_compile import several, compiled
        print(compiled(several(), sys.argv[1], existing="reuse").fingerprint)
    """
    code = textwrap.dedent(program).format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path / "c")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize("place", ["marker", "part", "tokens", "array"])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch, place):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "marker":
        monkeypatch.setattr(Path, "write_text", full)
    elif place == "part":
        monkeypatch.setattr(Path, "write_bytes", full)
    elif place == "tokens":
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    else:
        monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        CorpusError, match="No space left" if place == "marker" else "the disk filled while compiling .* MiB were"
    ):
        compiled(several(), tmp_path / "c")
    monkeypatch.undo()
    assert not leftovers(tmp_path / "c")
    assert compiled(several(), tmp_path / "c").counts["tasks"] == 8


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="could not make"):
        compiled([make_task()], tmp_path / "file" / "c")


# -- sources by name ---------------------------------------------------------------------------------------------------


def test_compile_source_compiles_once(tmp_path, monkeypatch):
    arguments = {
        "tokenizer": "byte",
        "num_tasks": 12,
        "options": {"examples_per_task": 8},
        "progress": False,
        "max_heldout_examples": 4,
    }
    corpus = compile_source("builtin", None, tmp_path / "c", **arguments)
    roles = collections.Counter(task.role for task in corpus.tasks)
    assert roles["train"] == 12
    monkeypatch.setattr("lightning_zeroprompt.data.prepare.source_tasks", lambda *a: pytest.fail("listed again"))
    assert compile_source("builtin", None, tmp_path / "c", **arguments).fingerprint == corpus.fingerprint
    with pytest.raises(CorpusError, match="other settings"):
        compile_source("builtin", None, tmp_path / "c", **(arguments | {"num_tasks": 11}))


def test_unknown_sources_and_missing_paths(tmp_path):
    with pytest.raises(TaskError, match="unknown source 'x'; known: builtin, parquet, hub, promptsource"):
        compile_source("x", None, tmp_path / "c")
    with pytest.raises(TaskError, match="source 'parquet' needs a path"):
        compile_source("parquet", None, tmp_path / "c", tokenizer="byte")
    with pytest.raises(TaskError, match="needs the option data_folder"):
        source_tasks("promptsource", tmp_path)
    with pytest.raises(ValueError, match="always yields all its tasks"):
        compile_source("hub", tmp_path, tmp_path / "c", num_tasks=3)
    assert choose_tokenizer("bpe", 700) == BpeSpec(700)


def test_an_opened_corpus_needs_no_source_library(tmp_path):
    corpus = compiled(several(), tmp_path / "c")
    assert Corpus.open(corpus.path).counts == corpus.counts


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (0, 0, np.int16),
        (-1, 2**15 - 1, np.int16),
        (0, 2**15, np.int32),
        (-(2**15) - 1, 0, np.int32),
        (0, 2**31 - 1, np.int32),
        (-1, 2**31, np.int64),
        (0, 2**62, np.int64),
    ],
)
def test_arrays_are_written_in_the_narrowest_width_that_holds_them(low, high, kind):
    array = np.array([low, high], dtype=np.int64)
    narrowed = compile_module._narrow(array)
    assert narrowed.dtype == kind
    assert narrowed.tolist() == [low, high]


def test_a_corpus_to_replace_stays_until_the_new_one_is_whole(tmp_path):
    good = make_task(labels=LABELS)
    first = compile_tasks([good], tmp_path / "c", tokenizer=ByteTokenizer(), progress=False)
    broken = dataclasses.replace(good, examples=lambda: iter([Example(input="x", outputs=("",))]))
    with pytest.raises(TaskError, match="output is empty"):
        compile_tasks([broken], tmp_path / "c", tokenizer=ByteTokenizer(), seed=1, progress=False, existing="replace")
    assert Corpus.open(tmp_path / "c").fingerprint == first.fingerprint
    second = compile_tasks(
        [good], tmp_path / "c", tokenizer=ByteTokenizer(), seed=1, progress=False, existing="replace"
    )
    assert second.fingerprint != first.fingerprint
    assert Corpus.open(tmp_path / "c").fingerprint == second.fingerprint


def test_a_compiled_folder_lends_its_tokenizer(tmp_path):
    corpus = compile_tasks([make_task()], tmp_path / "c", tokenizer=BpeSpec(vocab_size=500), progress=False)
    assert choose_tokenizer(str(tmp_path / "c")).fingerprint == corpus.tokenizer.fingerprint
