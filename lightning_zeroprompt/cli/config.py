# SPDX-License-Identifier: Apache-2.0
"""What the Hydra apps share: where conf/ is, the resolved configuration of a job, and errors without a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import HydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = [
    "RESOLVED",
    "config_dir",
    "fresh_process",
    "read_config",
    "report_user_errors",
    "run_config",
    "run_in_fresh_process",
    "write_atomically",
]

RESOLVED = "config.yaml"
"""Name of the resolved configuration in the run folder."""

# File systems take names of 255 bytes, and a sweep of many settings has longer ones; the job's number keeps them apart.
OmegaConf.register_new_resolver(
    "shortened", lambda text: text if len(text) <= 120 else f"{text[:117]}...", replace=True
)


def _ranks(devices: int | str, num_nodes: int) -> int:
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices={devices}: sharding needs to know the number of devices; give it, as in 2")
    return devices * num_nodes


# Lightning's own "auto" shards over nodes and wants tensor parallelism within one.
OmegaConf.register_new_resolver("ranks", _ranks, replace=True)


def config_dir() -> Path:
    """Folder of the Hydra groups: inside the package once installed, beside it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` is either the old file or the whole new one.

    Args:
        path: Target; its folder is made.
        text: UTF-8 content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_config(path: Path) -> DictConfig:
    """Read a resolved configuration.

    Args:
        path: A file that :func:`run_in_fresh_process` or a run has written.

    Raises:
        ValueError: It is no mapping.
        OSError: It cannot be read.
    """
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} holds a list, not a configuration; give the {RESOLVED} of a run folder")
    return config


def run_config(config: DictConfig, groups: Sequence[str] = ()) -> DictConfig:
    """The configuration of the run that a checkpoint is of.

    Args:
        config: A composed configuration with ``checkpoint``, ``run`` and ``paths``.
        groups: Groups to take from it in place of the run's.

    Raises:
        ValueError: There is no run folder with a configuration.
    """
    folder = Path(config.run) if config.run is not None else Path(config.checkpoint).parent.parent
    if not (folder / RESOLVED).is_file():
        raise ValueError(
            f"{folder} has no {RESOLVED}, so the tasks that {config.checkpoint} was trained on are unknown; "
            "give run=FOLDER, the folder of the training run"
        )
    run = read_config(folder / RESOLVED)
    for key in ("checkpoint", *groups):
        run[key] = config[key]
    if Path(config.checkpoint).is_dir():
        run.init_from = config.checkpoint
    run.paths.output_dir = config.paths.output_dir
    run.callbacks, run.logger = None, None
    return run


def run_in_fresh_process(module: str, config: DictConfig, folder: Path) -> None:
    """Run one job of a multirun as a process of its own, from its resolved configuration.

    Lightning starts the other ranks of a job by running the command line again. Inside ``-m`` that command line is
    the whole sweep: an adaptive sweeper then hands every rank other hyper-parameters, silently. The fresh process's
    command line names one resolved file instead, and nothing that a job sets in its environment reaches the next one.

    Args:
        module: Module to run with ``python -m``; its only argument is the configuration's path.
        config: The job's configuration; interpolations are resolved here.
        folder: The job's folder.

    Raises:
        ChildProcessError: The job failed. Hydra goes on with the other jobs and reports it when they are done.
    """
    status = fresh_process(module, config, folder)
    if status:
        raise ChildProcessError(f"the job in {folder} ended with exit status {status}; its own message stands above")


def fresh_process(module: str, config: DictConfig, folder: Path) -> int:
    """As :func:`run_in_fresh_process`, but return the process's exit status."""
    path = folder / RESOLVED
    write_atomically(path, OmegaConf.to_yaml(config, resolve=True))
    with subprocess.Popen([sys.executable, "-m", module, str(path)]) as process:  # noqa: S603 - our own module
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The process has got it too, and ends when it has saved what it saves then.
                continue


def report_user_errors(story: Callable[[], None]) -> None:
    """Run ``story``; an error in what the user gave becomes one line on stderr and exit status 2.

    Args:
        story: The program. Errors of the program itself keep their traceback.

    Raises:
        SystemExit: With status 2 after an error that names what was given and the remedy: ValueError, OSError, and what
            Hydra, OmegaConf and Lightning raise for a configuration that cannot be used. With status 130 after Ctrl-C.
    """
    try:
        story()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, HydraException, OmegaConfBaseException, MisconfigurationException) as error:
        if os.environ.get("ZEROPROMPT_TRACEBACK"):
            raise
        # Hydra wraps what a constructor raised; the constructor's own words are the ones to read.
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        print(f"error: {' '.join(str(cause).split())} (ZEROPROMPT_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from None
