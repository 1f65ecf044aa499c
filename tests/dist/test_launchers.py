# SPDX-License-Identifier: Apache-2.0
"""Programs of a user: started by Lightning, torchrun, two torchrun agents, SLURM or LightningCLI, and ended by a fault.

Each is a script in a folder of its own, run as from a shell. Starting two ranks takes some 10 s, so most are slow.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest

MODULE = """
import json
import os
import signal
import sys
import time

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_zeroprompt
from lightning_zeroprompt.strategies.stopping import GRACE


class Module(pl.LightningModule):
    def __init__(self, fault: str = "", at: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        self.fault, self.at, self.losses = fault, at, []

    def training_step(self, batch, index):
        if self.fault == "raise" and index == 2 and self.global_rank == self.at:
            raise KeyError("the user's own error")
        return self.net(batch).pow(2).mean()

    def on_train_batch_start(self, batch, index):
        if index == 2 and self.global_rank == self.at:
            if self.fault == "exit":
                os._exit(7)
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault in ("stop", "stop twice"):
                os.kill(os.getpid(), signal.SIGTERM)
            if self.fault == "stop twice":
                # As one that is stuck: by the next batch the ranks would have stopped together.
                time.sleep(GRACE + 0.5)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(600)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(outputs["loss"].item())

    def on_train_end(self):
        with open(f"losses-{self.global_rank}-of-{self.trainer.world_size}.json", "w") as file:
            json.dump(self.losses, file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), 8)


