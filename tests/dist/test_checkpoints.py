# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ``strategy="zeropp"`` on gloo ranks, against ``strategy="auto"`` in one process.

What is loaded has to be bit-equal to what was saved; losses behind it equal those of a run without interruption within
1e-12 (float64) and 1e-6 (float32), since sums have another order.
"""

import os

import pytest
import torch
from checkpointing import LM, PIPE, Held, dist_rank, fit, loader, make_trainer, whole
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_zeroprompt.strategies import consolidate_checkpoint

LAYOUTS = {
    "P2xD2": {"data_parallel_size": 2, "num_microbatches": 2},
    "P4xD1": {"num_microbatches": 4, "stages_per_rank": 2},
    "P1xD2": {"pipeline_parallel_size": 1, "data_parallel_size": 2, "stages_per_rank": 4, "num_microbatches": 4},
    "P2xD1": PIPE,
}
KINDS = {"adamw": torch.float64, "sgd": torch.float32}


def chain(legs):
    """Several fits on these ranks, one behind the other, for both optimizers."""
    return [
        {kind: fit(*leg[:2], *(path.format(kind) for path in leg[2:]), kind, KINDS[kind]) for kind in KINDS}
        for leg in legs
    ]


def together(results):
    """One state of those of all ranks; a counter has advanced on the rank that runs its block alone."""
    state = {}
    for result in results:
        for name, value in result.items():
            if name not in state or (value.numel() and "seen" in name and value > state[name]):
                state[name] = value
            if name == "steps" and value.sum() > state[name].sum():
                state[name] = value
    return state


@pytest.fixture(scope="module")
def uninterrupted():
    return {kind: fit("auto", 12, "", None, kind, dtype) for kind, dtype in KINDS.items()}


def test_a_run_continues_on_any_layout(run_ranks, uninterrupted, tmp_path):
    a, b, c, d, e = (str(tmp_path / f"{letter}-{{}}.ckpt") for letter in "abcde")
    single = {"save_distributed_checkpoint": False}
    ranks = run_ranks(chain, 4, [(LAYOUTS["P2xD2"], 2, "", a), (LAYOUTS["P4xD1"], 4, a, b)], timeout=400)
    legs = [{kind: [result[leg][kind] for result in ranks] for kind in KINDS} for leg in range(2)]
    ranks = run_ranks(chain, 2, [(LAYOUTS["P1xD2"] | single, 6, b, c)], timeout=300)
    legs.append({kind: [result[0][kind] for result in ranks] for kind in KINDS})
    # The single file goes on without zeropp; so does the folder, made one file.
    legs.append({kind: [fit("auto", 8, c.format(kind), d.format(kind), kind, KINDS[kind])] for kind in KINDS})
    for kind in KINDS:
        consolidate_checkpoint(b.format(kind), e.format(kind))
        converted = fit("auto", 6, e.format(kind), None, kind, KINDS[kind])
        check_restored([converted], legs[1][kind])
        torch.testing.assert_close(converted["losses"], uninterrupted[kind]["losses"][4:6], atol=1e-6, rtol=0)
    last = [(LAYOUTS[name], 10, d, str(tmp_path / f"{name}-{{}}.ckpt")) for name in ("P2xD1", "P1xD2")]
    ranks = run_ranks(chain, 2, last, timeout=300)
    for kind in KINDS:
        check_restored([result[1][kind] for result in ranks], legs[-1][kind])
    legs.append({kind: [result[0][kind] for result in ranks] for kind in KINDS})
    for kind, tolerance in {"adamw": 1e-12, "sgd": 1e-6}.items():
        for number, leg in enumerate(legs):
            losses = [sum(parts) / len(parts) for parts in zip(*(r["losses"] for r in leg[kind]), strict=True)]
            expected = uninterrupted[kind]["losses"][2 * number : 2 * number + 2]
            assert losses == pytest.approx(expected, rel=0, abs=tolerance), number
            if number:
                check_restored(leg[kind], legs[number - 1][kind])


def check_restored(results, before):
    saved = together([result["end"] for result in before])
    assert any("/" in name for name in saved)
    for result in results:
        for name, value in result["restored"].items():
            assert torch.equal(value, saved[name]), name
    assert together([result["restored"] for result in results]).keys() == saved.keys()


class Evaluated(LM):
    """Validation losses that are best in the middle of training."""

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.log("score", torch.tensor(abs(self.trainer.global_step - 6.0)))


def features(folder, strategy):
    """A run with Lightning's checkpoint callback, and what follows from its checkpoints."""
    torch.set_default_dtype(torch.float64)

    def make(steps):
        keep = ModelCheckpoint(folder, filename="{step}", monitor="score", save_top_k=2, save_last=True)
        # Validation falls between two batches of an epoch.
        interval = {"val_check_interval": 3, "check_val_every_n_epoch": None}
        return make_trainer(strategy, max_steps=steps, callbacks=[keep], enable_checkpointing=True, **interval), keep

    train, val = loader(strategy), loader(strategy)
    module = Evaluated()
    trainer, keep = make(8)
    trainer.fit(module, train, val)
    found = {
        "files": sorted(os.listdir(folder)),
        "best": os.path.basename(keep.best_model_path),
        "test": trainer.test(module, loader(strategy), ckpt_path="best", verbose=False),
        "validate": trainer.validate(module, loader(strategy), ckpt_path=keep.last_model_path, verbose=False),
    }
    again, keep = make(11)
    module = Evaluated()
    again.fit(module, loader(strategy), loader(strategy), ckpt_path="last")
    return found | {"losses": module.losses, "kept": sorted(os.path.basename(path) for path in keep.best_k_models)}


