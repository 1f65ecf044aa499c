# SPDX-License-Identifier: Apache-2.0
"""PipelineMonitor on gloo ranks: what it logs and writes, and that what it measured is what the schedule says.

Times are the machine's, so only what must hold of any of them is asserted.
"""

import json
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_zeroprompt.callbacks import PipelineMonitor
from lightning_zeroprompt.strategies import ZeroPPStrategy

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 5, 8, 11


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Module(pl.LightningModule):
    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Residual() for _ in range(4)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.head(self.blocks(self.embedding(inputs))).flatten(0, 1), labels.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Log(DummyLogger):
    def __init__(self):
        super().__init__()
        self.found = {}

    def log_metrics(self, metrics, step=None):
        found = {name: value for name, value in metrics.items() if name.startswith("pipeline/")}
        if found:
            self.found[step] = found


def fit(folder, settings, strategy, steps=6, accelerator="cpu"):
    """Scalars by step, and the tasks of the last recorded timeline."""
    words = torch.randint(VOCABULARY, (ROWS * steps, LENGTH), generator=torch.Generator().manual_seed(1))
    log, monitor = Log(), PipelineMonitor(**settings)
    trainer = pl.Trainer(
        strategy=ZeroPPStrategy(**strategy) if isinstance(strategy, dict) else strategy,
        accelerator=accelerator,
        devices="auto" if strategy == "auto" else 2,
        max_steps=steps,
        logger=log,
        callbacks=[monitor],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    per_rank = ROWS // (strategy.get("data_parallel_size", 1) if isinstance(strategy, dict) else 1)
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(words, words), per_rank))
    if isinstance(strategy, dict):
        pipeline = trainer.strategy.pipeline
        assert pipeline.executor.recorder is None
        held = [p.to_local() if isinstance(p, DTensor) else p for p in pipeline.parameters().values()]
        # What is announced, up to uneven shards.
        here = sum(part.numel() * part.element_size() for part in held)
        assert pipeline.state_bytes(pipeline.groups.pipeline_rank)[0] == pytest.approx(here, rel=0.1)
    weight = module.blocks[0].up.weight
    return log.found, monitor.recorded, None if weight.is_meta else weight.detach().cpu()


def weights_of(folder, settings, strategy):
    return [fit(folder, each, strategy)[2] for each in settings]


# A token's products: 4 blocks of two Linears, and the head; forward, input gradient and weight gradient.
FLOPS = 3 * 2 * (4 * 2 * WIDTH * 2 * WIDTH + WIDTH * VOCABULARY)


def check(found):
    assert found["pipeline/samples_per_second"] * LENGTH == pytest.approx(found["pipeline/tokens_per_second"])
    assert found["pipeline/samples_per_second"] == pytest.approx(ROWS / found["pipeline/seconds_per_step"])
    assert found["pipeline/tflops_per_device"] == pytest.approx(
        found["pipeline/tokens_per_second"] * FLOPS / 2 / 1e12, rel=0.01
    )
    assert found["pipeline/mfu"] == pytest.approx(found["pipeline/tflops_per_device"] / 2)
    idle = {name.removeprefix("pipeline/idle_"): value for name, value in found.items() if "/idle_" in name}
    assert idle.keys() == {"receive", "gather", "reduce", "end", "other"}
    assert all(0 <= share <= 1 for share in idle.values())
    assert 0 < found["pipeline/bubble_share"] < 1
    assert sum(idle.values()) == pytest.approx(found["pipeline/bubble_share"], abs=1e-6)
    # Between the memory of an interpreter and that of this machine.
    assert all(0.01 < found[f"pipeline/peak_gib_rank_{rank}"] < 1000 for rank in range(2))


