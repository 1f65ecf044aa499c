# SPDX-License-Identifier: Apache-2.0
"""benchmarks/emulate.py: ranks that sleep compute in the order of their lists, whatever the schedule."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "emulate.py"


def emulated(ranks, micro_batches):
    spec = importlib.util.spec_from_file_location("emulate", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    steps = module.emulate(ranks, micro_batches, 1e-3, 1)
    lists = {
        name: [[str(task) for task in tasks if task.kind in module.COMPUTE] for tasks in schedule.tasks]
        for name, schedule in module.schedules(ranks, micro_batches).items()
    }
    return steps, lists


def test_orders_are_those_of_the_lists(run_ranks):
    everyone = run_ranks(emulated, 4, 4, 4, timeout=300)
    lists = everyone[0][1]
    assert len(lists) == 5
    for name, listed in lists.items():
        assert [steps[name][1] for steps, _ in everyone] == listed
        # F, B and W of two blocks a rank sleep at least so long.
        assert all(end - begin > 4 * 2 * 1e-3 for steps, _ in everyone for begin, end in steps[name][0])