@pytest.mark.parametrize("single", [False, True])
def test_checkpoints_of_callbacks_are_those_of_auto(run_ranks, tmp_path, single):
    expected = features(str(tmp_path / "auto"), "auto")
    torch.set_default_dtype(torch.float32)
    assert expected["best"] == "step=6.ckpt"
    assert len(expected["losses"]) == 5
    strategy = PIPE | {"save_distributed_checkpoint": not single}
    for found in run_ranks(features, 2, str(tmp_path / "zeropp"), strategy, timeout=300):
        for key in ("files", "best", "kept"):
            assert found[key] == expected[key], key
        for key in ("test", "validate"):
            assert found[key] == [pytest.approx(expected[key][0], abs=1e-12)], key
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-12)
    path = tmp_path / "zeropp" / "last.ckpt"
    if single:
        loaded = Evaluated.load_from_checkpoint(path, weights_only=True)
        reference = Evaluated.load_from_checkpoint(tmp_path / "auto" / "last.ckpt", weights_only=True)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(loaded.state_dict()[name], parameter.detach(), atol=1e-12, rtol=0, msg=name)
        assert loaded.head.weight is loaded.embedding.weight
    else:
        assert not (path / "content").exists()


class Extra(Callback):
    """Puts states of its own into checkpoints, as callbacks that average weights do."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["current"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: self.average(value) for name, value in checkpoint["current"].items()}
        checkpoint["count"] = {"n": torch.tensor(3)}
        # Nothing is there to be saved, and nothing fails.
        checkpoint["shadow"] = {name: torch.empty(2, device="meta") for name, _ in module.named_parameters()}

    def average(self, value):
        return value * 0.5 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.found = checkpoint["current"]
        assert checkpoint["count"]["n"] == 3
        assert "shadow" not in checkpoint


def extras(folder, strategy):
    """Save before the first step, with extra states; resume from it."""
    torch.set_default_dtype(torch.float64)

    class Start(Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(f"{folder}/start.ckpt")

    module = LM()
    # Behind the blocks: the last stage's, and there the first data-parallel rank's.
    writer = 0 if strategy.get("pipeline_parallel_size") == 1 else 1
    module.noted.note = "saved" if dist_rank() == writer else "another rank's"
    trainer = make_trainer(strategy, max_steps=1, callbacks=[Start(), Extra()])
    trainer.fit(module, loader(strategy))
    loaded, extra, restored = LM(), Extra(), Held()
    trainer = make_trainer(strategy, max_steps=1, callbacks=[extra, restored])
    trainer.fit(loaded, loader(strategy), ckpt_path=f"{folder}/start.ckpt")
    found = {name: whole(t) for name, t in extra.found.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    return loaded.noted.note, found, restored.state


@pytest.mark.parametrize("layout", ["P2xD1", "P1xD2"])
@pytest.mark.parametrize("single", [False, True])
def test_states_that_callbacks_add_are_stored_by_name(run_ranks, tmp_path, layout, single):
    strategy = LAYOUTS[layout] | {"save_distributed_checkpoint": not single}
    results = run_ranks(extras, 2, str(tmp_path), strategy, timeout=300)
    torch.set_default_dtype(torch.float64)
    reference = LM().state_dict()
    torch.set_default_dtype(torch.float32)
    names = {name for name, value in reference.items() if isinstance(value, torch.Tensor)}
    for note, found, restored in results:
        assert note == "saved"
        for name in names & found.keys():
            assert torch.equal(found[name], reference[name]), name
        for name in names & restored.keys():
            value = reference[name]
            assert torch.equal(restored[name], value * 0.5 if value.is_floating_point() else value), name
        assert not any("/" in name for name in restored)
    assert {name for _, found, _ in results for name in found} >= names
    if single:
        stored = torch.load(tmp_path / "start.ckpt")
        assert stored["state_dict"].keys() == reference.keys() == stored["current"].keys()
        assert stored["optimizer_states"][0]["state"] == {}
