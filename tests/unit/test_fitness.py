# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import numpy as np
import pytest
import torch

from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.join import join_templates
from lightning_zeroprompt.data.task import Example, PromptTemplate, TaskError
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models.scoring import SCORES, score_batch, score_choice
from lightning_zeroprompt.models.soft_prompt import SoftPrompt
from lightning_zeroprompt.models.t5 import T5, T5Config
from lightning_zeroprompt.prompts.encoding import EncodingSettings, PromptEncoder
from lightning_zeroprompt.prompts.fitness import NOT_FINITE, PromptScorer
from lightning_zeroprompt.prompts.forward import T5Forward
from lightning_zeroprompt.prompts.genome import PromptGenome, option_permutation
from lightning_zeroprompt.prompts.parts import pseudo_labels
from lightning_zeroprompt.prompts.pool import ExamplePool, PoolError

LABELS = ("yes", "no", "perhaps")


def make_model(vocab_size=359, **more):
    model = T5(T5Config.preset("nano", vocab_size, num_encoder_layers=1, num_decoder_layers=1), seed=3, **more).eval()
    with torch.no_grad():  # initial logits are nearly equal; this separates options
        model.shared.weight.mul_(2)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def task_of(corpus, task_id):
    return next(task for task in corpus.tasks if task.task_id == task_id)


def pool_of(corpus, task_id, rows=None):
    return ExamplePool.from_corpus(corpus, task_of(corpus, task_id), rows)


def genomes_of(pool, **more):
    return [PromptGenome.from_template(template, **more) for template in pool.templates]


def small_pool(count=12, options=LABELS, **more):
    examples = [
        Example(input=f"text {i} " + "abc " * (i % 5), outputs=(options[i % len(options)],), options=options)
        for i in range(count)
    ]
    templates = (PromptTemplate(name="t", text="Is it so? {input}"),)
    return ExamplePool.from_examples("task", examples, templates, ByteTokenizer(), **more)


class Recorder:
    """A forward that counts what the model is given."""

    def __init__(self, model):
        self.inner, self.pairs, self.answers = T5Forward(model), 0, 0

    def option_logprobs(self, batches):
        self.pairs += sum(len(batch["input_ids"]) for batch in batches)
        return self.inner.option_logprobs(batches)

    def generate(self, batches):
        self.answers += sum(len(batch["input_ids"]) for batch in batches)
        return self.inner.generate(batches)


@pytest.mark.parametrize(
    ("task_id", "encoder_length"),
    [("seen closed", 512), ("new open", 512), ("new free", 512), ("seen closed", 58), ("new open", 54)],
)
def test_scores_equal_those_of_an_evaluation(evaluation_corpus, model, task_id, encoder_length):
    task = task_of(evaluation_corpus, task_id)
    plan = plan_evaluation(
        evaluation_corpus, (0, 1, 2, 3), EvaluationSettings(examples_per_task=None), heldout_tasks=[task.index]
    )
    dataset = EvaluationDataset(evaluation_corpus, plan, max_tokens=900, encoder_length=encoder_length)
    assert (dataset.num_truncated > 0) == (encoder_length < 100)
    expected = {}
    for step in range(len(dataset)):
        batch = dataset[step]
        scores = score_batch(model, batch, evaluation_corpus.tokenizer)
        for cell, row, values in zip(batch["cell"].tolist(), batch["row"].tolist(), scores, strict=True):
            expected[plan.cells[cell].template, row] = dict(zip(SCORES, values.tolist(), strict=True))
    pool = ExamplePool.from_corpus(evaluation_corpus, task)
    settings = EncodingSettings(encoder_length=encoder_length)
    scorer = PromptScorer(pool, T5Forward(model), settings, max_tokens=700)
    result = scorer.score(genomes_of(pool), outcomes=True)
    assert result.refused == (None, None)
    checked = 0
    for template in range(2):
        for index in range(len(pool)):
            wanted = expected.get((task.first_template + template, task.first_row + index))
            if wanted is None:
                continue
            checked += 1
            free = task.kind == "generation"
            fitness = -wanted["nll"] if free else wanted["margin"]
            outcome = wanted[task.metric] if free else wanted["accuracy_sum"]
            assert result.fitness[template, index] == pytest.approx(fitness, rel=1e-6, abs=1e-5)
            assert result.outcome[template, index] == pytest.approx(outcome, abs=1e-6)
    assert checked == 2 * len(pool)


