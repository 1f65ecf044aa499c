# SPDX-License-Identifier: Apache-2.0
import pytest

from lightning_zeroprompt.testing import RankPool


@pytest.fixture(scope="session")
def _ranks():
    with RankPool() as pool:
        yield pool


@pytest.fixture
def run_ranks(_ranks, monkeypatch, request):
    """``run_ranks(function, world_size, *args, timeout=...)``: like ``run_distributed``, on ranks that tests share."""
    # Ranks import test files by their names below the repository's root.
    monkeypatch.syspath_prepend(request.config.rootpath)
    return _ranks.run
