# SPDX-License-Identifier: Apache-2.0
"""A small prompt search, for the tests of the search, its reports and its callback."""

import torch

from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.prompts.operators import OperatorSet
from lightning_zeroprompt.prompts.pool import ExamplePool
from lightning_zeroprompt.prompts.problem import build_problem
from lightning_zeroprompt.prompts.racing import RaceSettings
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.settings import SearchSettings

# No text model, and nothing that the model below cannot see.
WEIGHTS = {"crossover": 1, "delete_phrase": 1, "swap_phrases": 1, "duplicate_phrase": 2, "reinsert_phrase": 1}
TEMPLATES = (
    PromptTemplate(name="dull", text="Say which. {input} Options: {options}"),
    PromptTemplate(name="jazz", text="Some jazz here, and more of it. {input}\nAnswer:"),
)


class LetterModel:
    """Likes the right option more, the more often a letter stands in the input; counts what it is given.

    Its margin is 0.1 a letter, less for longer inputs, and a little of the example's own.
    """

    def __init__(self, letter="z", noise=0.3, bad=None):
        self.letter, self.noise, self.bad = ord(letter), noise, bad
        self.pairs = self.answers = 0
        self.first = ByteTokenizer().encode_batch(["a"])[0][0] - ord("a")

    def option_logprobs(self, batches):
        results = []
        for batch in batches:
            ids, example = batch["input_ids"], batch["option_example"]
            self.pairs += len(ids)
            count = (ids == self.letter + self.first).sum(1) * 0.1 - (ids > 0).sum(1) * 1e-4
            own = torch.sin(ids.sum(1) * 12.9898) * self.noise
            score = torch.where(batch.get("option_correct", torch.ones_like(example) > 0), (count + own)[example], 0.0)
            if self.bad is not None:
                has_bad = (ids == ord(self.bad) + self.first).any(1)
                score = torch.where(has_bad[example], torch.nan, score)
            results.append(score.float())
        return results

    def generate(self, batches):
        self.answers += sum(len(batch["input_ids"]) for batch in batches)
        return [[ByteTokenizer().encode_batch(["a"])[0]] * len(batch["input_ids"]) for batch in batches]


def make_pool(count=80, templates=TEMPLATES, free=False):
    options = None if free else ("yes", "no")
    examples = [
        Example(input=f"row {i}", outputs=("a",) if free else (options[i % 2],), options=options) for i in range(count)
    ]
    return ExamplePool.from_examples("task", examples, templates, ByteTokenizer())


def make_search(model, *, pool=None, mode="few_label", k=32, generations=3, population=8, weights=WEIGHTS, **settings):
    problem = build_problem(pool or make_pool(), population=population, mode=mode, k=k)
    chosen = SearchSettings(
        population=population, generations=generations, race=RaceSettings(first_block=4, finalists=2), **settings
    )
    return PromptSearch(problem, model, OperatorSet(weights), chosen)


def run_round(search, step=1, clock=None):
    search.begin(step)
    while search.advance(clock):
        pass
    return search
