# SPDX-License-Identifier: Apache-2.0
"""Saves that fail or are killed leave the checkpoint before them; what cannot be loaded is refused with the way out."""

import os

import pytest
import torch
from checkpointing import LM, PIPE, dist_rank, loader, make_trainer
from lightning.pytorch import Callback
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lightning_zeroprompt.strategies import consolidate_checkpoint
from lightning_zeroprompt.strategies.checkpoint import trainer as checkpoints
from lightning_zeroprompt.strategies.checkpoint.files import Replacement
from lightning_zeroprompt.testing import run_distributed


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
