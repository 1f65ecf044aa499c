# SPDX-License-Identifier: Apache-2.0
import functools
import random

import numpy as np
import pytest
import torch
from torchmetrics.text.rouge import ROUGEScore

from lightning_zeroprompt.metrics import ExactMatch, RougeL, TaskScores, exact_match, normalise, pieces, rouge_l
from lightning_zeroprompt.metrics.rouge import lcs_length


def _table_lcs(first, second):
    @functools.cache
    def best(i, j):
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + best(i + 1, j + 1)
        return max(best(i + 1, j), best(i, j + 1))

    return best(0, 0)


def test_lcs_equals_the_dynamic_programme():
    draw = random.Random(1)
    for _ in range(300):
        first = draw.choices("abcd", k=draw.randrange(0, 24))
        second = draw.choices("abcd", k=draw.randrange(0, 24))
        assert lcs_length(first, second) == _table_lcs(first, second)


def test_rouge_l_equals_torchmetrics_on_english():
    draw = random.Random(2)
    vocabulary = ["the", "Cat", "sat", "on", "mat", "don't", "x-ray", "3.5", "dog", ",", "end."]
    theirs = ROUGEScore(rouge_keys="rougeL", accumulate="best", use_stemmer=False)
    for _ in range(60):
        prediction = " ".join(draw.choices(vocabulary, k=draw.randrange(1, 12)))
        references = [" ".join(draw.choices(vocabulary, k=draw.randrange(1, 12))) for _ in range(draw.randrange(1, 4))]
        if not all(any(char.isalnum() for char in text) for text in [prediction, *references]):
            continue  # a text of punctuation alone is the one rule that differs
        theirs.reset()
        theirs.update(prediction, [references])
        assert rouge_l(prediction, references) == pytest.approx(theirs.compute()["rougeL_fmeasure"].item(), abs=1e-6)


# Han with Kana; half-width Kana; Thai, Lao, Khmer, whose marks stay with their letter;
# Devanagari, which has spaces and whose vowel signs split no word; Korean; Latin and Greek; Han with Latin.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u6771\u4eac\u30bf\u30ef\u30fc", ["\u6771", "\u4eac", "\u30bf", "\u30ef", "\u30fc"]),
        ("\uff76\uff9e\uff7d", ["\u30ac", "\u30b9"]),  # NFKC joins half-width Kana and its voicing mark
        (
            "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48",
            ["\u0e17\u0e35\u0e48", "\u0e19\u0e35\u0e48"],
        ),
        ("\u0e9e\u0eb2\u0eaa\u0eb2", ["\u0e9e", "\u0eb2", "\u0eaa", "\u0eb2"]),
        ("\u1781\u17d2\u1798\u17c2\u179a", ["\u1781\u17d2", "\u1798\u17c2", "\u179a"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092d\u093e\u0937\u093e"],
        ),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),
        ("Cafe\u0301 \u03a3\u039f\u03a6\u039f\u03a3", ["caf\u00e9", "\u03c3\u03bf\u03c6\u03bf\u03c3"]),
        ("\u7528GPU\u7b973\u6b21", ["\u7528", "gpu", "\u7b97", "3", "\u6b21"]),
        ("snake_case", ["snake", "case"]),
        ("\u0301a", ["a"]),
        ("?!", ["?", "!"]),
        ("  ", []),
    ],
)
def test_pieces_of_scripts(text, expected):
    assert pieces(text) == expected


def test_normalise_is_stable():
    draw = random.Random(3)
    alphabet = [chr(code) for code in [*range(0x20, 0x600), *range(0xFB00, 0xFB07), 0x1E9E, 0x345, 0x390, 0x3000]]
    for _ in range(500):
        once = normalise("".join(draw.choices(alphabet, k=6)))
        assert normalise(once) == once


def test_rouge_and_exact_match_take_the_best_reference():
    assert rouge_l("b", ["a", "b"]) == 1
    assert rouge_l("", ["a"]) == 0
    assert rouge_l("\u5929\u6c23\u5f88\u597d", ["\u5929\u6c23\u597d"]) == pytest.approx(6 / 7)
    assert exact_match("\uff39\uff25\uff33 ", ["no", "yes"]) == 1
    assert exact_match("yes.", ["yes"]) == 0
    for function in (rouge_l, exact_match):
        with pytest.raises(ValueError, match="0 references"):
            function("a", [])


@pytest.mark.parametrize(("metric", "function"), [(RougeL(), rouge_l), (ExactMatch(), exact_match)])
def test_classes_are_means_of_functions(metric, function):
    predictions = ["a b c", "d", "e f"]
    references = [["a c"], ["d", "x"], ["f"]]
    metric.update(predictions[:1], references[:1])
    metric.update(predictions[1:], references[1:])
    expected = np.mean([function(p, r) for p, r in zip(predictions, references, strict=True)])
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_task_scores_equal_a_loop_over_examples():
    generator = torch.Generator().manual_seed(0)
    metric = TaskScores(5, ("a", "b", "c"))
    seen = {}
    for _ in range(4):
        cell = torch.randint(-1, 4, (11,), generator=generator)  # cell 4 stays empty
        scores = torch.rand(11, 3, generator=generator)
        scores[torch.rand(11, 3, generator=generator) < 0.3] = torch.nan
        metric.update(cell, scores)
        for position, index in enumerate(cell.tolist()):
            for column in range(3):
                if index >= 0 and not scores[position, column].isnan():
                    seen.setdefault((index, column), []).append(scores[position, column].item())
    table = metric.table()
    for (index, column), values in seen.items():
        name = "abc"[column]
        assert table.counts[index, column] == len(values)
        assert metric.compute()[index, column].item() == pytest.approx(np.mean(values), abs=1e-9)
        assert table.means(name)[index] == pytest.approx(np.mean(values), abs=1e-9)
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        assert table.standard_errors(name)[index] == pytest.approx(error, abs=1e-6)
    assert metric.compute()[4].isnan().all()


def test_task_scores_of_ranks_add_up():
    cell, scores = torch.arange(6) % 3, torch.rand(6, 2)
    whole, left, right = (TaskScores(3, ("a", "b")) for _ in range(3))
    whole.update(cell, scores)
    left.update(cell[::2], scores[::2])
    right.update(cell[1::2], scores[1::2])
    for state in ("sums", "squares", "counts"):
        assert left._reductions[state] is not None
        torch.testing.assert_close(getattr(left, state) + getattr(right, state), getattr(whole, state))


def test_task_scores_refuse_wrong_shapes():
    with pytest.raises(ValueError, match="0 cells"):
        TaskScores(0, ("a",))
    with pytest.raises(ValueError, match=r"must be \[2, 1\]"):
        TaskScores(2, ("a",)).update(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2))
