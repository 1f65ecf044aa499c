# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch.distributed as dist

from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models.t5 import T5, T5Config
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import ShardedForward, T5Forward
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.pool import ExamplePool


class Counting(T5Forward):
    built = 0

    def _score(self, batch):
        self.built += 1
        return super()._score(batch)


def scores(free, forward_of):
    options = None if free else ("yes", "no")
    examples = [Example(input="abc " * (i % 7) + str(i), outputs=("no",), options=options) for i in range(21)]
    pool = ExamplePool.from_examples("t", examples, (PromptTemplate(name="t", text="{input}"),), ByteTokenizer())
    model = T5(T5Config.preset("nano", 359, num_encoder_layers=1, num_decoder_layers=1), seed=3)
    inner = Counting(model)
    scorer = PromptScorer(pool, forward_of(inner), max_tokens=150)
    result = scorer.score([PromptGenome(instruction="Say"), PromptGenome(answer_cue="So:")], outcomes=True)
    return result.fitness, result.outcome, inner.built


def on_a_rank():
    dist.init_process_group("gloo")
    try:
        return [scores(free, ShardedForward) for free in (False, True)]
    finally:
        dist.destroy_process_group()


def test_ranks_share_the_batches_and_agree_with_one_process_bit_for_bit(run_ranks):
    alone = [scores(free, lambda forward: forward) for free in (False, True)]
    ranks = run_ranks(on_a_rank, 3)
    for kind in range(2):
        batches = [rank[kind][2] for rank in ranks]
        assert sum(batches) == alone[kind][2] > 5
        assert max(batches) - min(batches) <= 1
        for rank in ranks:
            np.testing.assert_array_equal(rank[kind][0], alone[kind][0])
            np.testing.assert_array_equal(rank[kind][1], alone[kind][1])
