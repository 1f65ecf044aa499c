# SPDX-License-Identifier: Apache-2.0
"""Draw the training loss and the held-out scores of run folders from their TensorBoard events.

python benchmarks/curve.py runs/train/DATE --out docs/results/curve.png
"""

import argparse
from pathlib import Path

import matplotlib as mpl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt

SERIES = {
    "heldout/heldout/train": "held-out tasks",
    "heldout/category/train": "unseen category",
    "heldout/task/train": "unseen task",
    "heldout/instance/train": "unseen examples of training tasks",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(2, len(args.runs), figsize=(5.5 * len(args.runs), 7), sharex="col", squeeze=False)
    for column, run in enumerate(args.runs):
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        loss, scores = axes[0, column], axes[1, column]
        points = events.Scalars("train/loss")
        loss.plot([p.step for p in points], [p.value for p in points], linewidth=0.8)
        loss.set_title(run.name)
        loss.set_ylabel("training loss, nats a token")
        for tag, label in SERIES.items():
            if tag in events.Tags()["scalars"]:
                points = sorted(events.Scalars(tag), key=lambda p: (p.step, p.wall_time))
                scores.plot([p.step for p in points], [p.value for p in points], marker="o", label=label)
                print(f"{run.name} {label}: " + ", ".join(f"{p.step}: {p.value:.3f}" for p in points))
        scores.axhline(0, color="grey", linewidth=0.8)
        scores.set_ylabel("macro score above chance")
        scores.set_xlabel("optimizer steps")
        scores.legend(fontsize="small")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