def test_a_pipeline(run_ranks, tmp_path):
    settings = {"every_n_steps": 2, "peak_tflops": 2.0}
    strategy = {"num_microbatches": 4, "unit": 2}
    (found, timeline, _), (elsewhere, nothing, _) = run_ranks(fit, 2, str(tmp_path), settings, strategy)
    assert list(found) == [2, 4, 6]
    assert not elsewhere
    assert nothing is None
    for values in found.values():
        check(values)
    assert found[6]["pipeline/bubble_share"] == timeline.bubble_share
    # Timeline refuses overlaps; every task of the schedule ran, once, and behind what it needs.
    for rank, lane in enumerate(timeline.lanes):
        expected = {f"{kind}{stage}.{m}" for kind in "FBW" for stage in (rank, rank + 2) for m in range(4)}
        assert Counter(str(span.task) for span in lane.tasks) == Counter(expected)
        # Stage 0 alone never waits for an activation, the last one never for a gradient.
        assert sum(span.cause == "receive" for span in lane.waits) == 4 * 3
    spans = {str(span.task): span for lane in timeline.lanes for span in lane.tasks}
    for stage in range(1, 4):
        for m in range(4):
            assert spans[f"F{stage}.{m}"].start >= spans[f"F{stage - 1}.{m}"].start
            assert spans[f"F{stage}.{m}"].end > spans[f"F{stage - 1}.{m}"].end
            assert spans[f"B{stage - 1}.{m}"].end > spans[f"B{stage}.{m}"].end
    written = sorted(path.name for path in (Path(tmp_path) / "pipeline").iterdir())
    assert written == sorted(f"step_{step:09}.{end}" for step in (2, 4, 6) for end in ("json", "png"))
    events = json.loads((tmp_path / "pipeline" / "step_000000006.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {0, 1}


def test_gathers_and_reductions(run_ranks, tmp_path):
    settings = {"every_n_steps": 3, "peak_tflops": 2.0, "timeline": False}
    sizes = {"pipeline_parallel_size": 1, "data_parallel_size": 2, "stages_per_rank": 2, "num_microbatches": 2}
    (found, timeline, _), _ = run_ranks(fit, 2, str(tmp_path), settings, {**sizes, "resident": 1})
    assert list(found) == [3, 6]
    check(found[6])
    for lane in timeline.lanes:
        causes = Counter(str(span.cause) for span in lane.waits)
        # K=1: stage 0, stage 1 (kept over the turn), stage 0 again; a reduction a stage, and its wait at the end.
        assert causes == {"gather": 3, "reduce": 2 + 2 + 1}
    assert not list(tmp_path.iterdir())


def test_nothing_changes_what_is_trained(run_ranks, tmp_path):
    settings = [{"every_n_steps": 1}, {"every_n_steps": 100}]
    (watched, alone), _ = run_ranks(weights_of, 2, str(tmp_path), settings, {"num_microbatches": 4})
    assert torch.equal(watched, alone)


def test_without_a_pipeline(tmp_path):
    found, timeline, _ = fit(str(tmp_path), {"every_n_steps": 3, "peak_tflops": 1.0}, "auto")
    assert timeline is None
    assert found.keys() == {3, 6}
    assert found[6].keys() == {
        f"pipeline/{name}"
        for name in (
            "seconds_per_step", "tokens_per_second", "samples_per_second", "tflops_per_device", "mfu",
            "peak_gib_rank_0",
        )
    }  # fmt: skip
    values = found[6]
    assert values["pipeline/tflops_per_device"] == pytest.approx(
        values["pipeline/tokens_per_second"] * FLOPS / 1e12, rel=0.01
    )
    assert not list(tmp_path.iterdir())


def test_what_counts_as_tokens():
    from lightning_zeroprompt.callbacks.pipeline_monitor import count_tokens

    words = torch.zeros(4, 7, dtype=torch.long)
    assert count_tokens({"decoder_input_ids": words[:, :2], "input_ids": words, "segments": words}) == 4 * 9
    assert count_tokens([torch.zeros(4, 7), words[:, 0], words[:2]]) == 14
    assert count_tokens(torch.zeros(4, 7)) == 0


def test_steps_below_one_are_refused():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        PipelineMonitor(every_n_steps=0)