def test_a_batch_is_one_that_scoring_reads(evaluation_corpus, model):
    pool = pool_of(evaluation_corpus, "new open")
    encoder = PromptEncoder(pool)
    prompts = encoder.prepare(genomes_of(pool))
    row = np.tile(np.arange(len(pool)), 2)
    batches = encoder.batches(prompts, np.repeat([0, 1], len(pool)), row, 900)
    assert sorted(np.concatenate(batches.members).tolist()) == list(range(2 * len(pool)))
    assert len(batches) > 2
    scorer = PromptScorer(pool, T5Forward(model))
    fitness = scorer.score(genomes_of(pool)).fitness.ravel()
    for pairs, batch in zip(batches.members, batches, strict=True):
        margin = score_choice(model, batch).margin["sum"]
        np.testing.assert_allclose(margin.numpy(), fitness[pairs], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["choice", "generation"])
def test_scores_equal_a_loop_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install lightning-zeroprompt[hf]")
    from lightning_zeroprompt.models import hf

    config = transformers.T5Config(
        vocab_size=359, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer = ByteTokenizer()
    pool = small_pool()
    if kind == "generation":
        examples = [Example(input=f"text {i}" * (i + 1), outputs=(f"answer {i}", "other")) for i in range(6)]
        pool = ExamplePool.from_examples("free", examples, pool.templates, tokenizer)
    shown = "" if kind == "generation" else " Options: {options}"
    prompts = [
        PromptGenome.from_template(PromptTemplate(name="a", text=f"Say it. {{input}}{shown}")),
        PromptGenome.from_template(PromptTemplate(name="b", text=f"{{input}}\nWell, {{input}}?{shown}")),
    ]
    if kind == "choice":
        words = PromptTemplate(name="c", text="{input}{options}", verbalizer=("right", "wrong", "both"))
        prompts.append(PromptGenome.from_template(words, option_order="reversed"))
    result = PromptScorer(pool, T5Forward(hf.load_t5(tmp_path)), max_tokens=400).score(prompts)
    for p, prompt in enumerate(prompts):
        for row in range(len(pool)):
            example = pool.example(row)
            answers = prompt.verbalizer or example.options or example.outputs[:1]
            options = prompt.verbalizer or example.options
            reverse = prompt.option_order == "reversed"
            text = prompt.template("x").render(example, options and tuple(reversed(options)) if reverse else options)
            totals = []
            for answer in answers:
                ids = torch.tensor([[*tokenizer.encode_batch([text])[0], 1]])
                labels = torch.tensor([[*tokenizer.encode_batch([answer])[0], 1]])
                with torch.no_grad():
                    totals.append(-theirs(input_ids=ids, labels=labels).loss.item() * labels.shape[1])
            if kind == "generation":
                assert result.fitness[p, row] == pytest.approx(totals[0] / labels.shape[1], abs=1e-3)
                continue
            right = int(pool.label[row])
            best_wrong = max(total for option, total in enumerate(totals) if option != right)
            assert result.fitness[p, row] == pytest.approx(totals[right] - best_wrong, abs=1e-3)
            assert result.outcome[p, row] == (int(np.argmax(totals)) == right)


def encoded(pool, prompt, row, **settings):
    encoder = PromptEncoder(pool, EncodingSettings(**settings))
    (prepared,) = encoder.prepare([prompt])
    batch = encoder.batches([prepared], np.array([0]), np.array([row]), 1000)[0]
    return batch["input_ids"][0].tolist()


@pytest.mark.parametrize("order", ["given", "reversed", "shuffled:0", "shuffled:7"])
def test_options_are_shown_in_the_genomes_order(order):
    pool, tokenizer = small_pool(), ByteTokenizer()
    template = PromptTemplate(name="t", text="{input} ({options})", option_separator=" | ")
    prompt = PromptGenome.from_template(template, option_order=order)
    key, seen = PromptEncoder(pool).option_key, set()
    for row in range(len(pool)):
        permutation = option_permutation(order, 3, key(row))
        seen.add(permutation)
        text = template.render(pool.example(row), tuple(LABELS[option] for option in permutation))
        assert encoded(pool, prompt, row) == [*tokenizer.encode_batch([text])[0], 1]
    assert len(seen) == 1 if order in ("given", "reversed") else len(seen) > 3
    # The order belongs to the input, not to its place.
    assert encoded(pool.select([5, 3]), prompt, 1) == encoded(pool, prompt, 3)


def test_tokens_equal_the_corpus_own(evaluation_corpus):
    for task_id in ("seen closed", "new open", "new free"):
        task, pool = task_of(evaluation_corpus, task_id), pool_of(evaluation_corpus, task_id)
        for number, prompt in enumerate(genomes_of(pool)):
            rows = task.first_row + np.arange(len(pool))
            templates = np.full(len(pool), task.first_template + number)
            joined = join_templates(evaluation_corpus, rows, templates, max_tokens=55)
            for row in range(len(pool)):
                assert encoded(pool, prompt, row, encoder_length=55) == joined[row].tolist()


def test_known_and_repeated_pairs_are_never_scored_twice(evaluation_corpus, model):
    pool = pool_of(evaluation_corpus, "new open")
    forward = Recorder(model)
    scorer = PromptScorer(pool, forward)
    first, second = genomes_of(pool)
    # Another spelling of the first prompt: the cue moves into the instruction.
    twin = PromptGenome(input_frame=first.text, layout="{input_frame}{instruction}{option_frame}{answer_cue}")
    hidden = dataclasses.replace(twin, option_frame="", option_order="given")
    assert scorer.num_new([first, twin, hidden, first], [0, 1, 1]) == 2
    scores = scorer.score([first, twin, hidden, first], [0, 1, 1])
    assert forward.pairs == scorer.counts.scored == 2
    assert scorer.counts.requested == 12
    assert (scores.fitness == scores.fitness[0]).all()
    assert scores.fitness[0, 1] == scores.fitness[0, 2]
    scorer.score([second, first], range(4))
    assert forward.pairs == 2 + 4 + 2
    everything = scorer.score([first, second])
    assert forward.pairs == 2 * len(pool)
    np.testing.assert_array_equal(everything.fitness[0, [0, 1]], scores.fitness[0, :2])
    scorer.set_step(0)
    assert scorer.num_new([first]) == 0
    scorer.set_step(1)
    assert scorer.num_new([first]) == len(pool)


def test_orders_of_hidden_options_are_one_prompt_and_of_shown_ones_are_not(evaluation_corpus):
    encoder = PromptEncoder(pool_of(evaluation_corpus, "new open"))
    plain, listing = (PromptTemplate(name="t", text=text) for text in ("{input}", "{input} {options}"))
    keys = [
        [entry.key for entry in encoder.prepare([PromptGenome.from_template(t, option_order=o) for o in orders])]
        for t in (plain, listing)
        for orders in (("given", "reversed", "shuffled:1"),)
    ]
    assert len(set(keys[0])) == 1
    assert len(set(keys[1])) == 3


def test_free_answers_are_generated_once_and_only_when_asked(evaluation_corpus, model):
    pool = pool_of(evaluation_corpus, "new free")
    forward = Recorder(model)
    scorer = PromptScorer(pool, forward)
    prompts = genomes_of(pool)
    assert np.isnan(scorer.score(prompts).outcome).all()
    assert forward.answers == 0
    one = scorer.score(prompts[:1], outcomes=True)
    assert forward.answers == len(pool)
    assert np.isfinite(one.outcome).all()
    scorer.score(prompts, outcomes=True)
    assert forward.answers == scorer.counts.generated == 2 * len(pool)
    assert forward.pairs == 2 * len(pool)


def test_bad_prompts_are_refused_and_counted(model):
    pool = small_pool()
    settings = EncodingSettings(encoder_length=100, max_prompt_tokens=90)
    scorer = PromptScorer(pool, T5Forward(model), settings)
    good = PromptGenome(instruction="Say.")
    bad = {
        "empty": PromptGenome(input_frame="", layout="{input_frame}{instruction}{option_frame}{answer_cue}"),
        "lost placeholder input": PromptGenome(instruction="Say.", input_frame="", option_frame="{options}"),
        "unknown placeholder premise": PromptGenome(input_frame="{premise}"),
        "verbalizer of 2 words for 3 labels": PromptGenome(verbalizer=("a", "b")),
        "unknown soft prompt best": PromptGenome(soft_prompt="best"),
        "too long: 92 tokens of 90": PromptGenome(instruction="x" * 91),
        "too long: 103 tokens without the input of 100": PromptGenome(instruction="x" * 84, option_frame="{options}"),
    }
    result = scorer.score([good, *bad.values(), good])
    assert result.refused == (None, *bad, None)
    assert np.isnan(result.fitness[1:-1]).all()
    assert np.isfinite(result.fitness[[0, -1]]).all()
    scorer.score([good, *bad.values()])
    assert scorer.counts.refused == {
        "empty": 1, "lost placeholder": 1, "unknown placeholder": 1, "verbalizer": 1, "unknown soft prompt": 1,
        "too long": 2,
    }  # fmt: skip
    assert scorer.counts.scored == len(pool)
    assert scorer.refusals(list(bad.values())) == tuple(bad)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_score_that_is_not_finite_refuses_its_prompt_alone(model, value):
    class Failing(T5Forward):
        def option_logprobs(self, batches):
            results = super().option_logprobs(batches)
            for batch, result in zip(batches, results, strict=True):
                has_x = (batch["input_ids"] == ord("X") + 3).any(1)
                result[has_x[batch["option_example"]]] = value
            return results

    scorer = PromptScorer(small_pool(), Failing(model))
    good, bad = PromptGenome(instruction="Say"), PromptGenome(instruction="SayX")
    for _ in range(2):
        result = scorer.score([good, bad])
        assert result.refused == (None, NOT_FINITE)
        assert np.isfinite(result.fitness[0]).all()
        assert np.isnan(result.fitness[1]).all()
        assert np.isnan(result.outcome[1]).all()
    assert scorer.counts.refused == {NOT_FINITE: 1}


def test_soft_prompts_reach_the_model():
    prompt = SoftPrompt("per_task", length=3, num_tasks=4, d_model=64, first_id=359)
    with torch.no_grad():
        prompt.weight.normal_(generator=torch.Generator().manual_seed(0))
    model = make_model(soft_prompt=prompt)
    pool = small_pool()
    settings = EncodingSettings(soft_prompt_length=3, soft_prompts={"": 0, "first": 1, "last": 4})
    genomes = [PromptGenome(instruction="Say.", soft_prompt=name) for name in ("", "first", "last")]
    result = PromptScorer(pool, T5Forward(model), settings).score(genomes)
    for number, fitness in zip((0, 1, 4), result.fitness, strict=True):
        encoder = PromptEncoder(pool, dataclasses.replace(settings, soft_prompts={"": number}))
        (prepared,) = encoder.prepare(genomes[:1])
        for row in range(3):
            batch = encoder.batches([prepared], np.array([0]), np.array([row]), 1000)[0]
            assert batch["input_ids"][0, :3].tolist() == [359, 360, 361]
            assert (batch["task_ids"] == number).all()
            assert score_choice(model, batch).margin["sum"].item() == pytest.approx(
                float(fitness[row]), rel=1e-6, abs=1e-5
            )
    assert np.abs(result.fitness[0] - result.fitness[1]).min() > 1e-6


def test_a_restored_scorer_goes_on_bit_for_bit(evaluation_corpus, model):
    pool = pool_of(evaluation_corpus, "new open")
    prompts = genomes_of(pool) + genomes_of(pool, option_order="shuffled:3")

    def build():
        return PromptScorer(pool, T5Forward(model), max_tokens=500, step=5)

    whole = build()
    whole.score(prompts[:2], range(8))
    whole.score(prompts[2:3], [1, 5])
    expected = whole.score(prompts)
    halted = build()
    halted.score(prompts[:2], range(8))
    halted.score(prompts[2:3], [1, 5])
    state = halted.state_dict()
    json.dumps({key: value for key, value in state.items() if not isinstance(value, torch.Tensor)})
    resumed = build()
    resumed.load_state_dict(state)
    np.testing.assert_array_equal(resumed.score(prompts).fitness, expected.fitness)
    assert resumed.counts == whole.counts
    assert resumed.step == 5
    empty = build()
    empty.load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match="other examples or limits"):
        PromptScorer(pool.select(range(5)), T5Forward(model)).load_state_dict(state)


