# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ``strategy="zeropp"`` on gloo ranks, against ``strategy="auto"`` in one process.

What is loaded has to be bit-equal to what was saved; losses behind it equal those of a run without interruption within
1e-12 (float64) and 1e-6 (float32), since sums have another order.
"""

import os

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_zeroprompt.strategies import ZeroPPStrategy, consolidate_checkpoint
from lightning_zeroprompt.strategies.checkpoint import trainer as checkpoints
from lightning_zeroprompt.strategies.checkpoint.files import Replacement
from lightning_zeroprompt.testing import run_distributed

WORDS, WIDTH, LENGTH, BATCH, BATCHES = 11, 8, 5, 8, 5
PIPE = {"num_microbatches": 4}
LAYOUTS = {
    "P2xD2": {"data_parallel_size": 2, "num_microbatches": 2},
    "P4xD1": {"num_microbatches": 4, "stages_per_rank": 2},
    "P1xD2": {"pipeline_parallel_size": 1, "data_parallel_size": 2, "stages_per_rank": 4, "num_microbatches": 4},
    "P2xD1": PIPE,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen += self.training
        return x + torch.tanh(self.linear(self.norm(x)))


class Noted(nn.Module):
    """Has state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.note, self.linear = "new", nn.Linear(WORDS, WORDS)

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]

    def forward(self, x):
        return self.linear(x)


class LM(pl.LightningModule):
    """Tied weights, a parameter that no stage owns, sizes that ranks cannot share evenly, buffers, a frozen part."""

    def __init__(self, optimizer="adamw", blocks=8, words=WORDS):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, words, bias=False)
        self.head.weight = self.embedding.weight
        self.noted = Noted()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(2))
        self.losses = []

    def loss(self, batch):
        tokens, targets = batch
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.noted(self.head(x)).flatten(0, 1), targets.flatten())

    def training_step(self, batch, index):
        self.steps += 1
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, index):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1]},
            {"params": [p for p in self.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.03},
        ]
        if self.hparams.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rows(Sampler):
    """Of every batch a data-parallel rank's rows."""

    def __init__(self, parts, part):
        self.parts, self.part = parts, part

    def __len__(self):
        return BATCH * BATCHES // self.parts

    def __iter__(self):
        size = BATCH // self.parts
        for start in range(self.part * size, BATCH * BATCHES, BATCH):
            yield from range(start, start + size)


class Resumable(DataLoader):
    """Goes on where it was; Lightning stores what ``state_dict`` returns."""

    done, skip = 0, 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.skip = state["done"]

    def __iter__(self):
        skip, self.skip = self.skip, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.done = index + 1
                yield batch


def loader(strategy):
    generator = torch.Generator().manual_seed(3)
    size = (BATCH * BATCHES, LENGTH)
    dataset = TensorDataset(*(torch.randint(0, WORDS, size, generator=generator) for _ in range(2)))
    parts = 1 if strategy == "auto" else strategy.get("data_parallel_size", 1)
    return Resumable(dataset, BATCH // parts, sampler=Rows(parts, int(os.environ.get("RANK", 0)) % parts))


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def held(trainer, module):
    """All state that this rank holds, whole, by name."""
    state = {name: whole(t) for name, t in module.state_dict().items() if isinstance(t, torch.Tensor) and not t.is_meta}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, values in optimizer.state.items():
            state |= {f"{names[id(parameter)]}/{key}": whole(value) for key, value in values.items()}
        state["rates"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
        state["steps of the schedule"] = torch.tensor(trainer.lr_scheduler_configs[0].scheduler.last_epoch)
    return state


class Held(Callback):
    """What has been restored."""

    def on_train_start(self, trainer, module):
        self.state = held(trainer, module)


def world():
    # Lightning removes WORLD_SIZE when a fit ends.
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])


def make_trainer(strategy, **more):
    alone = strategy == "auto"
    settings = {
        "accelerator": "cpu",
        "devices": 1 if alone else world(),
        "strategy": "auto" if alone else ZeroPPStrategy(**strategy),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**settings | more)


def fit(strategy, steps, resume="", save=None, optimizer="adamw", dtype=torch.float64, **more):
    """Train to ``steps``: losses, the state after resuming and at the end."""
    torch.set_default_dtype(dtype)
    try:
        module, restored = LM(optimizer), Held()
        trainer = make_trainer(strategy, max_steps=steps, callbacks=[restored, *more.pop("callbacks", [])], **more)
        trainer.fit(module, loader(strategy), ckpt_path=resume or None)
        if save is not None:
            trainer.save_checkpoint(save)
        return {"losses": module.losses, "restored": restored.state, "end": held(trainer, module)}
    finally:
        torch.set_default_dtype(torch.float32)


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


def dist_rank():
    return int(os.environ.get("RANK", 0))


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


