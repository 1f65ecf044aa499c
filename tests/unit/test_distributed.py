# SPDX-License-Identifier: Apache-2.0
"""run_distributed: values in rank order, and ranks that raise, die or hang. Each test starts processes (seconds)."""

import os
import time

import pytest
import torch

from lightning_zeroprompt.testing import run_distributed


@pytest.fixture(autouse=True)
def importable(monkeypatch, request):
    """Fresh processes import this file by its name below the repository's root."""
    monkeypatch.syspath_prepend(request.config.rootpath)


def gather(offset):
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Rank 0 answers last, so that order of arrival is not order of rank.
    time.sleep(0.3 * (size - 1 - rank))
    total = torch.tensor([float(rank + offset)])
    torch.distributed.all_reduce(total)
    time.sleep(0.3 * (size - 1 - rank))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    return rank, total.item(), torch.get_num_threads(), [os.environ[name] for name in names]


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise KeyError("a very particular message")
    time.sleep(600)


def die_on_rank_1():
    if os.environ["RANK"] == "1":
        os._exit(17)
    time.sleep(600)


def leave_on_rank_1():
    """Ends the process with code 0 before there is a result."""
    if os.environ["RANK"] == "1":
        os._exit(0)
    time.sleep(600)


def hang_on_rank_0():
    if os.environ["RANK"] == "0":
        time.sleep(600)
    return "done"


def return_what_cannot_be_sent():
    return lambda: None


def test_values_come_in_rank_order_and_collectives_work():
    found = run_distributed(gather, 2, 10)
    assert found == [(rank, 21.0, 1, [str(rank), str(rank), "2", "1"]) for rank in range(2)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_rank_1, r"(?s)rank 1 of 2 raised.*in fail_on_rank_1.*KeyError: 'a very particular message'"),
        (die_on_rank_1, "rank 1 of 2 died with exit code 17"),
        (leave_on_rank_1, "rank 1 of 2 died with exit code 0"),
    ],
)
def test_a_rank_that_raises_or_dies_ends_the_others(function, message):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_distributed(function, 2)
    assert time.monotonic() - start < 100  # the other rank sleeps for 600 s


def test_ranks_that_take_too_long_are_named_and_stopped():
    with pytest.raises(TimeoutError, match=r"ranks \[0(, 1)?\] of 2 had not finished after 6 s"):
        run_distributed(hang_on_rank_0, 2, timeout=6)


def test_a_value_that_cannot_be_sent_is_an_error_of_its_rank():
    with pytest.raises(RuntimeError, match=r"rank 0 of 1 raised(?s:.*)[Pp]ickle"):
        run_distributed(return_what_cannot_be_sent, 1, timeout=60)