SETTINGS = dict(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
"""

FIT = """
from datetime import timedelta

from lightning.pytorch.callbacks import OnExceptionCheckpoint
from module import SETTINGS, Module, pl, sys
from lightning_zeroprompt.strategies import ZeroPPStrategy

nodes, fault, at = sys.argv[1:]
nodes = int(nodes)
strategy = ZeroPPStrategy(timeout=timedelta(seconds=30)) if fault else "zeropp"
if fault == "stop":
    SETTINGS |= {"callbacks": [OnExceptionCheckpoint(".", "stopped")], "enable_checkpointing": True}
pl.Trainer(strategy=strategy, devices=2 // nodes, num_nodes=nodes, **SETTINGS).fit(Module(fault, int(at)))
"""

CLI = """
from lightning.pytorch.cli import LightningCLI

from module import SETTINGS, Module

if __name__ == "__main__":
    LightningCLI(Module, trainer_defaults=SETTINGS, save_config_callback=None)
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (("module", MODULE), ("fit", FIT), ("cli", CLI)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def start(folder, *line, **more):
    """A program of this Python, in an environment that says nothing of ranks."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    paths = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | more
    return subprocess.Popen(
        [sys.executable, *map(str, line)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, timeout=240):
    """Exit codes and what was printed."""
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses of strategy="auto", in this process."""
    scope = {}
    exec(MODULE, scope)
    module = scope["Module"]()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        pl.Trainer(strategy="auto", devices=1, **scope["SETTINGS"]).fit(module)
    assert len(module.losses) == 5
    return module.losses


def check(folder, outcomes, expected):
    for code, printed in outcomes:
        assert code == 0, printed
    for rank in range(2):
        losses = json.loads((folder / f"losses-{rank}-of-2.json").read_text())
        assert losses == pytest.approx(expected, abs=1e-6)


def torchrun(*arguments):
    return "-m", "torch.distributed.run", *arguments


def test_lightnings_own_launcher(folder, expected):
    check(folder, finish(start(folder, "fit.py", 1, "", 0)), expected)


@pytest.mark.slow
def test_torchrun(folder, expected):
    line = torchrun("--standalone", "--nproc-per-node=2", "fit.py", 1, "", 0)
    check(folder, finish(start(folder, *line)), expected)


@pytest.mark.slow
def test_two_nodes(folder, expected):
    port = free_port()
    agents = [
        start(
            folder,
            *torchrun("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"),
            f"--master-port={port}",
            *("fit.py", 2, "", 0),
        )
        for node in range(2)
    ]
    check(folder, finish(*agents), expected)


@pytest.mark.slow
def test_slurm(folder, expected):
    """As srun would start the tasks of a job: SLURM's variables, and nothing else."""
    port = str(free_port())
    tasks = [
        start(
            folder,
            *("fit.py", 1, "", 0),
            SLURM_JOB_ID="1234",
            SLURM_JOB_NAME="train",
            SLURM_NTASKS="2",
            SLURM_NTASKS_PER_NODE="2",
            SLURM_NNODES="1",
            SLURM_NODEID="0",
            SLURM_PROCID=str(task),
            SLURM_LOCALID=str(task),
            SLURM_NODELIST="localhost",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for task in range(2)
    ]
    check(folder, finish(*tasks), expected)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["name", "class_path"])
def test_lightning_cli(named, folder, expected):
    strategy = ["--trainer.strategy", "zeropp"]
    if not named:
        strategy = ["--trainer.strategy", "lightning_zeroprompt.strategies.ZeroPPStrategy"]
        strategy += ["--trainer.strategy.init_args.num_microbatches", "4", "--trainer.strategy.schedule", "1f1b"]
    outcomes = finish(start(folder, "cli.py", "fit", *strategy, "--trainer.devices", 2))
    check(folder, outcomes, expected)
    assert named or "schedule 1f1b" in outcomes[0][1]


# -- faults -----------------------------------------------------------------------------------------------------------

OWN = 'KeyError: "the user\'s own error"'


def gone(folder):
    """Whether no process works in the folder any more, waiting a little for those that are ending."""
    for _ in range(300):
        found = [path for path in Path("/proc").glob("[0-9]*/cwd") if _reads(path) == str(folder)]
        if not found:
            return True
        time.sleep(0.1)
    return False


def _reads(link):
    try:
        return os.readlink(link)
    except OSError:
        return None


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("launcher", "fault", "at"),
    [
        ("lightning", "raise", 1),
        pytest.param("lightning", "raise", 0, marks=SLOW),
        pytest.param("lightning", "exit", 0, marks=SLOW),
        pytest.param("lightning", "exit", 1, marks=SLOW),
        pytest.param("lightning", "kill", 0, marks=SLOW),
        pytest.param("lightning", "kill", 1, marks=SLOW),
        pytest.param("torchrun", "raise", 0, marks=SLOW),
        pytest.param("torchrun", "raise", 1, marks=SLOW),
        pytest.param("torchrun", "exit", 0, marks=SLOW),
        pytest.param("torchrun", "kill", 1, marks=SLOW),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
def test_a_rank_that_fails_ends_the_others(launcher, fault, at, folder):
    line = ("fit.py", 1, fault, at)
    if launcher == "torchrun":
        line = torchrun("--standalone", "--nproc-per-node=2", *line)
    # A rank that waits for another gives up after 30 s; a hang would outlast these.
    ((code, printed),) = finish(start(folder, *line), timeout=150)
    assert code != 0, printed
    assert gone(folder), "a rank is still running"
    assert not list(folder.glob("losses-*"))
    if fault == "raise":
        assert OWN in printed, printed
        assert "in training_step" in printed
        assert "Full Schedule" not in printed
    elif at == 1 or launcher == "torchrun":
        # The one that was left says that it is not at fault.
        assert "the rank at the other end has failed" in printed or "Signal" in printed or "exitcode" in printed, (
            printed
        )


@pytest.mark.parametrize(
    ("launcher", "at"),
    [
        ("lightning", 1),
        pytest.param("lightning", 0, marks=SLOW),
        pytest.param("torchrun", 1, marks=SLOW),
    ],
)
def test_a_rank_that_is_told_to_stop_stops_all_of_them_together(launcher, at, folder):
    line = ("fit.py", 1, "stop", at)
    if launcher == "torchrun":
        line = torchrun("--standalone", "--nproc-per-node=2", *line)
    ((code, printed),) = finish(start(folder, *line), timeout=150)
    # As Lightning ends a run that is told to stop.
    assert code == 0, printed
    assert f"rank {at} got SIGTERM: all ranks stop within two steps" in printed
    assert "1 of 2 ranks told to stop: training ends here" in printed
    assert gone(folder), "a rank is still running"
    assert not list(folder.glob("losses-*"))
    # What needs all ranks: a part of each.
    assert {path.name for path in (folder / "stopped.ckpt").iterdir()} >= {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.parametrize(
    ("launcher", "at"),
    [
        ("lightning", 0),
        pytest.param("lightning", 1, marks=SLOW),
        pytest.param("torchrun", 0, marks=SLOW),
    ],
)
def test_a_rank_that_is_told_twice_ends_at_once(launcher, at, folder):
    line = ("fit.py", 1, "stop twice", at)
    if launcher == "torchrun":
        line = torchrun("--standalone", "--nproc-per-node=2", *line)
    ((code, printed),) = finish(start(folder, *line), timeout=150)
    assert code != 0, printed
    assert f"rank {at} got SIGTERM: told again to stop, it ends at once" in printed
    assert gone(folder), "a rank is still running"