def interrupted(folder, strategy, break_it):
    """A good checkpoint, then a save that fails on one rank."""
    module = LM()
    trainer = make_trainer(strategy, max_steps=1)
    trainer.fit(module, loader(strategy))
    target = f"{folder}/good.ckpt"
    trainer.save_checkpoint(target)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    break_it(target)
    try:
        trainer.save_checkpoint(target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def full_disk(target):
    """Rank 1 cannot write its part of a folder, rank 0 not the file."""

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if dist_rank() == 1:
        FileSystemWriter.write_data = fail
    checkpoints.save_file = fail


def killed(target):
    """A rank dies when its part is written and nothing is renamed yet."""

    def die(*args, **kwargs):
        assert os.path.isdir(os.path.join(os.path.dirname(target), ".good.ckpt.partial"))
        os._exit(7)

    if dist_rank() == 1:
        FileSystemWriter.write_data = die
    checkpoints.save_file = die


@pytest.mark.parametrize("single", [False, True])
def test_an_interrupted_save_leaves_the_good_checkpoint(tmp_path, monkeypatch, request, single):
    monkeypatch.syspath_prepend(request.config.rootpath)
    strategy = PIPE | {"save_distributed_checkpoint": not single}
    messages = run_distributed(interrupted, 2, str(tmp_path), strategy, full_disk, timeout=200)
    for message in messages:
        assert "No space left" in message
        assert ("rank 0" if single else "rank 1") in message or message.startswith("OSError")
    assert os.listdir(tmp_path) == ["good.ckpt"]
    with pytest.raises(RuntimeError, match=r"died with exit code|raised"):
        run_distributed(interrupted, 2, str(tmp_path), strategy, killed, timeout=200)
    # Of a folder rank 0, which lives on for a moment, may have cleared up.
    assert sorted(os.listdir(tmp_path)) == [".good.ckpt.partial", "good.ckpt"] or not single
    # The next save, of whatever, clears up.
    Replacement(tmp_path / "next.ckpt").discard()
    assert os.listdir(tmp_path) == ["good.ckpt"]
    path = tmp_path / "good.ckpt"
    if not single:
        path = tmp_path / "file.ckpt"
        consolidate_checkpoint(tmp_path / "good.ckpt", path)
    state = torch.load(path)["state_dict"]
    assert all(bool(value.any()) for name, value in state.items() if name.endswith("weight"))


def refusals(folder):
    """Messages for checkpoints that cannot be loaded."""
    strategies = {"folder": PIPE, "file": PIPE | {"save_distributed_checkpoint": False}}

    def attempt(strategy, path, module=None, **more):
        try:
            make_trainer(strategy, max_steps=2).fit(module or LM(), loader(strategy), ckpt_path=path, **more)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    class Content(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["mine"] = Mine()

    messages = {}
    for form, strategy in strategies.items():
        trainer = make_trainer(strategy, max_steps=1, callbacks=[content := Content()])
        trainer.fit(LM(), loader(strategy))
        trainer.save_checkpoint(f"{folder}/{form}-objects")
        trainer.callbacks.remove(content)
        trainer.save_checkpoint(f"{folder}/{form}")
        trainer.save_checkpoint(f"{folder}/{form}-weights", weights_only=True)
        messages[form] = {
            "names": attempt(strategy, f"{folder}/{form}", LM(blocks=6)),
            "shapes": attempt(strategy, f"{folder}/{form}", LM(words=13)),
            "optimizer": attempt(strategy, f"{folder}/{form}-weights"),
            "objects": attempt(strategy, f"{folder}/{form}-objects"),
            "trusted": attempt(strategy, f"{folder}/{form}-objects", weights_only=False),
            "absent": attempt(strategy, f"{folder}/nothing"),
        }
        trainer = make_trainer(strategy)
        messages[form]["evaluated"] = trainer.validate(
            LM(), loader(strategy), ckpt_path=f"{folder}/{form}-weights", verbose=False
        )
    return messages


class Mine:
    """An object that a user stores."""


def test_what_cannot_be_loaded_is_refused_with_the_way_out(run_ranks, tmp_path):
    for messages in run_ranks(refusals, 2, str(tmp_path), timeout=400):
        for form, found in messages.items():
            for key in ("names", "shapes", "optimizer", "objects"):
                assert found[key].startswith("ValueError"), (form, key, found[key])
            assert "layers.7.linear.weight" in found["names"]
            assert "strict_loading" in found["names"]
            assert "(11, 8)" in found["shapes"] or "[11, 8]" in found["shapes"]
            assert "(13, 8)" in found["shapes"] or "[13, 8]" in found["shapes"]
            assert "load_from_checkpoint" in found["optimizer"]
            assert "Mine" in found["objects"]
            assert "weights_only=False" in found["objects"]
            assert found["trusted"] == "loaded"
            assert found["absent"].startswith("FileNotFoundError")
            assert found["evaluated"][0]["val_loss"] > 0
