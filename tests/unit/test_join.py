# SPDX-License-Identifier: Apache-2.0
"""Joined draws against the records they were compiled from: rendered text, cut rule, and undone span corruption."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.join import Joiner, join_templates, ranges, span_lengths
from lightning_zeroprompt.data.mixture import Draws, Mixture, MixtureSettings
from lightning_zeroprompt.data.permutation import mix64
from lightning_zeroprompt.data.task import OPTIONS, Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

LABELS = ("yes", "no", "unknown")
LONG = 10**6


def words(generator, count):
    return " ".join("".join(generator.choice(list("abcdefg"), generator.integers(1, 8))) for _ in range(count))


def make_tasks():
    """A closed task with verbalizers, a task with options of its own in each row, and a free one with two fields."""
    generator = np.random.default_rng(0)
    closed = [
        Example(
            input=f"c{number} {words(generator, generator.integers(1, 60))}",
            outputs=(LABELS[number % 3],),
            options=LABELS,
        )
        for number in range(40)
    ]
    choice = []
    for number in range(40):
        options = tuple(f"{word}{place}" for place, word in enumerate(words(generator, 2 + number % 4).split()))
        choice.append(
            Example(input=f"o{number} {words(generator, 9)}", outputs=(options[number % 2],), options=options)
        )
    free = [
        Example(
            input=f"f{number} {words(generator, generator.integers(1, 50))}",
            outputs=(words(generator, generator.integers(1, 20)), "another right answer"),
            fields={"context": words(generator, generator.integers(1, 30)), "title": f"title {number}"},
        )
        for number in range(40)
    ]
    return [
        Task(
            task_id="closed",
            category="a",
            family="closed",
            templates=(
                PromptTemplate(name="shown", text="Which of {options} is it? {input}!"),
                PromptTemplate(name="hidden", text="{input}"),
                PromptTemplate(
                    name="words",
                    text="{input} -- {options} ({options})",
                    verbalizer=("right", "wrong", "no idea"),
                    option_separator=" | ",
                ),
            ),
            examples=lambda: iter(closed),
        ),
        Task(
            task_id="choice",
            category="a",
            family="choice",
            templates=(
                PromptTemplate(name="one", text="{input}\nOptions: {options}\nAnswer:", option_separator="\n- "),
            ),
            examples=lambda: iter(choice),
        ),
        Task(
            task_id="free",
            category="b",
            family="free",
            templates=(
                PromptTemplate(name="all", text="{title}: {input} / {context} / {input} end"),
                PromptTemplate(name="without input", text="Only {context}."),
            ),
            examples=lambda: iter(free),
        ),
    ]


@pytest.fixture(scope="module")
def tasks():
    return make_tasks()


@pytest.fixture(scope="module")
def corpus(tasks, tmp_path_factory):
    return compile_tasks(tasks, tmp_path_factory.mktemp("join") / "corpus", tokenizer=ByteTokenizer(), progress=False)


@pytest.fixture(scope="module")
def records(tasks, corpus):
    """Example of each row, found by its unique input."""
    by_input = {example.input: example for task in tasks for example in task.examples()}
    rows = [corpus.segment(int(segment)) for segment in corpus.row_first_segment]
    return [by_input[corpus.tokenizer.decode(row.tolist())] for row in rows]


def take(draws, mask):
    return Draws(*(getattr(draws, name)[mask] for name in Draws.__slots__))


def texts(corpus, ragged):
    assert all(ragged[number][-1] == corpus.tokenizer.eos_id for number in range(len(ragged)))
    return [corpus.tokenizer.decode(ragged[number].tolist()) for number in range(len(ragged))]


def template_of(tasks, corpus, index):
    info = corpus.templates[index]
    return tasks[info.task].templates[index - corpus.tasks[info.task].first_template]


def test_ranges():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_joined_draws_read_as_the_rendered_records(tasks, corpus, records):
    draws = Mixture(corpus, [0, 1, 2], settings=MixtureSettings(denoising=0)).draws(0, 600)
    encoder, decoder = Joiner(corpus, encoder_length=LONG, decoder_length=LONG).join(draws)
    orders = Counter()
    for number, (text, target) in enumerate(zip(texts(corpus, encoder), texts(corpus, decoder), strict=True)):
        example = records[draws.row[number]]
        template = template_of(tasks, corpus, draws.template[number])
        shown = template.verbalizer or example.options
        found = [
            order
            for order in itertools.permutations(range(len(shown or ())))
            if template.render(example, options=tuple(shown[place] for place in order) if shown else None) == text
        ]
        assert found, (text, template)
        if template.name == "one" and len(shown) == 3:
            orders[found[0]] += 1
        answer = example.outputs[0]
        assert target == (template.verbalizer[LABELS.index(answer)] if template.verbalizer else answer)
    assert len(orders) == 6


def test_without_keys_options_keep_their_order(tasks, corpus, records):
    rows = np.repeat(np.arange(len(records)), 1)
    templates = [
        corpus.tasks[next(t.index for t in corpus.tasks if row < t.first_row + t.num_rows)].first_template
        for row in rows
    ]
    joined = join_templates(corpus, rows, templates)
    expected = [
        template_of(tasks, corpus, template).render(records[row]) for row, template in zip(rows, templates, strict=True)
    ]
    assert texts(corpus, joined) == expected
    keyed = join_templates(corpus, rows, templates, mix64(np.arange(len(rows), dtype=np.uint64)))
    assert texts(corpus, keyed) != expected
    assert keyed.lengths.tolist() == joined.lengths.tolist()
    with pytest.raises(ValueError, match="120 rows with 1 templates"):
        join_templates(corpus, rows, [0])


def test_an_empty_list_joins_to_nothing(corpus):
    assert len(join_templates(corpus, [], [])) == 0
    encoder, decoder = Joiner(corpus, encoder_length=9, decoder_length=9).join(Mixture(corpus, [0]).draws(0, 0))
    assert len(encoder) == len(decoder) == 0


def cut(template, example, limit):
    """The cut rule, piece by piece: input from its end, then other fields, then the rest."""
    options = template.verbalizer or example.options
    pieces = []
    for segment in template.segments():
        if not segment.is_placeholder:
            pieces.append([2, segment.text])
        elif segment.text == OPTIONS:
            pieces.append([2, template.option_separator.join(options)])
        else:
            pieces.append([0 if segment.text == "input" else 1, example.field(segment.text)])
    excess = sum(len(text) for _, text in pieces) + 1 - limit
    for kind in range(3):
        for piece in reversed(pieces):
            if piece[0] == kind and excess > 0:
                excess, piece[1] = excess - len(piece[1]), piece[1][: max(0, len(piece[1]) - excess)]
    return "".join(text for _, text in pieces)


@pytest.mark.parametrize("limit", [2, 7, 20, 60, 100, 250])
def test_long_inputs_are_cut_by_the_rule(tasks, corpus, records, limit):
    rows, templates = [], []
    for task in corpus.tasks:
        for row in range(task.first_row, task.first_row + task.num_rows):
            for template in range(task.first_template, task.first_template + task.num_templates):
                rows.append(row)
                templates.append(template)
    joined = join_templates(corpus, rows, templates, max_tokens=limit)
    expected = [
        cut(template_of(tasks, corpus, template), records[row], limit)
        for row, template in zip(rows, templates, strict=True)
    ]
    assert texts(corpus, joined) == expected
    assert joined.lengths.max() <= limit


def test_targets_are_cut_and_cut_draws_counted(corpus):
    draws = Mixture(corpus, [2], settings=MixtureSettings(denoising=0)).draws(0, 200)
    whole = Joiner(corpus, encoder_length=LONG, decoder_length=LONG).plan(draws)
    plan = Joiner(corpus, encoder_length=150, decoder_length=10).plan(draws)
    assert whole.truncated == 0
    assert plan.truncated == int(((whole.encoder_lengths > 150) | (whole.decoder_lengths > 10)).sum()) > 0
    assert plan.decoder_lengths.tolist() == np.minimum(whole.decoder_lengths, 10).tolist()
    assert (plan.decoder.gather(corpus.tokens).tokens[plan.decoder.gather(corpus.tokens).offsets[1:] - 1] == 1).all()


@pytest.mark.parametrize(("encoder_length", "decoder_length"), [(LONG, LONG), (40, 512), (512, 12), (3, 3)])
def test_span_corruption_can_be_undone(corpus, records, encoder_length, decoder_length):
    """Putting the spans back gives the input (or its beginning, under limits); shares are 15 % in spans of about 3."""
    draws = Mixture(corpus, [0, 1, 2], settings=MixtureSettings(denoising=0.5)).draws(0, 800)
    joiner = Joiner(corpus, encoder_length=min(encoder_length, 4096), decoder_length=decoder_length)
    noised = take(draws, draws.denoise)
    encoder, decoder = joiner.join(noised)
    sentinels = {token: number for number, token in enumerate(corpus.tokenizer.sentinel_ids)}
    masked, shown = 0, 0
    for number in range(len(noised)):
        source, target = encoder[number].tolist(), decoder[number].tolist()
        assert source[-1] == target[-1] == 1
        assert len(source) <= encoder_length
        assert len(target) <= decoder_length
        spans, order = {}, []
        for token in target[:-1]:
            if token in sentinels:
                order.append(token)
                spans[token] = []
            else:
                spans[order[-1]].append(token)
        assert [sentinels[token] for token in order] == list(range(len(order)))
        assert [token for token in source if token in sentinels] == order
        restored = [token for kept in source[:-1] for token in (spans[kept] if kept in sentinels else [kept])]
        text = records[noised.row[number]].input
        expected = corpus.tokenizer.encode_batch([text])[0]
        if encoder_length == LONG:
            assert restored == expected
        else:
            assert restored == expected[: len(restored)]
        noise, count = (int(part) for part in span_lengths(np.array(len(restored))))
        assert len(order) == count
        assert sum(map(len, spans.values())) == noise
        assert all(1 <= len(span) <= 5 for span in spans.values())
        masked += noise
        shown += len(restored)
    if encoder_length == LONG:
        assert abs(masked / shown - 0.15) < 0.01


def test_places_of_spans_spread_over_the_input(corpus):
    """The first span starts anywhere in its stretch, by key; means within 5 standard errors."""
    task = corpus.tasks[2]
    sizes = np.diff(corpus.segment_offsets)[corpus.row_first_segment[task.first_row : task.first_row + task.num_rows]]
    row = task.first_row + int(sizes.argmax())
    count = 2000
    draws = Draws(
        index=np.arange(count),
        task=np.full(count, 2, np.int32),
        row=np.full(count, row),
        template=np.full(count, task.first_template, np.int32),
        denoise=np.ones(count, np.bool_),
        key=mix64(np.arange(count, dtype=np.uint64)),
    )
    encoder, _ = Joiner(corpus, encoder_length=4000, decoder_length=4000).join(draws)
    first = (encoder.tokens.reshape(count, -1) == corpus.tokenizer.sentinel_ids[0]).argmax(1)
    noise, spans = span_lengths(sizes.max()[None])
    room = int(sizes.max() // spans[0] - noise[0] // spans[0]) + 1
    assert set(first.tolist()) == set(range(room))
    assert abs(first.mean() - (room - 1) / 2) < 5 * room / np.sqrt(12 * count)


def test_lengths_come_without_tokens_and_equal_what_is_gathered(corpus):
    draws = Mixture(corpus, [0, 1, 2]).draws(0, 500)
    joiner = Joiner(corpus, encoder_length=80, decoder_length=20)
    plan = joiner.plan(draws)
    encoder, decoder = joiner.join(draws)
    assert plan.encoder_lengths.tolist() == encoder.lengths.tolist()
    assert plan.decoder_lengths.tolist() == decoder.lengths.tolist()
    chosen = np.array([400, 3, 3, 77])
    part = plan.encoder.gather(corpus.tokens, chosen)
    assert [part[place].tolist() for place in range(4)] == [encoder[number].tolist() for number in chosen]
    assert len(plan.encoder.gather(corpus.tokens, np.zeros(0, np.int64))) == 0


def test_an_example_does_not_depend_on_its_company(corpus):
    draws = Mixture(corpus, [0, 1, 2]).draws(0, 200)
    joiner = Joiner(corpus, encoder_length=60, decoder_length=20)
    encoder, decoder = joiner.join(draws)
    for number in range(0, 200, 13):
        mask = np.zeros(200, np.bool_)
        mask[number] = True
        alone = joiner.join(take(draws, mask))
        assert alone[0][0].tolist() == encoder[number].tolist()
        assert alone[1][0].tolist() == decoder[number].tolist()


def test_inputs_of_one_token_train_their_task(tmp_path):
    task = Task(
        task_id="short",
        category="a",
        family="f",
        templates=(PromptTemplate(name="p", text="Say {input}."),),
        examples=lambda: (Example(input=letter, outputs=(letter,)) for letter in "abcdefghijklmnopqrst"),
    )
    corpus = compile_tasks([task], tmp_path / "corpus", tokenizer=ByteTokenizer(), progress=False)
    draws = Mixture(corpus, [0], settings=MixtureSettings(denoising=0.9)).draws(0, 50)
    assert draws.denoise.any()
    encoder, _ = Joiner(corpus, encoder_length=20, decoder_length=20).join(draws)
    assert all(text.startswith("Say ") for text in texts(corpus, encoder))


def test_limits_without_room_are_refused(corpus):
    with pytest.raises(ValueError, match="encoder_length is 1"):
        Joiner(corpus, encoder_length=1, decoder_length=10)
    with pytest.raises(ValueError, match="decoder_length is 2"):
        Joiner(corpus, encoder_length=10, decoder_length=2)
