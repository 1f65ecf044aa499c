# SPDX-License-Identifier: Apache-2.0
"""What steps log, return and count, on a pipeline and alone: equal on every rank.

To 1e-9 in float64; torchmetrics' values, which are float32, to 1e-6.
"""

import pytest
import torch
import torch.nn.functional as F
from contract import LENGTH, LM, WORDS, both, check, loader, numbers, parameters, trainer
from lightning.pytorch import Callback
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import MinMaxMetric

TWO_STAGES = {"num_microbatches": 4}
GRID = {"data_parallel_size": 2, "num_microbatches": 2}


class Watch(Callback):
    """What callbacks and loggers are given, step by step."""

    def __init__(self):
        self.seen = {"steps": [], "bar": [], "validation": [], "outputs": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.seen["steps"].append(numbers(trainer.logged_metrics))
        self.seen["bar"].append({k: v for k, v in trainer.progress_bar_metrics.items() if isinstance(v, float)})
        if len(outputs) > 1:
            self.seen["outputs"].append({key: outputs[key].tolist() for key in outputs if key != "loss"})

    def on_validation_batch_end(self, trainer, module, outputs, batch, index, dataloader_idx=0):
        self.seen["validation"].append({"at": dataloader_idx, **{k: v.tolist() for k, v in (outputs or {}).items()}})

    def on_validation_end(self, trainer, module):
        self.seen["steps"].append(numbers(trainer.logged_metrics))


def watched(strategy, module, loaders=None, **settings):
    watch = Watch()
    fitting = trainer(strategy, callbacks=[watch], **settings)
    fitting.fit(module, loader(strategy, rows=24), loaders or loader(strategy, rows=20))
    return {"seen": watch.seen, "metrics": numbers(fitting.callback_metrics), "parameters": parameters(module)}


class Logs(LM):
    """self.log in all its ways: sums are over rows, so that micro-batches add up."""

    def row_losses(self, batch):
        logits = self.net(batch[0])
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="none").view(-1, LENGTH).mean(1)

    def training_step(self, batch, index):
        rows = self.row_losses(batch)
        loss = rows.mean()
        self.log("step", loss)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("both", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("sum", rows.detach().sum(), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("max", rows.max(), on_step=True, on_epoch=True, reduce_fx=torch.max)
        self.log("min", rows.min(), on_step=False, on_epoch=True, reduce_fx="min")
        self.log("synced", loss, on_step=True, on_epoch=True, sync_dist=True, reduce_fx="mean")
        self.log("sized", loss, on_step=False, on_epoch=True, batch_size=(1 + index) * len(rows))
        self.log("number", 3, on_epoch=True)
        self.log("positional", float(index), True, False, True, False)
        self.log_dict({"a": loss * 2, "b": float(index)}, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, index, dataloader_idx=0):
        rows = self.row_losses(batch)
        self.log("val_mean", rows.mean(), sync_dist=True)
        self.log("val_sum", rows.sum(), sync_dist=True, reduce_fx="sum", on_step=True, on_epoch=True)
        self.log("val_max", rows.max(), sync_dist=True, reduce_fx="max")
        self.log("val_min", rows.min(), sync_dist=True, reduce_fx="min")
        if index % 2:
            self.log(f"val_odd_{dataloader_idx}", rows.mean(), batch_size=7, sync_dist=True, add_dataloader_idx=False)
        return {"rows": rows}

    def on_train_epoch_end(self):
        self.log("hook", 7.0)


class LogsOverRanks(Logs):
    """What data-parallel ranks log has to be reduced to be equal."""

    def training_step(self, batch, index):
        rows = self.row_losses(batch)
        self.log("mean", rows.mean(), on_step=True, on_epoch=True, sync_dist=True)
        self.log("sum", rows.detach().sum(), on_step=True, on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.log("max", rows.max(), on_step=True, on_epoch=True, reduce_fx="max", sync_dist=True)
        return rows.mean()


class Confusions(Metric):
    """A cat-state, and one that is no sum: what a rank without data holds would change it."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("smallest", default=torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, logits, targets):
        self.values.append(torch.where(logits.argmax(-1) == targets, 1.0, -2.0).flatten())
        self.smallest = logits.mean()

    def compute(self):
        values = torch.cat(self.values) if isinstance(self.values, list) else self.values
        return values.sort().values[values.numel() // 3] + values.double().std() + values.numel()


class Counts(LM):
    """torchmetrics objects, in collections, wrapped, updated in steps and in hooks."""

    def __init__(self, **more):
        super().__init__(**more)
        settings = {"num_classes": WORDS, "average": "micro"}
        self.accuracy = MulticlassAccuracy(**settings)
        self.several = MetricCollection(
            {"accuracy": MulticlassAccuracy(num_classes=WORDS), "f1": MulticlassF1Score(num_classes=WORDS)},
            prefix="train_",
        )
        self.val_several = self.several.clone(prefix="val_")
        self.confusions = Confusions()
        self.val_confusions = Confusions()
        self.rows = SumMetric()
        self.hooked = SumMetric()
        self.largest = MaxMetric()
        self.weighted = MeanMetric()
        self.extremes = MinMaxMetric(MulticlassAccuracy(**settings))

    def training_step(self, batch, index):
        self.rows(batch[0].shape[0])
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        flat, targets = logits.detach().flatten(0, 1), batch[1].flatten()
        self.accuracy(flat, targets)
        self.confusions.update(flat, targets)
        self.several.update(flat, targets)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("confusions", self.confusions, on_step=False, on_epoch=True)
        self.log("rows", self.rows, on_step=False, on_epoch=True)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        logits = self.net(batch[0]).flatten(0, 1)
        targets = batch[1].flatten()
        self.val_several(logits, targets)
        self.log_dict(self.val_several)
        self.val_confusions(logits, targets)
        self.log("val_confusions", self.val_confusions)
        self.largest.update(logits)
        self.weighted.update(logits.mean(), weight=logits.shape[0])
        self.extremes.update(logits, targets)
        return {"logits": logits}

    def on_validation_batch_end(self, outputs, batch, index):
        self.hooked.update(outputs["logits"].sum())

    def on_validation_epoch_end(self):
        for name in ("hooked", "largest", "weighted"):
            metric = getattr(self, name)
            self.log(f"val_{name}", metric.compute())
            metric.reset()
        self.log_dict({f"val_{name}": value for name, value in self.extremes.compute().items()})
        self.extremes.reset()


class Returns(LM):
    """A dict with more than the loss."""

    def training_step(self, batch, index):
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return {
            "loss": loss,
            "logits": logits.detach(),
            "norm": logits.detach().mean(),
            "correct": logits.argmax(-1) > 4,
        }


def logs(strategy):
    return watched(strategy, Logs(), max_epochs=2)


def logs_over_ranks(strategy):
    return watched(strategy, LogsOverRanks(), max_epochs=2)


def several_loaders(strategy):
    loaders = [loader(strategy, rows=20), loader(strategy, rows=8, seed=9)]
    return watched(strategy, Logs(), loaders)


def counts(strategy):
    return watched(strategy, Counts(), max_epochs=2)


def returns(strategy):
    return watched(strategy, Returns())


@pytest.mark.parametrize("run", [logs, several_loaders, counts, returns])
def test_two_ranks_log_as_one(run_ranks, run):
    check(run_ranks(both, 2, run, TWO_STAGES), 1e-6 if run is counts else 1e-9)


@pytest.mark.parametrize("run", [logs_over_ranks, counts])
def test_pipelines_side_by_side_log_as_one(run_ranks, run):
    ranks = run_ranks(both, 4, run, GRID)
    for alone, found in ranks:
        # Outputs, and values that are not reduced, are a rank's own.
        del alone["seen"]["validation"], found["seen"]["validation"]
        if run is counts:
            for step in alone["seen"]["steps"] + found["seen"]["steps"] + [alone["metrics"], found["metrics"]]:
                for name in ("accuracy_step", "accuracy", "train_loss_step"):
                    step.pop(name, None)
    check(ranks, 1e-6 if run is counts else 1e-9)
