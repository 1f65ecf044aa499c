# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.metrics import TaskScores, exact_match, rouge_l
from lightning_zeroprompt.models.scoring import RULES, SCORES, score_batch, score_choice, score_generation
from lightning_zeroprompt.models.soft_prompt import SoftPrompt
from lightning_zeroprompt.models.t5 import T5, T5Config


def _model(vocab_size=359, **more):
    model = T5(T5Config.preset("nano", vocab_size, num_encoder_layers=1, num_decoder_layers=1), seed=3, **more).eval()
    with torch.no_grad():  # initial logits are nearly equal; this separates options
        model.head.weight.mul_(4) if getattr(model.head, "weight", None) is not None else model.shared.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return _model()


@pytest.fixture(scope="module")
def batches(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, (0, 1, 2, 3), EvaluationSettings(examples_per_task=3))
    dataset = EvaluationDataset(evaluation_corpus, plan, max_tokens=1200)
    return plan, [dataset[step] for step in range(len(dataset))]


def _log_likelihood(model, prompt, target):
    """One unbatched forward pass, token by token."""
    decoder = torch.tensor([[0, *target[:-1]]])
    logits = model(torch.tensor([prompt]), decoder)[0].double().log_softmax(-1)
    return sum(logits[position, token].item() for position, token in enumerate(target))


def _examples(batch):
    for index in range(len(batch["cell"])):
        prompt = batch["input_ids"][index][batch["input_segments"][index] == 1].tolist()
        mine = (batch["option_example"] == index).nonzero()[:, 0].tolist() if batch["kind"] == "choice" else []
        yield index, prompt, mine


def test_options_equal_one_forward_pass_each(model, batches):
    for batch in batches[1]:
        if batch["kind"] != "choice":
            continue
        scores = score_choice(model, batch)
        for index, prompt, mine in _examples(batch):
            targets = [[t for t in batch["option_labels"][n].tolist() if t >= 0] for n in mine]
            total = [_log_likelihood(model, prompt, target) for target in targets]
            expected = {
                "sum": total,
                "mean": [value / len(target) for value, target in zip(total, targets, strict=True)],
                "pmi": [v - _log_likelihood(model, [1], target) for v, target in zip(total, targets, strict=True)],
            }
            right = [batch["option_correct"][n].item() for n in mine]
            for rule in RULES:
                assert scores.options[rule][mine].tolist() == pytest.approx(expected[rule], abs=1e-4)
                best = int(np.argmax(expected[rule]))
                assert scores.predicted[rule][index].item() == best
                assert scores.correct[rule][index].item() == right[best]
                wrong = [v for v, flag in zip(expected[rule], right, strict=True) if not flag]
                good = [v for v, flag in zip(expected[rule], right, strict=True) if flag]
                assert scores.margin[rule][index].item() == pytest.approx(max(good) - max(wrong), abs=1e-4)
            likely = max(v for v, flag in zip(expected["mean"], right, strict=True) if flag)
            assert scores.nll[index].item() == pytest.approx(-likely, abs=1e-4)


