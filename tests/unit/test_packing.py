# SPDX-License-Identifier: Apache-2.0
"""Packing against its capacities, and batches taken apart again against the joined draws they were made from."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.join import Joiner
from lightning_zeroprompt.data.mixture import Mixture, MixtureSettings, select_tasks
from lightning_zeroprompt.data.packing import IGNORE, BatchStream, PackingSettings, check_replicas, pack
from lightning_zeroprompt.data.sources.parquet import parquet_tasks
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six tasks of mixed lengths, closed and free."""

    def examples(number):
        generator = np.random.default_rng(number)
        for count in range(80):
            text = f"{number}.{count} " + "x" * int(generator.integers(1, 25 * (1 + number)))
            if number % 2:
                yield Example(input=text, outputs=(("yes", "no")[count % 2],), options=("yes", "no"))
            else:
                yield Example(input=text, outputs=("answer " * int(generator.integers(1, 4)),))

    tasks = [
        Task(
            task_id=f"task{number}",
            category="c",
            family=f"f{number}",
            templates=(PromptTemplate(name="a", text="{input}?"), PromptTemplate(name="b", text="Say: {input} now")),
            examples=lambda number=number: examples(number),
        )
        for number in range(6)
    ]
    return compile_tasks(
        tasks, tmp_path_factory.mktemp("packing") / "corpus", tokenizer=ByteTokenizer(), progress=False
    )


def make_stream(corpus, *, seed=0, mixture=None, tasks=range(6), **settings):
    shape = {"encoder_length": 160, "decoder_length": 80, "rows_per_batch": 8} | settings
    return BatchStream(corpus, Mixture(corpus, tasks, seed=seed, settings=mixture), PackingSettings(**shape))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 5, 60, 400])
def test_no_row_holds_more_than_its_capacities(seed, rows):
    generator = np.random.default_rng(seed)
    encoder, decoder = generator.integers(1, 101, 300), generator.integers(1, 41, 300)
    placed = pack(encoder, decoder, rows=rows, encoder_capacity=100, decoder_capacity=40)
    assert placed.max() < rows
    used = placed[placed >= 0]
    assert np.bincount(used, weights=encoder[placed >= 0]).max() <= 100
    assert np.bincount(used, weights=decoder[placed >= 0]).max() <= 40
    counts = np.bincount(used, minlength=rows)
    assert counts.min() > 0 or counts.max() == 1
    if rows >= 300:
        assert (placed >= 0).all()
        assert counts.max() == 1
    else:
        encoder_free = 100 - np.bincount(used, weights=encoder[placed >= 0], minlength=rows)
        decoder_free = 40 - np.bincount(used, weights=decoder[placed >= 0], minlength=rows)
        for example in np.flatnonzero(placed < 0):
            assert not ((encoder_free >= encoder[example]) & (decoder_free >= decoder[example])).any()


def test_packing_is_tight_where_a_perfect_packing_exists():
    """Rows are cut into random pieces; the pieces go back into at most 2 % more rows."""
    generator = np.random.default_rng(1)
    pieces = []
    for _ in range(500):
        borders = np.sort(generator.choice(np.arange(1, 256), generator.integers(2, 7), replace=False))
        pieces += np.diff(np.concatenate([[0], borders, [256]])).tolist()
    encoder = np.array(pieces)
    placed = pack(encoder, np.ones_like(encoder), rows=510, encoder_capacity=256, decoder_capacity=64)
    assert (placed >= 0).all()


def test_every_row_gets_its_share_of_small_examples_with_long_targets():
    """Packed by input size alone, large examples fill half of the rows, and 150 small ones overflow the other half."""
    encoder = np.array([50] * 100 + [10] * 400)
    decoder = np.array([2] * 100 + [8] * 400)
    placed = pack(encoder, decoder, rows=100, encoder_capacity=100, decoder_capacity=40)
    assert (placed >= 0).all()


def test_no_row_is_empty_while_another_has_two():
    encoder = np.array([100] * 8 + [5] * 5)
    placed = pack(encoder, np.ones_like(encoder), rows=10, encoder_capacity=100, decoder_capacity=40)
    assert np.bincount(placed, minlength=10).min() == 1


def test_packing_refuses_what_no_row_holds_and_takes_nothing():
    with pytest.raises(ValueError, match="has 11 encoder and 1 decoder positions; a row holds 10 and 5"):
        pack(np.array([11]), np.array([1]), rows=3, encoder_capacity=10, decoder_capacity=5)
    empty = np.zeros(0, dtype=np.int64)
    assert len(pack(empty, empty, rows=2, encoder_capacity=5, decoder_capacity=5)) == 0


