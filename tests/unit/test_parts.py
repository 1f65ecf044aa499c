# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.prompts.parts import CONFIRM_SHARE, choose_parts, pseudo_labels
from lightning_zeroprompt.prompts.pool import ExamplePool, PoolError

LABELS = ("yes", "no", "perhaps")


def make_pool(count=200, *, answers=None, texts=None, labels=LABELS, free=False):
    answers = answers or [labels[i % len(labels)] for i in range(count)]
    texts = texts or [f"text {i}" for i in range(count)]
    examples = [
        Example(input=text, outputs=(answer,) if answer else (), options=None if free else labels)
        for text, answer in zip(texts, answers, strict=True)
    ]
    return ExamplePool.from_examples("task", examples, (PromptTemplate(name="t", text="{input}?"),), ByteTokenizer())


def inputs(pool, rows):
    return {pool.example(row).input for row in rows.tolist()}


def assert_disjoint(pool, parts):
    named = [inputs(pool, rows) for rows in (parts.search, parts.confirm, parts.test)]
    assert len(set.union(*named)) == sum(map(len, named))


@pytest.mark.parametrize("mode", ["few_label", "zero_label", "many_label"])
def test_parts_are_disjoint_seeded_and_of_the_asked_size(mode):
    pool = make_pool()
    parts = choose_parts(pool, mode=mode, k=64, seed=3)
    assert_disjoint(pool, parts)
    # Five in eight, of each label where labels are read.
    assert (len(parts.search) + len(parts.confirm), len(parts.test)) == (64, 100)
    assert abs(len(parts.confirm) - 40) <= 1
    even = choose_parts(pool, mode=mode, k=64, seed=3, confirm_share=0.5)
    assert (len(even.search), len(even.confirm), set(even.test)) == (32, 32, set(parts.test))
    assert (parts.mode, parts.k, parts.seed, parts.num_duplicates, parts.counted) == (mode, 64, 3, 0, True)
    again, other = choose_parts(pool, mode=mode, k=64, seed=3), choose_parts(pool, mode=mode, k=64, seed=4)
    for name in ("search", "confirm", "test"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(again, name))
        assert set(getattr(parts, name)) != set(getattr(other, name))


def test_few_labels_are_even_over_the_classes():
    answers = ["yes"] * 150 + ["no"] * 45 + ["perhaps"] * 5
    pool = make_pool(answers=answers)
    for seed in range(5):
        parts = choose_parts(pool, k=40, seed=seed, test_share=0.2)
        rare = int((pool.label[np.setdiff1d(np.arange(200), parts.test)] == 2).sum())
        both = np.concatenate([parts.search, parts.confirm])
        counts = np.bincount(pool.label[both], minlength=3)
        assert counts[2] == rare
        assert abs(counts[0] - counts[1]) <= 1
        assert counts.sum() == 40
        for part, share in ((parts.search, 1 - CONFIRM_SHARE), (parts.confirm, CONFIRM_SHARE)):
            assert np.abs(np.bincount(pool.label[part], minlength=3) - counts * share).max() < 1


def test_a_larger_k_contains_a_smaller_one_and_leaves_the_test_part():
    pool = make_pool()
    small, large = choose_parts(pool, k=12), choose_parts(pool, k=60)
    assert set(small.search) <= set(large.search)
    assert set(small.confirm) <= set(large.confirm)
    np.testing.assert_array_equal(small.test, large.test)


def test_many_labels_of_one_row_each_reach_both_parts():
    labels = tuple(f"label {i}" for i in range(40))
    parts = choose_parts(make_pool(80, labels=labels), k=20)
    assert (len(parts.search), len(parts.confirm)) == (8, 12)


def test_zero_label_reads_no_label():
    pool = make_pool()
    blind = pool.with_labels([-2] * len(pool))
    lonely = pool.with_labels([0] * len(pool))
    one, two, three = (choose_parts(p, mode="zero_label", k=40) for p in (pool, blind, lonely))
    np.testing.assert_array_equal(one.search, two.search)
    np.testing.assert_array_equal(one.confirm, three.confirm)