def test_pseudo_labels_take_the_place_of_labels_without_scoring_anew(model):
    pool = small_pool()
    unlabelled = pool.with_labels([-2] * len(pool))
    forward = Recorder(model)
    scorer = PromptScorer(unlabelled, forward)
    prompts = [PromptGenome(instruction="Say."), PromptGenome(instruction="Is it?", option_frame="{options}")]
    with pytest.raises(PoolError, match="row 0 has no label"):
        scorer.score(prompts)
    broken = PromptGenome(input_frame="{nothing}")
    logprobs = scorer.option_logprobs([*prompts, broken])
    assert np.isnan(logprobs[2]).all()
    labels, confidence = pseudo_labels(logprobs, pool.num_options)
    scorer.relabel(labels)
    scores = scorer.score(prompts)
    assert forward.pairs == 2 * len(pool)
    expected = PromptScorer(pool.with_labels(labels), T5Forward(model)).score(prompts)
    np.testing.assert_allclose(scores.fitness, expected.fitness, rtol=1e-6, atol=1e-5)
    assert scores.outcome.mean() > 0.5
    assert (confidence > 1 / 3).all()


def test_the_model_keeps_its_mode(model):
    model.train()
    PromptScorer(small_pool(), T5Forward(model)).score([PromptGenome()])
    assert model.training
    model.eval()