def unpack(batch, soft=0, vocabulary=0):
    """(encoder tokens, target tokens, task number) of every example of a batch, after checking the layout."""
    found = []
    for row in range(len(batch["examples"])):
        source, target = batch["input_segments"][row], batch["decoder_segments"][row]
        for segments in (source, target):
            real = segments[segments > 0]
            assert (np.diff(real) >= 0).all(), "examples lie one after the other"
            assert (segments[: len(real)] > 0).all(), "padding is at the end"
            assert np.unique(real).tolist() == list(range(1, batch["examples"][row] + 1))
        assert (batch["input_ids"][row][source == 0] == 0).all()
        assert (batch["labels"][row][target == 0] == IGNORE).all()
        assert (batch["decoder_input_ids"][row][target == 0] == 0).all()
        for number in range(1, batch["examples"][row] + 1):
            ids = batch["input_ids"][row][source == number]
            labels = batch["labels"][row][target == number]
            shifted = batch["decoder_input_ids"][row][target == number]
            assert shifted.tolist() == [0, *labels[:-1].tolist()]
            assert ids[:soft].tolist() == list(range(vocabulary, vocabulary + soft))
            task = None
            if soft:
                (task,) = set(batch["task_ids"][row][source == number].tolist())
            found.append((tuple(ids[soft:].tolist()), tuple(labels.tolist()), task))
        if soft:
            assert (batch["task_ids"][row][source == 0] == 0).all()
    return found


@pytest.mark.parametrize("soft", [0, 5])
def test_a_window_of_batches_holds_its_draws_and_no_others(corpus, soft):
    stream = make_stream(corpus, soft_prompt_length=soft, tasks=[4, 1, 0, 2, 5], window_steps=16)
    window = stream.window(40)
    assert window.first_step == 32
    vocabulary = corpus.tokenizer.vocab_size
    found = Counter()
    for step in range(window.first_step, window.first_step + window.num_steps):
        batch = stream.batch(step)
        assert batch["input_ids"].shape == batch["input_segments"].shape == (8, 160)
        assert batch["labels"].shape == batch["decoder_input_ids"].shape == batch["decoder_segments"].shape == (8, 80)
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["decoder_input_ids"].dtype == np.int64
        assert batch["input_segments"].dtype == batch["decoder_segments"].dtype == batch["examples"].dtype == np.int32
        assert ("task_ids" in batch) == bool(soft)
        assert batch["examples"].min() > 0
        found.update(unpack(batch, soft, vocabulary))
    draws = stream.mixture.draws(window.first_draw, window.num_draws)
    encoder, decoder = Joiner(corpus, encoder_length=160 - soft, decoder_length=80).join(draws)
    place = {4: 1, 1: 2, 0: 3, 2: 4, 5: 5}
    expected = Counter(
        (
            tuple(encoder[number].tolist()),
            tuple(decoder[number].tolist()),
            (0 if draws.denoise[number] else place[int(draws.task[number])]) if soft else None,
        )
        for number in range(len(draws))
    )
    assert not found - expected
    report = stream.report(1, start_step=window.first_step)
    assert sum((expected - found).values()) == report.leftovers
    assert report.draws == len(draws)
    assert report.steps == 16


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_ranks_share_the_rows_of_the_global_batch(corpus, replicas):
    whole = make_stream(corpus, soft_prompt_length=3)
    for step in (0, 7, 1000):
        expected = whole.batch(step)
        parts = [make_stream(corpus, soft_prompt_length=3).batch(step, rank, replicas) for rank in range(replicas)]
        for name, value in expected.items():
            merged = np.empty_like(value)
            for rank, part in enumerate(parts):
                merged[rank::replicas] = part[name]
            assert np.array_equal(merged, value)


def test_batches_do_not_depend_on_what_was_read_before(corpus):
    order = np.random.default_rng(0).permutation(60).tolist()
    one, other = make_stream(corpus, window_steps=7), make_stream(corpus, window_steps=7)
    in_order = [one.batch(step) for step in range(60)]
    for step in order:
        batch = other.batch(step)
        assert all(np.array_equal(batch[name], in_order[step][name]) for name in batch)
    again = make_stream(corpus, seed=1, window_steps=7).batch(0)
    assert not np.array_equal(again["input_ids"], in_order[0]["input_ids"])


