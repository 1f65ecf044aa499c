# SPDX-License-Identifier: Apache-2.0
"""Compiling: splits, caps, equal bytes for any workers and after a kill, one clear error for each bad input."""

import collections
import dataclasses
import errno
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_zeroprompt.data import compile as compile_module
from lightning_zeroprompt.data.compile import BpeSpec, check_tasks, compile_tasks
from lightning_zeroprompt.data.corpus import Corpus, CorpusError
from lightning_zeroprompt.data.prepare import choose_tokenizer, compile_source, source_tasks
from lightning_zeroprompt.data.shards import Limits, balanced_quota, encode_task, plan_rows, read_part, write_part
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task, TaskError
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

PLAIN = PromptTemplate(name="t", text="Do it:\n{input}")
LABELS = ("red", "green", "blue")


def make_task(number=0, count=40, *, labels=None, examples=None, **changes):
    def generate():
        rng = np.random.default_rng(number)
        for i in range(count):
            if labels is None:
                yield Example(input=f"text {number} {i}", outputs=(f"answer {rng.integers(9)}",))
            else:
                yield Example(
                    input=f"text {number} {i}", outputs=(labels[int(rng.integers(len(labels)))],), options=labels
                )

    listed = generate if examples is None else lambda: iter(examples)
    settings = {"category": "c", "family": f"family {number}", "templates": (PLAIN,), "examples": listed}
    return Task(task_id=f"task {number}", **(settings | changes))


def compiled(tasks, folder, **settings):
    defaults = {"tokenizer": ByteTokenizer(), "progress": False, "source": {"name": "test"}}
    return compile_tasks(tasks, folder, **(defaults | settings))


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def leftovers(folder):
    return [path.name for path in Path(folder).parent.iterdir() if path.name.startswith(Path(folder).name)]


# -- splits and caps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 0), (9, 0), (19, 1), (20, 1), (29, 1), (100, 5), (1000, 50), (5000, 50)]
)
def test_holdout_sizes(count, expected):
    plan = plan_rows(range(count), None, task_id="a", role="train", limits=Limits())
    assert plan.num_heldout == expected
    assert sorted(plan.rows.tolist()) == list(range(count))
    assert plan.class_counts == (count - expected,)


@pytest.mark.parametrize("seed", range(5))
def test_equal_inputs_are_never_on_both_sides(seed):
    keys = np.random.default_rng(seed).integers(0, 60, 400).tolist()
    plan = plan_rows(keys, None, task_id="a", role="train", limits=Limits(seed=seed))
    train, heldout = np.split(plan.rows, [len(plan.rows) - plan.num_heldout])
    assert not {keys[i] for i in train} & {keys[i] for i in heldout}
    assert 0 < len(heldout) <= 20


def test_one_input_for_all_rows_leaves_training_whole():
    plan = plan_rows(["same"] * 100, None, task_id="a", role="train", limits=Limits())
    assert (plan.num_heldout, plan.class_counts) == (0, (100,))


def test_plans_depend_on_seed_and_task_only():
    def rows(task_id, **limits):
        return plan_rows(range(200), None, task_id=task_id, role="train", limits=Limits(**limits)).rows.tolist()

    assert rows("a") == rows("a")
    assert rows("a") != rows("b")
    assert rows("a") != rows("a", seed=1)
    # A cap takes the beginning of the same order and leaves the hold-out as it is.
    assert rows("a", max_examples_per_task=50) == rows("a")[:50] + rows("a")[-10:]


@pytest.mark.parametrize("seed", range(20))
def test_balanced_quota_against_one_at_a_time(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 12, rng.integers(1, 9)).tolist()
    total = int(rng.integers(0, 60))
    expected = [0] * len(counts)
    while sum(expected) < min(total, sum(counts)):
        open_groups = [i for i, c in enumerate(counts) if expected[i] < c]
        expected[min(open_groups, key=lambda i: (expected[i], i))] += 1
    quota = balanced_quota(counts, total)
    assert sorted(quota.tolist()) == sorted(expected)
    assert (quota <= counts).all()
    assert quota.sum() == min(total, sum(counts))


