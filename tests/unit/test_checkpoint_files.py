# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files without ranks: replacing, reading without pickles, numbering of optimizer state."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_zeroprompt.strategies import consolidate_checkpoint
from lightning_zeroprompt.strategies.checkpoint.__main__ import main
from lightning_zeroprompt.strategies.checkpoint.files import Replacement, finish_replacement, load_file, save_file
from lightning_zeroprompt.strategies.checkpoint.optimizer import names_to_numbers, numbers_to_names


def write(path, text):
    replacement = Replacement(path)
    replacement.content.mkdir()
    (replacement.content / "text").write_text(text)
    return replacement


def test_a_folder_is_replaced_when_the_new_one_is_whole(tmp_path):
    target = tmp_path / "a.ckpt"
    write(target, "one").commit()
    second = write(target, "two")
    assert (target / "text").read_text() == "one"
    second.commit()
    assert (target / "text").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path):
    write(tmp_path / "a.ckpt", "one").commit()
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    write(tmp_path / "last.ckpt", "two").commit()
    assert (tmp_path / "a.ckpt" / "text").read_text() == "one"
    assert (tmp_path / "last.ckpt" / "text").read_text() == "two"


def test_a_kill_between_the_two_renames_is_made_good(tmp_path):
    target = tmp_path / "a.ckpt"
    write(target, "one").commit()
    second = write(target, "two")
    target.rename(tmp_path / ".a.ckpt.partial" / "replaced")
    second._lock.release()
    finish_replacement(target)
    assert (target / "text").read_text() == "two"
    Replacement(tmp_path / "b.ckpt").discard()
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_save_that_still_runs_is_left_alone(tmp_path):
    first = write(tmp_path / "a.ckpt", "one")
    Replacement(tmp_path / "b.ckpt").discard()
    with pytest.raises(RuntimeError, match="another process is saving"):
        Replacement(tmp_path / "a.ckpt")
    first.commit()
    assert (tmp_path / "a.ckpt" / "text").read_text() == "one"


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


def make_folder(path, **more):
    state = {"state_dict": {"a.b": torch.arange(3.0)}, "optimizer_0": {"state": {"a.b": {"x": torch.ones(3)}}}}
    save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    groups = [{"lr": 0.5, "params": ["frozen", "a.b"]}]
    ours = {"version": 1, "aliases": {"tied": "a.b"}, "values": {}, "param_groups": [groups]}
    save_file({"epoch": 2, "zeropp": ours, **more}, path / "meta.pt")


def test_a_folder_becomes_a_file(tmp_path):
    make_folder(tmp_path / "a")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "lightning_zeroprompt.strategies.checkpoint"]
    subprocess.run([*command, str(tmp_path / "a"), str(tmp_path / "a.ckpt")], check=True, timeout=200)
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert found.keys() == {"epoch", "state_dict", "optimizer_states"}
    assert found["state_dict"]["tied"].data_ptr() == found["state_dict"]["a.b"].data_ptr()
    assert found["state_dict"]["tied"].tolist() == [0.0, 1.0, 2.0]
    (optimizer,) = found["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.5, "params": [0, 1]}]
    assert optimizer["state"].keys() == {1}


def test_no_code_of_a_folder_is_run(tmp_path, capsys):
    make_folder(tmp_path / "a", mine=Evil())
    assert main([str(tmp_path / "a"), str(tmp_path / "a.ckpt")]) == 1
    assert "weights_only=False" in capsys.readouterr().err
    make_folder(tmp_path / "b")
    (tmp_path / "b" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="no index of a checkpoint folder"):
        consolidate_checkpoint(tmp_path / "b", tmp_path / "b.ckpt")


def test_an_incomplete_folder_is_refused(tmp_path):
    make_folder(tmp_path / "a")
    data = tmp_path / "a" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"incomplete: __0_0.distcp is of \d+ bytes"):
        consolidate_checkpoint(tmp_path / "a", tmp_path / "a.ckpt")
    (tmp_path / "a" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata missing"):
        consolidate_checkpoint(tmp_path / "a", tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError):
        consolidate_checkpoint(tmp_path / "nothing", tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_file(tmp_path / "a.ckpt")


def test_numbers_are_those_of_torch():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [{"params": [module[1].weight, module[0].bias], "lr": 0.1}, {"params": [module[0].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    expected = optimizer.state_dict()
    known = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    named = numbers_to_names(expected, known)
    assert named["state"].keys() == {"1.weight", "0.bias", "0.weight"}
    for name, values in named["state"].items():
        assert values["momentum_buffer"].shape == module.get_parameter(name).shape
    groups = [{**group, "params": names} for group, names in zip(named["param_groups"], known, strict=True)]
    found = names_to_numbers({"state": named["state"], "param_groups": groups})
    assert found == expected
    with pytest.raises(ValueError, match=r"groups of \[2, 1\] parameters, configure_optimizers makes groups of \[3\]"):
        numbers_to_names(expected, [[*known[0], *known[1]]])
