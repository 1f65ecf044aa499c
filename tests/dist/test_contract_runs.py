# SPDX-License-Identifier: Apache-2.0
"""The Trainer's entry points and settings on a pipeline and alone: what runs when, and what comes of it."""

import os
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contract import LENGTH, LM, WORDS, both, check, loader, numbers, parameters, tokens, trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import BatchEncoding

TWO_STAGES = {"num_microbatches": 4}
GRID = {"data_parallel_size": 2, "num_microbatches": 2}


class Trace(Callback):
    """Which hooks ran, in order, with the step's number."""

    def __init__(self):
        self.calls = []

    def on_sanity_check_start(self, trainer, module):
        self.calls.append("sanity")

    def on_train_batch_start(self, trainer, module, batch, index):
        self.calls.append(f"train {trainer.current_epoch} {index} {trainer.global_step}")

    def on_validation_start(self, trainer, module):
        self.calls.append(f"validate {trainer.global_step}")

    def on_validation_batch_end(self, trainer, module, outputs, batch, index, dataloader_idx=0):
        self.calls.append(f"batch {dataloader_idx} {index}")

    def on_validation_end(self, trainer, module):
        values = numbers(trainer.callback_metrics)
        self.calls.append(tuple((name, value) for name, value in values.items() if name.startswith("val")))


class EntryPoints(LM):
    def test_step(self, batch, index):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, index):
        return {"words": self.net(batch[0]).argmax(-1), "logits": self.net_output(batch)}

    def net_output(self, batch):
        return torch.zeros(len(batch[0]))

    def forward(self, words):
        return self.net(words)


def traced(strategy, module=None, loaders=None, **settings):
    trace = Trace()
    module = module or LM()
    fitting = trainer(strategy, callbacks=[trace], **settings)
    fitting.fit(module, loader(strategy), loaders or loader(strategy, rows=20))
    return {
        "losses": module.losses,
        "calls": [call for call in trace.calls if isinstance(call, str)],
        "values": [value for call in trace.calls if not isinstance(call, str) for _, value in call],
        "parameters": parameters(module),
    }


def sanity(strategy):
    return traced(strategy, num_sanity_val_steps=2)


def limits(strategy):
    return traced(strategy, limit_train_batches=3, limit_val_batches=0.5, max_epochs=2)


def interval(strategy):
    return traced(strategy, val_check_interval=2, max_epochs=2, accumulate_grad_batches=2)


class SeveralLoaders(LM):
    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), sync_dist=True)


def loaders(strategy):
    return traced(
        strategy, module=SeveralLoaders(), loaders=[loader(strategy, rows=16), loader(strategy, rows=7, seed=5)]
    )


def overfit(strategy):
    return traced(strategy, overfit_batches=2, max_epochs=3)


def fast(strategy):
    return traced(strategy, fast_dev_run=2)


def entry_points(strategy):
    """fit, validate, test and predict, and fit again."""
    module = EntryPoints()
    running = trainer(strategy, max_epochs=1)
    before = running.validate(module, loader(strategy, rows=16), verbose=False)
    running.fit(module, loader(strategy), loader(strategy, rows=16))
    after = running.validate(module, loader(strategy, rows=16), verbose=False)
    tested = running.test(module, loader(strategy, rows=12), verbose=False)
    predicted = running.predict(module, loader(strategy, rows=12))
    running.fit_loop.max_epochs = 3
    running.fit(module, loader(strategy), loader(strategy, rows=16))
    return {
        "validated": [*before, *after, *tested],
        "predicted": predicted,
        "losses": module.losses,
        "parameters": parameters(module),
    }


def trainers(strategy):
    """One module in two Trainers, then another module in the second one."""
    module, other = LM(), LM("adamw", blocks=3)
    with torch.no_grad():
        other.net.embedding.weight.add_(0.1)
    trainer(strategy).fit(module, loader(strategy), loader(strategy, rows=16))
    second = trainer(strategy, max_epochs=2)
    second.fit(module, loader(strategy, seed=8))
    second.fit_loop.max_epochs = 4
    second.fit(other, loader(strategy, seed=9))
    own = {f"first {name}": value for name, value in parameters(module).items()} | parameters(other)
    return {"losses": module.losses + other.losses, "parameters": own}


RUNS = [sanity, limits, interval, loaders, overfit, fast, entry_points, trainers]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_two_ranks_run_as_one(run_ranks, run):
    check(run_ranks(both, 2, run, TWO_STAGES))


@pytest.mark.parametrize("run", [interval, trainers], ids=lambda run: run.__name__)
def test_pipelines_side_by_side_run_as_one(run_ranks, run):
    check(run_ranks(both, 4, run, GRID))


# -- batches ----------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    words: torch.Tensor
    targets: torch.Tensor


@dataclass
class Fields:
    words: torch.Tensor
    more: dict
    name: str = "text"