def test_class_caps():
    classes = [0] * 300 + [1] * 20 + [2] * 100
    per_class = plan_rows(range(420), classes, task_id="a", role="train", limits=Limits(max_examples_per_class=64))
    assert sum(count <= 64 for count in per_class.class_counts) == 3
    assert per_class.class_counts[0] == per_class.class_counts[2] == 64
    assert per_class.num_capped == 420 - len(per_class.rows)
    total = plan_rows(range(420), classes, task_id="a", role="train", limits=Limits(max_examples_per_task=90))
    assert sum(total.class_counts) == 90
    assert max(total.class_counts[0], total.class_counts[2]) - min(total.class_counts[0], total.class_counts[2]) <= 1
    boundaries = np.cumsum((0, *total.class_counts))
    for label, (start, end) in enumerate(itertools.pairwise(boundaries)):
        assert {classes[row] for row in total.rows[start:end]} == {label}


def test_heldout_tasks_keep_order_and_have_their_own_cap():
    limits = Limits(max_examples_per_task=3, max_heldout_examples=7)
    plan = plan_rows(range(50), [0] * 50, task_id="a", role="heldout", limits=limits)
    assert (len(plan.rows), plan.num_heldout, plan.class_counts, plan.num_capped) == (7, 0, (), 43)
    assert (np.diff(plan.rows) > 0).all()


@pytest.mark.parametrize(
    "bad",
    [{"max_examples_per_task": 0}, {"max_examples_per_class": 0}, {"max_heldout_examples": 0}, {"max_input_tokens": 0}],
)
def test_caps_of_zero_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is 0"):
        compiled([make_task()], tmp_path / "c", **bad)
    assert not leftovers(tmp_path / "c")


