# SPDX-License-Identifier: Apache-2.0
"""Draws against brute-force bookkeeping: quotas, classes, epochs, caps, phases, and the permutations below them."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_zeroprompt.data.corpus import TaskInfo
from lightning_zeroprompt.data.mixture import Mixture, MixtureSettings, select_tasks
from lightning_zeroprompt.data.permutation import SHORT, below, mix64, permute, stream_key

HELDOUT = 3


def corpus(classes, *, categories=None, tiers=None):
    """Tasks with the given class sizes (one number: no classes), three templates each of which the last is held out."""
    tasks, row = [], 0
    for index, sizes in enumerate(classes):
        tasks.append(
            TaskInfo(
                index=index,
                task_id=f"task{index}",
                category=categories[index] if categories else "c",
                family=f"f{index}",
                role="train",
                metric="rouge_l",
                language="en",
                licence="",
                origin="synthetic",
                domain="",
                tier=tiers[index] if tiers else 0,
                benchmark="",
                source="",
                cluster="",
                fields=("input",),
                labels=tuple(map(str, range(len(sizes)))) if len(sizes) > 1 else None,
                first_row=row,
                num_rows=sum(sizes) + HELDOUT,
                num_heldout_rows=HELDOUT,
                class_counts=tuple(sizes),
                first_template=3 * index,
                num_templates=3,
                kind="choice" if len(sizes) > 1 else "generation",
            )
        )
        row += sum(sizes) + HELDOUT
    roles = np.array([0, 0, 1] * len(classes), dtype=np.int8)
    return SimpleNamespace(tasks=tuple(tasks), template_role=roles, fingerprint="a" * 64)


def class_of(data, row):
    """(task, class, place in the class) of a row; the class of held-out rows is None."""
    task = next(task for task in data.tasks if task.first_row <= row < task.first_row + task.num_rows)
    place = row - task.first_row
    for number, size in enumerate(task.class_counts):
        if place < size:
            return task.index, number, place
        place -= size
    return task.index, None, place


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__slots__)


def test_mix64_is_splitmix64():
    def reference(state):
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    values = [0, 1, 2**63, 2**64 - 1, 123456789]
    assert mix64(np.array(values, dtype=np.uint64)).tolist() == [reference(value) for value in values]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permute_is_a_permutation_for_every_key(size):
    keys = mix64(np.arange(20, dtype=np.uint64))
    moved = permute(size, keys[:, None], np.arange(size)[None])
    assert np.array_equal(np.sort(moved, axis=1), np.tile(np.arange(size), (20, 1)))
    if size > 60:
        assert len({tuple(row) for row in moved.tolist()}) == 20


def test_permute_takes_different_sizes_at_once_and_does_not_depend_on_company():
    sizes = np.array([5, 1000, 1, 37, 5])
    positions = np.array([4, 999, 0, 12, 0])
    keys = np.arange(5, dtype=np.uint64)
    alone = [int(permute(*one)) for one in zip(sizes, keys, positions, strict=True)]
    assert permute(sizes, keys, positions).tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_of_a_short_list_is_equally_likely(size):
    """Chi-square over all orders of 60,000 keys, at most 6 standard deviations above its mean."""
    keys = mix64(np.arange(60_000, dtype=np.uint64))
    moved = permute(size, keys[:, None], np.arange(size)[None], rounds=SHORT)
    counts = Counter(map(tuple, moved.tolist()))
    expected = 60_000 / math.factorial(size)
    freedom = math.factorial(size) - 1
    chi = sum((counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
    assert chi < freedom + 6 * math.sqrt(2 * freedom)


def test_positions_of_a_permutation_are_uniform():
    keys = mix64(np.arange(50_000, dtype=np.uint64))
    counts = np.bincount(permute(100, keys, 17), minlength=100)
    assert ((counts - 500) ** 2 / 500).sum() < 99 + 6 * math.sqrt(198)


def test_below_is_uniform_and_keys_of_purposes_differ():
    words = mix64(np.arange(70_000, dtype=np.uint64) + stream_key(3, "x"))
    counts = np.bincount(below(words, 7))
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 6 + 6 * math.sqrt(12)
    assert len({int(stream_key(seed, name)) for seed in (0, 1, -1) for name in ("a", "b", "ab", "ba")}) == 12


@pytest.mark.parametrize("block", [None, 48, 1000])
def test_draws_are_a_pure_function_of_the_position(block):
    data = corpus([[10, 20], [300], [5, 5, 5], [40]])
    settings = MixtureSettings(temperature=1, block_size=block, curriculum=((70, (0, 1)), (333, (2, 0, 1))))
    whole = Mixture(data, [0, 1, 2, 3], seed=5, settings=settings).draws(0, 3000)
    again = Mixture(data, [0, 1, 2, 3], seed=5, settings=settings)
    assert whole.index.tolist() == list(range(3000))
    for start, count in [(0, 1), (69, 2), (70, 333), (399, 900), (2999, 1), (17, 0)]:
        part = again.draws(start, count)
        assert all(
            np.array_equal(getattr(part, name), getattr(whole, name)[start : start + count]) for name in part.__slots__
        )
    assert not equal(whole, Mixture(data, [0, 1, 2, 3], seed=6, settings=settings).draws(0, 3000))


def test_a_position_far_out_is_as_good_as_any():
    data = corpus([[10, 20], [300], [40]])
    mixture = Mixture(data, [0, 1, 2])
    far = 10**12 + 7
    longer, shorter = mixture.draws(far, 15), mixture.draws(far + 10, 5)
    assert all(np.array_equal(getattr(longer, name)[10:], getattr(shorter, name)) for name in longer.__slots__)


@pytest.mark.parametrize(
    "settings",
    [
        MixtureSettings(),
        MixtureSettings(temperature=1, max_per_class=None, max_per_task=None, block_size=500),
        MixtureSettings(temperature=2, category_exponent=0.5, block_size=37),
        MixtureSettings(task_weights=tuple(1 + number % 4 for number in range(23)), block_size=64),
        MixtureSettings(category_exponent=0, block_size=1000),
    ],
)
def test_no_task_is_an_example_off_its_target_in_any_block(settings):
    """The quota never differs by one whole draw from the target, and over 256 blocks it is exact."""
    generator = np.random.default_rng(0)
    sizes = [generator.integers(20, 300, generator.integers(1, 4)).tolist() for _ in range(23)]
    data = corpus(sizes, categories=[f"c{number % 5 * number % 3}" for number in range(23)])
    mixture = Mixture(data, range(23), seed=1, settings=settings)
    block = settings.block_size or 256
    targets = mixture.targets()
    assert targets.sum() == pytest.approx(1, abs=1e-12)
    task = mixture.draws(0, 256 * block).task.reshape(256, block)
    counts = np.stack([np.bincount(row, minlength=23) for row in task])
    assert np.abs(counts - targets * block).max() < 1
    assert np.array_equal(counts.sum(0), np.rint(targets * block * 256))
    assert np.array_equal(mixture.realised(0, 256 * block), counts.sum(0))
    assert (task[0] != np.sort(task[0])).any()


def test_targets_follow_temperature_categories_and_weights():
    data = corpus([[100], [400], [900], [400]], categories=["a", "a", "a", "b"])

    def targets(**settings):
        given = MixtureSettings(max_per_task=None, max_per_class=None, block_size=4000, **settings)
        return Mixture(data, range(4), settings=given).targets()

    near = {"abs": 1 / (256 * 4000)}
    assert targets() == pytest.approx([0.25] * 4, **near)
    assert targets(temperature=1) == pytest.approx(np.array([1, 4, 9, 4]) / 18, **near)
    assert targets(temperature=2) == pytest.approx(np.array([1, 2, 3, 2]) / 8, **near)
    assert targets(category_exponent=0) == pytest.approx([1 / 6] * 3 + [1 / 2], **near)
    assert targets(category_exponent=1, temperature=1) == pytest.approx([3 / 56, 12 / 56, 27 / 56, 1 / 4], **near)
    assert targets(task_weights=(1, 2, 1, 4)) == pytest.approx(np.array([1, 2, 1, 4]) / 8, **near)
    capped = Mixture(data, range(4), settings=MixtureSettings(max_per_task=300, temperature=1, block_size=4000))
    assert capped.targets() == pytest.approx(np.array([1, 3, 3, 3]) / 10, **near)


@pytest.mark.parametrize("balance", [True, False])
def test_rows_come_once_an_epoch_from_a_fixed_subset_without_the_held_out_ones(balance):
    data = corpus([[10, 200, 30], [500], [7]])
    settings = MixtureSettings(max_per_class=40, max_per_task=64, class_balance=balance, block_size=24)
    mixture = Mixture(data, [2, 0, 1], seed=3, settings=settings)
    draws = mixture.draws(0, 24 * 500)
    caps = {0: [10, 40, 30], 1: [64], 2: [7]}
    assert mixture.rows_used.tolist() == [7, 80, 64]
    for task, sizes in caps.items():
        rows = draws.row[draws.task == task]
        classes = [class_of(data, row) for row in rows.tolist()]
        assert {found for found, _, _ in classes} == {task}
        members = np.array([member for _, member, _ in classes])
        if balance:
            whole = members[: len(members) // len(sizes) * len(sizes)].reshape(-1, len(sizes))
            assert (np.sort(whole, axis=1) == np.arange(len(sizes))).all()
            streams = [(rows[members == member], size) for member, size in enumerate(sizes)]
        else:
            streams = [(rows, sum(sizes))]
            assert np.bincount(members[: sum(sizes)]).tolist() == sizes
        for stream, size in streams:
            epochs = stream[: len(stream) // size * size].reshape(-1, size)
            assert len(epochs) >= 3
            subset = set(epochs[0].tolist())
            assert len(subset) == size
            assert all(set(epoch.tolist()) == subset for epoch in epochs)
            if size > 5:
                assert (epochs[0] != epochs[1]).any()
    other = Mixture(data, [2, 0, 1], seed=4, settings=settings).draws(0, 24 * 100)
    assert set(other.row[other.task == 1].tolist()) != set(draws.row[draws.task == 1].tolist())


def test_the_capped_subset_stays_when_other_tasks_join_and_through_the_curriculum():
    data = corpus([[500], [400], [300]])
    alone = Mixture(data, [1], seed=9).draws(0, 256)
    staged = MixtureSettings(curriculum=((600, (1, 2)),))
    together = Mixture(data, [0, 1, 2], seed=9, settings=staged).draws(0, 3000)
    assert set(together.row[together.task == 1].tolist()) == set(alone.row.tolist())


def test_the_order_of_classes_changes_between_rounds():
    data = corpus([[50, 50, 50]])
    draws = Mixture(data, [0]).draws(0, 300)
    orders = Counter(tuple(class_of(data, row)[1] for row in three) for three in draws.row.reshape(-1, 3).tolist())
    assert len(orders) == 6


def test_templates_denoising_and_keys():
    """Shares of 20,000 draws within 5 standard deviations."""
    data = corpus([[300], [100]])
    draws = Mixture(data, [0, 1], settings=MixtureSettings(denoising=0.3)).draws(0, 20_000)
    assert set(draws.template.tolist()) == {0, 1, 3, 4}
    assert (draws.template // 3 == draws.task).all()
    assert abs((draws.template % 3).mean() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    assert abs(draws.denoise.mean() - 0.3) < 5 * math.sqrt(0.21 / 20_000)
    assert abs(np.corrcoef(draws.denoise, draws.template % 3)[0, 1]) < 5 / math.sqrt(20_000)
    assert len(set(draws.key.tolist())) == 20_000
    assert not Mixture(data, [0, 1], settings=MixtureSettings(denoising=0)).draws(0, 1000).denoise.any()


def test_the_curriculum_mixes_the_tasks_of_its_phases():
    data = corpus([[50], [60], [70], [80]])
    settings = MixtureSettings(curriculum=((100, (3,)), (250, (3, 0, 17))))
    mixture = Mixture(data, [3, 2, 1, 0], settings=settings)
    task = mixture.draws(0, 2000).task
    assert set(task[:100].tolist()) == {3}
    assert set(task[100:350].tolist()) == {0, 3}
    assert set(task[350:].tolist()) == {0, 1, 2, 3}
    assert mixture.phases == ((0, 100), (100, 250), (350, None))
    assert mixture.targets(1).tolist() == pytest.approx([0.5, 0, 0, 0.5])
    assert mixture.realised(100, 250)[1:3].tolist() == [0, 0]


def test_fingerprints_tell_everything_apart_that_changes_draws():
    data = corpus([[50], [60], [70]])
    mixtures = [
        Mixture(data, [0, 1]),
        Mixture(data, [0, 2]),
        Mixture(data, [0, 1], seed=1),
        Mixture(data, [0, 1], settings=MixtureSettings(denoising=0.1)),
        Mixture(SimpleNamespace(**{**vars(data), "fingerprint": "b" * 64}), [0, 1]),
    ]
    assert len({mixture.fingerprint for mixture in mixtures}) == len(mixtures)
    assert Mixture(data, [0, 1]).fingerprint == mixtures[0].fingerprint


def test_selected_tasks_are_nested_stratified_and_of_the_core_first():
    categories = ["big"] * 60 + ["mid"] * 30 + ["small"] * 10 + ["extra"] * 50
    data = corpus([[30]] * 150, categories=categories, tiers=[0] * 100 + [1] * 50)
    whole = select_tasks(data.tasks, None, seed=2)
    assert sorted(whole) == list(range(150))
    for count in (1, 10, 40, 100, 120):
        chosen = select_tasks(data.tasks, count, seed=2)
        assert chosen == whole[:count]
        if count <= 100:
            assert max(chosen) < 100
            for category, share in (("big", 0.6), ("mid", 0.3), ("small", 0.1)):
                found = sum(data.tasks[number].category == category for number in chosen)
                assert abs(found - share * count) <= 1
    assert select_tasks(data.tasks, 40, seed=3) != select_tasks(data.tasks, 40, seed=2)


def test_tasks_that_cannot_be_trained_on_are_not_selected():
    data = corpus([[30]] * 3)
    heldout = TaskInfo(**{name: getattr(data.tasks[1], name) for name in TaskInfo.__slots__} | {"role": "heldout"})
    tasks = (data.tasks[0], heldout, data.tasks[2])
    assert sorted(select_tasks(tasks)) == [0, 2]
    with pytest.raises(ValueError, match="asked for 3 training tasks; the corpus has 2"):
        select_tasks(tasks, 3)
    with pytest.raises(ValueError, match="asked for 0"):
        select_tasks(tasks, 0)
    data.tasks = tasks
    with pytest.raises(ValueError, match=r"'task1' .role 'heldout'. has 0 training rows"):
        Mixture(data, [0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_per_class": 0}, "max_per_class is 0"),
        ({"max_per_task": -1}, "max_per_task is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"denoising": 1}, "denoising is 1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"task_weights": (1.0, 0.0)}, "task_weights has 0"),
        ({"curriculum": ((0, (1,)),)}, "phase has 0 draws"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureSettings(**settings)


def test_mixtures_that_cannot_be_are_refused():
    data = corpus([[1], [100_000]])
    with pytest.raises(ValueError, match="mixture of no tasks"):
        Mixture(data, [])
    with pytest.raises(ValueError, match="twice"):
        Mixture(data, [0, 0])
    with pytest.raises(ValueError, match="2 numbers for 1 tasks"):
        Mixture(data, [0], settings=MixtureSettings(task_weights=(1, 1)))
    with pytest.raises(ValueError, match="phase 0 of the curriculum names none of the 1"):
        Mixture(data, [0], settings=MixtureSettings(curriculum=((5, (1,)),)))
    settings = MixtureSettings(max_per_task=None, temperature=1, block_size=16)
    with pytest.raises(ValueError, match="task 0 has the share"):
        Mixture(data, [0, 1], settings=settings)
    with pytest.raises(ValueError, match="not negative"):
        Mixture(data, [0]).draws(-1, 5)
    data.template_role[:] = 1
    with pytest.raises(ValueError, match="no template of role 'train'"):
        Mixture(data, [0])
