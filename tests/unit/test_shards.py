# SPDX-License-Identifier: Apache-2.0
"""What is kept of a task: splits, caps, long inputs, labels, and one clear error for each bad task."""

import dataclasses
import itertools

import numpy as np
import pytest
from compiling import LABELS, compiled, leftovers, make_task

from lightning_zeroprompt.data.compile import check_tasks
from lightning_zeroprompt.data.shards import Limits, balanced_quota, encode_task, plan_rows, read_part, write_part
from lightning_zeroprompt.data.task import Example, PromptTemplate, TaskError
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

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


def test_parts_round_trip(tmp_path):
    task = make_task(labels=LABELS)
    part = encode_task(task, list(task.examples()), ByteTokenizer(), Limits())
    write_part(part, tmp_path / "p.npz")
    again = read_part(tmp_path / "p.npz")
    assert (again.info, again.templates) == (part.info, part.templates)
    assert all(np.array_equal(again.arrays[k], v) and again.arrays[k].dtype == v.dtype for k, v in part.arrays.items())
    assert read_part(tmp_path / "nothing.npz") is None


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