def test_other_limits_are_checked():
    for bad, message in (
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0"),
        ({"heldout_max": -1}, "heldout_max is -1"),
        ({"long_inputs": "x"}, "long_inputs is 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            Limits(**bad)


def test_labels_need_the_same_set_in_all_rows():
    same = [Example(input=str(i), outputs=("a",), options=("a", "b") if i % 2 else ("b", "a")) for i in range(4)]
    part = encode_task(make_task(examples=same), same, ByteTokenizer(), Limits())
    assert part.info["labels"] == ["b", "a"]
    assert part.arrays["row_label"].tolist() == [1] * 4
    other = [*same, Example(input="x", outputs=("c",), options=("a", "c"))]
    part = encode_task(make_task(examples=other), other, ByteTokenizer(), Limits())
    assert (part.info["labels"], part.info["kind"]) == (None, "choice")
    mixed = [*same, Example(input="x", outputs=("c",))]
    assert encode_task(make_task(examples=mixed), mixed, ByteTokenizer(), Limits()).info["kind"] == "generation"


def test_double_options_are_merged_and_single_ones_dropped():
    rows = [
        Example(input="p", outputs=("a",), options=("a", "b", "a")),
        Example(input="q", outputs=("a",), options=("a", "a")),
        Example(input="r", outputs=("c",), options=("a", "b", "c")),
    ]
    part = encode_task(make_task(examples=rows), rows, ByteTokenizer(), Limits())
    assert sorted(part.arrays["row_num_options"].tolist()) == [2, 3]
    assert part.info["num_dropped"] == 1


# -- long inputs -------------------------------------------------------------------------------------------------------


def long_examples():
    return [
        Example(input="0123456789abcdefghijklmnopqrstuv"[:size], outputs=("o" * 50,), fields={"more": "y"})
        for size in (5, 10, 11, 30)
    ]


def test_long_inputs_are_cut_and_counted(tmp_path):
    corpus = compiled([make_task(examples=long_examples())], tmp_path / "c", max_input_tokens=10)
    texts = [
        [corpus.tokenizer.decode(corpus.segment(int(row) + k)) for k in range(3)] for row in corpus.row_first_segment
    ]
    assert sorted(text for text, *_ in texts) == ["01234", *["0123456789"] * 3]
    assert all(rest == ["y", "o" * 50] for _, *rest in texts)
    assert corpus.tasks[0].num_truncated == corpus.counts["truncated"] == 2
    assert corpus.tasks[0].mean_input_tokens == pytest.approx((5 + 10 + 10 + 10) / 4 + 1)
    assert corpus.tasks[0].mean_output_tokens == 50


def test_long_inputs_are_dropped_and_counted(tmp_path):
    task = make_task(examples=long_examples())
    corpus = compiled([task], tmp_path / "c", max_input_tokens=10, long_inputs="drop")
    assert (corpus.tasks[0].num_rows, corpus.tasks[0].num_dropped, corpus.tasks[0].num_truncated) == (2, 2, 0)
    with pytest.raises(TaskError, match="all 4 examples are longer than max_input_tokens=4"):
        compiled([task], tmp_path / "d", max_input_tokens=4, long_inputs="drop")


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


def test_parts_round_trip(tmp_path):
    task = make_task(labels=LABELS)
    part = encode_task(task, list(task.examples()), ByteTokenizer(), Limits())
    write_part(part, tmp_path / "p.npz")
    again = read_part(tmp_path / "p.npz")
    assert (again.info, again.templates) == (part.info, part.templates)
    assert all(np.array_equal(again.arrays[k], v) and again.arrays[k].dtype == v.dtype for k, v in part.arrays.items())
    assert read_part(tmp_path / "nothing.npz") is None


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


# -- bad tasks ---------------------------------------------------------------------------------------------------------

GOOD = Example(input="a", outputs=("b",))
CHOICE = Example(input="a", outputs=("b",), options=("b", "c"))


def template(text, **more):
    return {"templates": (PromptTemplate(name="t", text=text, **more),)}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (make_task(examples=[]), "task 'task 0' has no examples"),
        (make_task(templates=()), "task 'task 0' has no template"),
        (make_task(examples=[Example(input="a", outputs=(" ",))]), "task 'task 0', example 0: an output is empty"),
        (make_task(examples=[GOOD, Example(input="a", outputs=())]), "task 'task 0', example 1: no output"),
        (
            make_task(examples=[Example(input="a", outputs=("x",), options=("y", "z"))]),
            "task 'task 0', example 0: the options .* do not contain the answer 'x'",
        ),
        (make_task(examples=[Example(input="a", outputs=("x",), options=("x",))]), r"example 0: 1 option\(s\)"),
        (make_task(examples=[Example(input="a", outputs=("x",), options=("x", "x"))]), "all options are the same text"),
        (
            make_task(examples=[GOOD, Example(input="a\udcff", outputs=("x",))]),
            "example 1 holds text that is not valid UTF-8",
        ),
        (make_task(**template("{nothing}")), "'task 0': template 't' has the unknown variable 'nothing'"),
        (make_task(**template("{input} {options}")), "not every example has options"),
        (make_task(**template("{input.x}")), "placeholder 'input.x' is not a plain name"),
        (make_task(**template("no variable")), "has no placeholder"),
        (make_task(**template("{input")), "braces"),
        (make_task(**template("{input}", verbalizer=("a",))), "has a verbalizer, but the task has no closed label set"),
        (make_task(examples=[CHOICE], **template("{input}", verbalizer=("a",))), "1 verbalizer words for 2 labels"),
        (
            make_task(examples=[Example(input="a", outputs=("b",), fields={"options": "x"})]),
            "names a field 'input' or 'options'",
        ),
        (make_task(examples=[GOOD, Example(input="a", outputs=("b",), fields={"x": "x"})]), "example 1 has the fields"),
        (make_task(training_allowed=False), "'task 0' .* may not be used for training"),
    ],
)
def test_bad_tasks_are_named_and_leave_nothing(tmp_path, task, message):
    good = make_task(5)
    with pytest.raises(TaskError, match=message):
        compiled([good, task], tmp_path / "c")
    assert not leftovers(tmp_path / "c")


def test_bad_collections_are_refused():
    with pytest.raises(TaskError, match="no tasks"):
        check_tasks([])
    with pytest.raises(TaskError, match="two tasks have the id 'task 1'"):
        check_tasks([make_task(1), make_task(1)])
    with pytest.raises(TaskError, match=r"family 'f' is on both sides: task 'task 0' trains and 'task 1' is held out"):
        check_tasks([make_task(0, family="f"), make_task(1, family="f", role="heldout")])
    check_tasks([make_task(0, role="heldout", training_allowed=False), make_task(1)])


def test_sources_that_cannot_be_read(tmp_path):
    def broken():
        yield GOOD
        b"\xff".decode("utf-8")

    def gone():
        yield GOOD
        (tmp_path / "nothing").read_text()

    for number, (examples, message) in enumerate([(broken, "bytes that are not UTF-8"), (gone, "could not be read")]):
        with pytest.raises(TaskError, match=f"task 'task 0': its source .*{message}"):
            compiled([dataclasses.replace(make_task(), examples=examples)], tmp_path / str(number))
        assert not leftovers(tmp_path / str(number))


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