def test_windows_follow_each_other_through_the_phases_without_gap_or_overlap(corpus):
    mixture = MixtureSettings(curriculum=((500, (0,)), (3, (0, 1)), (700, (5, 4))))
    stream = make_stream(corpus, mixture=mixture, window_steps=5)
    step = draw = 0
    edges = []
    while draw < 3000:
        window = stream.window(step)
        assert (window.first_step, window.first_draw) == (step, draw)
        assert 1 <= window.num_steps <= 5
        assert window.num_draws >= 1
        assert all(stream.window(step + more) == window for more in range(window.num_steps))
        step, draw = step + window.num_steps, draw + window.num_draws
        edges.append(draw)
    assert {500, 503, 1203} <= set(edges)
    assert unpack(stream.batch(0))
    with pytest.raises(ValueError, match="step -1"):
        stream.window(-1)


def test_every_step_of_a_curriculum_is_filled_alike(corpus):
    """Phases of short and long inputs: each is packed for its own mean, so both fill over 85 % of a small window."""
    mixture = MixtureSettings(curriculum=((2000, (0,)),), denoising=0)
    stream = make_stream(corpus, mixture=mixture, rows_per_batch=32, tasks=[0, 5], decoder_length=160)
    short, long = stream.window(0), stream.window(10**6)
    assert short.num_draws / short.num_steps > 1.5 * long.num_draws / long.num_steps
    for step in (0, 10**6):
        assert stream.report(1, step).encoder_fill > 0.85


def test_large_windows_are_full_with_few_left_over(corpus):
    """The goals for real data, held here on mixed lengths: over 90 % real encoder positions, under 0.5 % leftovers."""
    report = make_stream(corpus, encoder_length=512, decoder_length=256, rows_per_batch=32).report(4)
    assert report.encoder_fill > 0.9
    assert report.leftovers < 0.005 * report.draws
    assert report.examples_per_row * report.mean_encoder_tokens == pytest.approx(512 * report.encoder_fill)
    assert report.examples_per_row * report.mean_decoder_tokens == pytest.approx(256 * report.decoder_fill)
    assert report.truncated == 0


@pytest.mark.slow
def test_the_thousand_real_tasks_are_packed_within_the_goals(tmp_path):
    """At least 90 % real encoder positions and under 0.5 % leftovers, at the lengths of text in bytes."""
    folder = Path(os.environ.get("ZEROPROMPT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "train.parquet").exists():
        pytest.skip(f"no task data at {folder}; set ZEROPROMPT_DATA to a folder that has train.parquet")
    tasks = parquet_tasks(folder, splits=("train", "train_extra"), num_tasks=1000)
    corpus = compile_tasks(
        tasks, tmp_path / "corpus", tokenizer=ByteTokenizer(), max_examples_per_task=64, max_input_tokens=4096
    )
    shape = PackingSettings(encoder_length=2048, decoder_length=512, rows_per_batch=64)
    report = BatchStream(corpus, Mixture(corpus, select_tasks(corpus.tasks)), shape).report(16)
    assert report.encoder_fill > 0.9
    assert report.leftovers < 0.005 * report.draws


@pytest.mark.parametrize("decoder_length", [40, 80, 120])
def test_a_short_decoder_bounds_the_number_of_draws(corpus, decoder_length):
    """Whichever side is tight, hardly anything is left over; the chosen fill gives way where both are."""
    report = make_stream(corpus, encoder_length=512, decoder_length=decoder_length, rows_per_batch=32).report(2)
    assert max(report.encoder_fill, report.decoder_fill) > 0.75
    assert report.leftovers < 0.005 * report.draws


def test_targets_have_a_limit_of_their_own(corpus):
    targets = make_stream(corpus, max_target_length=20).batch(0)
    assert max(len(target) for _, target, _ in unpack(targets)) == 20


def test_rows_that_ranks_cannot_share_are_refused(corpus):
    with pytest.raises(ValueError, match=r"8 / 3 = 2.67 rows a rank; make it a multiple of 3"):
        make_stream(corpus).batch(0, 0, 3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        check_replicas(8, 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows_per_batch": 0}, "rows_per_batch is 0"),
        ({"soft_prompt_length": 159}, "leaves 1 positions"),
        ({"fill": 0}, "fill is 0"),
        ({"fill": 1.2}, "fill is 1.2"),
        ({"window_steps": 0}, "window_steps is 0"),
        ({"max_target_length": 90}, "max_target_length 90 is more than decoder_length 80"),
    ],
)
def test_shapes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PackingSettings(**({"encoder_length": 160, "decoder_length": 80, "rows_per_batch": 8} | settings))