def test_options_equal_transformers(batches, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install lightning-zeroprompt[hf]")
    from lightning_zeroprompt.models import hf

    config = transformers.T5Config(
        vocab_size=359, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = hf.load_t5(tmp_path).eval()
    batch = next(batch for batch in batches[1] if batch["kind"] == "choice")
    total = score_choice(ours, batch).options["sum"]
    with torch.no_grad():
        for _, prompt, mine in _examples(batch):
            for n in mine:
                labels = batch["option_labels"][n][batch["option_labels"][n] >= 0]
                loss = theirs(input_ids=torch.tensor([prompt]), labels=labels[None]).loss
                assert total[n].item() == pytest.approx(-loss.item() * len(labels), abs=1e-4)


def _fixed_scores(monkeypatch, scores, prior=None):
    """A model whose options have the given log-likelihoods, and `prior` after the empty prompt."""
    model = _model()

    def option_logprobs(memory, segments, labels, example):
        values = scores if segments is not None else prior
        count = (labels >= 0).sum(1)
        return (torch.tensor(values) if values is not None else torch.zeros(len(labels))), count

    monkeypatch.setattr(model, "option_logprobs", option_logprobs)
    return model


def _choice_batch(lengths, example, correct):
    labels = torch.full((len(lengths), max(lengths)), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.arange(length) + 3 + row
    ids = torch.ones(max(example) + 1, 2, dtype=torch.int64)
    return {
        "kind": "choice", "input_ids": ids, "input_segments": ids.int(), "option_labels": labels,
        "option_example": torch.tensor(example), "option_correct": torch.tensor(correct),
    }  # fmt: skip


def test_rules_differ_as_they_should(monkeypatch):
    batch = _choice_batch([1, 4], [0, 0], [False, True])
    scores = score_choice(_fixed_scores(monkeypatch, [-2.0, -4.0], [-1.0, -9.0]), batch)
    assert {rule: scores.correct[rule].item() for rule in RULES} == {"sum": False, "mean": True, "pmi": True}
    assert {rule: scores.margin[rule].item() for rule in RULES} == {"sum": -2.0, "mean": 1.0, "pmi": 6.0}


def test_any_right_option_counts_ties_go_first_and_all_right_has_no_margin(monkeypatch):
    batch = _choice_batch([2, 2, 2, 2, 2], [0, 0, 0, 1, 1], [True, False, True, True, True])
    scores = score_choice(_fixed_scores(monkeypatch, [-5.0, -2.0, -1.0, -3.0, -3.0]), batch)
    assert scores.predicted["sum"].tolist() == [2, 0]
    assert scores.correct["sum"].tolist() == [True, True]
    assert scores.margin["sum"].tolist() == [1.0, 0.0]
    assert scores.nll.tolist() == [0.5, 1.5]


def test_a_diverged_model_is_scored_and_shows(monkeypatch):
    batch = _choice_batch([2, 2], [0, 0], [False, True])
    scores = score_choice(_fixed_scores(monkeypatch, [float("nan")] * 2), batch)
    assert scores.correct["sum"].tolist() == [False]
    assert scores.nll.isnan().all()


def test_equal_options_are_scored_once_on_the_empty_prompt(model, batches, monkeypatch):
    batch = next(batch for batch in batches[1] if batch["kind"] == "choice")
    sizes = []
    original = model.option_logprobs
    monkeypatch.setattr(model, "option_logprobs", lambda *a: (sizes.append(len(a[2])), original(*a))[1])
    score_choice(model, batch)
    assert sizes == [len(batch["option_labels"]), len(torch.unique(batch["option_labels"], dim=0))]
    assert sizes[1] < sizes[0]


def test_generation_equals_a_step_by_step_argmax(model, batches, evaluation_corpus):
    tokenizer = evaluation_corpus.tokenizer
    checked = 0
    for batch in batches[1]:
        if batch["kind"] != "generation":
            continue
        scores = score_generation(model, batch, tokenizer)
        for index, prompt, _ in _examples(batch):
            ids = []
            while len(ids) < batch["answer_limit"][index] and 1 not in ids:
                logits = model(torch.tensor([prompt]), torch.tensor([[0, *ids]]))
                ids.append(logits[0, -1].argmax().item())
            text = tokenizer.decode(ids)
            assert scores.texts[index] == text
            assert scores.exact_match[index].item() == exact_match(text, batch["references"][index])
            assert scores.rouge_l[index].item() == pytest.approx(rouge_l(text, batch["references"][index]))
            target = [t for t in batch["target_labels"][index].tolist() if t >= 0]
            nll = -_log_likelihood(model, prompt, target) / len(target)
            assert scores.nll[index].item() == pytest.approx(nll, abs=1e-4)
            checked += 1
    assert checked > 10


def test_right_answers_score_one(model, batches, evaluation_corpus, monkeypatch):
    batch = next(batch for batch in batches[1] if batch["kind"] == "generation")
    last = [references[-1] for references in batch["references"]]
    ids = [torch.tensor([*tokens, 1]) for tokens in evaluation_corpus.tokenizer.encode_batch(last)]
    fixed = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    monkeypatch.setattr(model, "generate", lambda *args, **more: fixed)
    scores = score_generation(model, batch, evaluation_corpus.tokenizer)
    assert scores.exact_match.tolist() == scores.rouge_l.tolist() == [1.0] * len(last)


def test_batches_fill_the_vector_metric(model, batches, evaluation_corpus):
    plan, everything = batches
    metric = TaskScores(len(plan.cells), SCORES)
    for batch in everything:
        metric.update(batch["cell"], score_batch(model, batch, evaluation_corpus.tokenizer))
    table = metric.table()
    kinds = np.array([plan.samples[cell.sample].task.kind == "choice" for cell in plan.cells])
    sizes = np.bincount(plan.item_cell)
    for name in SCORES:
        column = table.counts[:, SCORES.index(name)]
        expected = np.where(kinds, name.startswith(("accuracy", "margin")), name in ("exact_match", "rouge_l"))
        expected = np.ones_like(kinds) if name == "nll" else expected
        np.testing.assert_array_equal(column, sizes * expected)


def test_soft_prompts_reach_the_model(evaluation_corpus):
    plan = plan_evaluation(evaluation_corpus, (0, 1, 2, 3), EvaluationSettings(examples_per_task=2))
    prompt = SoftPrompt("per_task", length=2, num_tasks=4, d_model=64, first_id=359)
    model = _model(soft_prompt=prompt)
    results = []
    for numbers in ({}, dict.fromkeys(range(10), 1)):
        dataset = EvaluationDataset(evaluation_corpus, plan, soft_prompt_length=2, prompt_ids=numbers)
        with torch.no_grad():
            prompt.weight.normal_(generator=torch.Generator().manual_seed(0))
        results.append(
            [score_batch(model, dataset[k], evaluation_corpus.tokenizer)[:, -1] for k in range(len(dataset))]
        )
    assert all((one - two).abs().min() > 1e-6 for one, two in zip(*results, strict=True))