def as_dict(words, targets):
    return {"words": words, "more": {"targets": targets, "scale": torch.tensor(1.0)}, "names": ["a", "b"]}


def as_list(words, targets):
    return [words, [targets, 3]]


def as_fields(words, targets):
    return Fields(words, {"targets": targets, "rest": None})


def as_encoding(words, targets):
    return BatchEncoding({"words": words, "targets": targets})


def as_ordered(words, targets):
    return OrderedDict(words=words, more=defaultdict(list, targets=targets))


def unpack(batch):
    if isinstance(batch, list):
        return batch[0], batch[1][0]
    if isinstance(batch, Fields):
        return batch.words, batch.more["targets"]
    if isinstance(batch, Named):
        return batch
    return batch["words"], batch["targets"] if "targets" in batch else batch["more"]["targets"]


KINDS = [as_dict, as_list, as_fields, as_encoding, as_ordered, Named]


class AnyBatch(LM):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.kinds = kind, set()

    def loss(self, batch):
        self.kinds.add(type(batch))
        return super().loss(unpack(batch))


def collate(kind):
    return lambda rows: kind(*(torch.stack(part) for part in zip(*rows, strict=True)))


def kinds_of_batches(strategy):
    losses = {}
    for kind in KINDS:
        module = AnyBatch(kind)
        data = [DataLoader(tokens(24), 8, collate_fn=collate(kind)) for _ in range(2)]
        trainer(strategy).fit(module, *data)
        assert module.kinds in ({type(kind(torch.zeros(1), torch.zeros(1)))}, set())
        losses[kind.__name__] = module.losses
    return {"seen": losses}


def test_batches_may_be_nested_in_any_way(run_ranks):
    check(run_ranks(both, 2, kinds_of_batches, {"num_microbatches": 3}))


class TokenMean(LM):
    """Rows have unequal numbers of targets; their weight is the number of tokens."""

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        words, targets = batch
        lengths = words[:, :1] % LENGTH + 1
        return words, torch.where(torch.arange(LENGTH) < lengths, targets, -100)


class Weighed(TokenMean):
    def loss_weight(self, batch):
        return (batch[1] != -100).sum()


def token_means(strategy):
    module = Weighed()
    trainer(strategy, accumulate_grad_batches=2).fit(module, loader(strategy))
    return {"parameters": parameters(module)} | ({"losses": module.losses} if strategy != GRID else {})


@pytest.mark.parametrize(("ranks", "strategy"), [(2, TWO_STAGES), (4, GRID)])
def test_loss_weights_keep_the_token_mean(run_ranks, ranks, strategy):
    found = run_ranks(both, ranks, token_means, strategy)
    for alone, cut in found:
        if "losses" not in cut:
            # A rank's loss is its own token mean: their plain mean is not the whole batch's.
            alone.pop("losses")
    check(found)


def without_weights(strategy):
    module = TokenMean()
    trainer(strategy).fit(module, loader(strategy))
    return module.losses


def test_without_weights_rows_count_alike(run_ranks):
    """So that the test above tests something."""
    alone, found = run_ranks(both, 2, without_weights, TWO_STAGES)[0]
    assert alone != pytest.approx(found, abs=1e-4)


def chosen_counts():
    counts = []
    for rows, strategy in [(24, {}), (6, {}), (8, {"num_microbatches": 3}), (8, {"stages_per_rank": 1, "unit": 2})]:
        running = trainer(strategy, max_steps=1)
        running.fit(LM(), DataLoader(tokens(48), rows))
        schedule = next(iter(running.strategy._schedules.values()))
        placement = running.strategy.pipeline.placement
        counts.append((schedule.micro_batches, schedule.unit, placement.ranks, placement.stages_per_rank))
    running = trainer({}, max_steps=1)
    running.fit(LM(blocks=3), DataLoader(tokens(48), 8))
    counts.append(running.strategy.pipeline.placement.stages_per_rank)
    return counts


def test_what_is_not_given_is_chosen(run_ranks):
    """M: the largest divisor of the batch up to 4 P; U = M; V = 2 where there are 2 P blocks."""
    expected = [(8, 8, 2, 2), (6, 6, 2, 2), (3, 3, 2, 2), (8, 2, 2, 1), 1]
    assert run_ranks(chosen_counts, 2) == [expected] * 2


def rows_differ():
    """Loaders that shuffle with their own random numbers: the pipeline trains on the first rank's rows."""
    torch.manual_seed(int(os.environ["RANK"]))
    seen = []

    class Sees(LM):
        def on_train_batch_start(self, batch, index):
            seen.append(batch[0].tolist())

    module = Sees()
    trainer(TWO_STAGES).fit(module, DataLoader(tokens(), 8, shuffle=True))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    assert everyone[0] == everyone[1]
    return module.losses, WORDS


def test_ranks_of_a_pipeline_train_on_one_batch(run_ranks):
    first, second = run_ranks(rows_differ, 2)
    assert first == second