def test_impossible_limits_are_refused(model):
    for settings in (
        {"encoder_length": 1},
        {"max_prompt_tokens": 0},
        {"soft_prompts": {"a": 1}},
        {"decoder_length": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EncodingSettings(**settings)
    with pytest.raises(ValueError, match="max_tokens=0"):
        PromptScorer(small_pool(), T5Forward(model), max_tokens=0)
    scorer = PromptScorer(small_pool(), T5Forward(model))
    for rows in ([], [12], [-1]):
        with pytest.raises(PoolError, match="rows 0 to 11"):
            scorer.score([PromptGenome()], rows)


def test_pools_of_a_corpus_and_of_examples_hold_the_same(evaluation_corpus):
    for task_id in ("seen closed", "new open", "new free", "train open"):
        pool = pool_of(evaluation_corpus, task_id)
        examples = [pool.example(row) for row in range(len(pool))]
        again = ExamplePool.from_examples(
            task_id, examples, pool.templates, evaluation_corpus.tokenizer, metric=pool.metric
        )
        assert [again.example(row) for row in range(len(again))] == examples
        assert (again.kind, again.labels, again.fields) == (pool.kind, pool.labels, pool.fields)
        np.testing.assert_array_equal(again.label, pool.label)
        np.testing.assert_array_equal(again.right, pool.right)
        shares = [len(e.outputs) / len(e.options) if e.options else 0 for e in examples]
        assert pool.chance == pytest.approx(np.mean(shares))
        assert again.input_keys() == pool.input_keys()
        chosen = pool.select([7, 2, 2])
        assert [chosen.example(row) for row in range(3)] == [examples[7], examples[2], examples[2]]
        rows = np.array([7, 2]) + task_of(evaluation_corpus, task_id).first_row
        fewer = pool_of(evaluation_corpus, task_id, rows)
        assert [fewer.example(row) for row in range(2)] == [examples[7], examples[2]]


def test_examples_without_outputs_are_unlabelled_and_bad_ones_refused():
    pool = small_pool()
    templates, tokenizer = pool.templates, ByteTokenizer()
    known = Example(input="a", outputs=("no",), options=LABELS)
    unknown = Example(input="b", outputs=(), options=LABELS)
    same = Example(input="c", outputs=("x",), options=("x", "x"))
    built = ExamplePool.from_examples("t", [known, unknown, same], templates, tokenizer)
    assert built.label.tolist() == [1, -2]
    assert built.right.sum() == 1
    for examples, wording in (
        ([], "no examples"),
        ([Example(input="a", outputs=())], "no output"),
        ([Example(input="a", outputs=("x",), options=("y", "z"))], "do not contain"),
    ):
        with pytest.raises(TaskError, match=wording):
            ExamplePool.from_examples("t", examples, templates, tokenizer)
    with pytest.raises(TaskError, match="no template"):
        ExamplePool.from_examples("t", [known], (), tokenizer)
    with pytest.raises(PoolError, match="label 3 with 3 options"):
        pool.with_labels([3] * 12)
    with pytest.raises(PoolError, match="12 rows, given are 2 labels"):
        pool.with_labels([0, 1])
    for rows in ([], [12], [-1]):
        with pytest.raises(PoolError, match="rows 0 to 11"):
            pool.select(rows)


def test_a_pool_takes_rows_of_its_task_alone(evaluation_corpus):
    task = task_of(evaluation_corpus, "new open")
    for rows in ([], [task.first_row - 1], [task.first_row + task.num_rows]):
        with pytest.raises(PoolError, match=f"{task.first_row} to"):
            ExamplePool.from_corpus(evaluation_corpus, task, rows)
