# SPDX-License-Identifier: Apache-2.0
"""What `make train` learns, over seeds, against its baselines: does every interval stay apart?

Runs ``zeroprompt-train experiment=demo`` once a seed (some three minutes each on two cores) and prints, for held-out
compositions (level *task*) in known and in new wordings, option accuracy and exact match with their 95 % intervals
beside chance, the first option, the untrained model and the same model under other tasks' instructions. The last line
is one JSON object.

    python benchmarks/demo_seeds.py --seeds 0 1 2
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BASELINES = ("chance", "first_option", "untrained", "shuffled")


def run(seed: int, folder: Path, overrides: list[str]) -> tuple[dict[str, Any], float]:
    """Train one seed and return its results.json and the seconds that it took."""
    script = "from lightning_zeroprompt.cli.train import main; main()"
    command = [sys.executable, "-c", script, "experiment=demo", f"seed={seed}", f"hydra.run.dir={folder}", *overrides]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "results.json").read_text()), time.perf_counter() - started


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out compositions by kind of answer and wording; every baseline as the highest value it may have."""
    found = []
    for macro in results["macro"]:
        if macro["level"] != "task" or macro["category"] is not None or macro["kind"] is None:
            continue
        baselines = {
            "chance": macro["chance"],
            "first_option": macro["first_option"] or 0.0,
            "untrained": macro["untrained"]["high"],
            "shuffled": macro["shuffled"]["high"],
        }
        found.append(
            {
                "kind": macro["kind"],
                "wording": macro["wording"],
                "score": macro["score"],
                "low": macro["low"],
                "high": macro["high"],
                "nll": macro["nll"],
                **baselines,
                "apart": macro["low"] > max(baselines.values()),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("overrides", nargs="*", help="further overrides of zeroprompt-train")
    args = parser.parse_args()
    report = []
    for seed in args.seeds:
        results, seconds = run(seed, args.out / str(seed), args.overrides)
        print(f"seed {seed}: {seconds:.0f} s, {results['steps']} steps, {results['sample_sizes']['task_tasks']} tasks")
        for row in rows(results):
            beside = ", ".join(f"{name} {row[name]:.3f}" for name in BASELINES)
            print(
                f"  {row['kind']:<10} {row['wording']:<8} {row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]  "
                f"nll {row['nll']:.2f}  (upper ends: {beside})  {'apart' if row['apart'] else 'NOT apart'}"
            )
            report.append({"seed": seed, "seconds": round(seconds), **row})
    print(json.dumps({"benchmark": "demo_seeds", "all_apart": all(row["apart"] for row in report), "rows": report}))


if __name__ == "__main__":
    main()