def test_many_label_takes_all_that_is_labelled_up_to_k():
    answers = [LABELS[i % 3] if i % 4 else None for i in range(200)]
    pool = make_pool(answers=answers)
    parts = choose_parts(pool, mode="many_label", k=None)
    assert parts.k == len(parts.search) + len(parts.confirm) == int((np.delete(pool.label, parts.test) >= 0).sum())
    assert choose_parts(pool, mode="many_label", k=1000).k == parts.k
    assert choose_parts(pool, mode="many_label", k=10).k == 10


def test_equal_inputs_stand_in_one_part():
    texts = [f"text {i // 2}" for i in range(200)]
    pool = make_pool(texts=texts)
    for seed in range(5):
        parts = choose_parts(pool, k=20, seed=seed)
        assert_disjoint(pool, parts)
        assert len(inputs(pool, parts.test)) == len(parts.test) == 50
        assert parts.num_duplicates == 100
        assert not parts.counted
    # A test part from elsewhere keeps its rows; what it holds is left out of the others.
    given = np.arange(100, 200)
    shared = make_pool(texts=[f"text {i % 120}" for i in range(200)])
    parts = choose_parts(shared, k=10, test_rows=given)
    np.testing.assert_array_equal(parts.test, given)
    named = inputs(shared, parts.search) | inputs(shared, parts.confirm)
    assert not named & inputs(shared, given)
    assert parts.num_duplicates == 80


def test_free_answers_have_no_classes():
    pool = make_pool(answers=["a"] * 200, free=True)
    parts = choose_parts(pool, k=10)
    assert (len(parts.search), len(parts.confirm)) == (4, 6)


def test_small_tasks_are_not_counted():
    assert choose_parts(make_pool(128), k=10).counted
    assert not choose_parts(make_pool(127), k=10).counted


@pytest.mark.parametrize(
    ("pool", "settings", "error", "wording"),
    [
        (lambda: make_pool(answers=[None] * 200), {}, PoolError, "no labelled example"),
        (lambda: make_pool(answers=["no"] * 200), {}, PoolError, "100 labelled examples .* have the answer 'no'"),
        (make_pool, {"k": 101}, PoolError, "leaves 100 labelled ones; give k of at most 100"),
        (make_pool, {"k": 101, "mode": "zero_label"}, PoolError, "leaves 100; give k"),
        (lambda: make_pool(answers=["a"] * 200, free=True), {"mode": "zero_label"}, PoolError, "free answers"),
        (lambda: make_pool(2), {"k": 2}, PoolError, "k of at most 1|none is left|have the answer"),
        (make_pool, {"test_rows": [200]}, PoolError, "rows 0 to 199"),
        (make_pool, {"test_rows": []}, PoolError, "rows 0 to 199"),
        (make_pool, {"mode": "some"}, ValueError, "few_label, zero_label, many_label"),
        (make_pool, {"k": 1}, ValueError, "k=1"),
        (make_pool, {"confirm_share": 1.0}, ValueError, "confirm_share=1.0"),
        (make_pool, {"k": 2, "confirm_share": 0.1}, PoolError, "part 'confirm'"),
    ],
)
def test_impossible_parts_are_refused(pool, settings, error, wording):
    with pytest.raises(error, match=wording):
        choose_parts(pool(), **settings)


def test_a_task_without_templates_is_refused():
    import dataclasses

    with pytest.raises(PoolError, match="no template"):
        choose_parts(dataclasses.replace(make_pool(), templates=()))


def test_pseudo_labels_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, size=50)
    logprobs = rng.normal(scale=3, size=(4, counts.sum()))
    logprobs[2, 5] = np.nan
    labels, confidence = pseudo_labels(logprobs, counts)
    start = 0
    for row, count in enumerate(counts):
        means = np.zeros(count)
        for prompt in (0, 1, 3):
            values = logprobs[prompt, start : start + count]
            means += (values - np.log(np.exp(values).sum())) / 3
        weights = np.exp(means) / np.exp(means).sum()
        assert labels[row] == int(np.argmax(means))
        assert confidence[row] == pytest.approx(weights.max(), rel=1e-9)
        start += count


def test_pseudo_labels_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="3 log-probabilities a prompt for 2 rows with 4 options"):
        pseudo_labels(np.zeros((1, 3)), [2, 2])
    with pytest.raises(ValueError, match="none of 1 prompts"):
        pseudo_labels([[np.nan, 0.0]], [2])
