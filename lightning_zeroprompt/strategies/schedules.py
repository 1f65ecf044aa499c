# SPDX-License-Identifier: Apache-2.0
"""What a user asks of the schedule, and the schedules that follow from it once blocks and batches are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.utils.data import DataLoader, default_collate

from lightning_zeroprompt.pipeline.batch import choose_micro_batches
from lightning_zeroprompt.pipeline.catalogue import SCHEDULES, build_schedule, is_listed
from lightning_zeroprompt.pipeline.orders import TYPICAL_COSTS
from lightning_zeroprompt.pipeline.schedule import Placement, Schedule

__all__ = ["AUTO", "ScheduleSettings", "Size", "check_size"]

Size = int | Literal["auto"]

AUTO = "auto"
"""Let the planner choose."""


def check_size(name: str, value: Size) -> None:
    """Refuse what is neither ``"auto"`` nor a whole number of at least 1.

    Raises:
        ValueError: Naming the setting.
    """
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1, or 'auto'")


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """The settings of ``ZeroPPStrategy`` that are about schedules; see there.

    Raises:
        ValueError: If a number is out of range, the schedule is unknown, or they do not fit together.
    """

    name: str
    stages_per_rank: Size
    num_microbatches: Size
    unit: Size
    vshape: bool | None
    cap: int | None
    resident: Size

    def __post_init__(self) -> None:
        for name in ("stages_per_rank", "num_microbatches", "unit", "resident"):
            check_size(name, getattr(self, name))
        if self.name not in (*SCHEDULES, AUTO):
            raise ValueError(f"schedule {self.name!r} is unknown; there are {', '.join((*SCHEDULES, AUTO))}")
        chosen = {"unit": self.unit != "auto", "resident": self.resident != "auto"}
        chosen |= {"vshape": self.vshape is not None, "cap": self.cap is not None}
        if self.name == AUTO and any(chosen.values()):
            given = ", ".join(name for name, is_given in chosen.items() if is_given)
            raise ValueError(f"schedule='auto' chooses {given} itself: leave it out, or name a schedule")
        if self.num_microbatches != "auto" and self.unit != "auto" and self.unit > self.num_microbatches:
            raise ValueError(
                f"unit={self.unit} with num_microbatches={self.num_microbatches}: a unit has at most all of them"
            )

    def fewest_stages(self, ranks: int) -> int:
        """Stages that there will be whatever the number of blocks; more where ``stages_per_rank`` is ``"auto"``.

        Args:
            ranks: P.
        """
        if self.stages_per_rank == "auto":
            return 2 * ranks if self.name == "zbv" else ranks
        return self.stages_per_rank * ranks

    def placement(self, ranks: int, blocks: int) -> Placement:
        """Where stages go, with all that can be wrong with the schedule found, whatever the batches will be.

        Args:
            ranks: P.
            blocks: How many blocks there are to cut.

        Raises:
            ValueError: As ``build_schedule``.
        """
        per_rank = self.stages_per_rank
        if per_rank == "auto":
            few = blocks < 2 * ranks and self.name != "zbv"
            per_rank = 1 if few or self.name in ("1f1b", "zb_h1") else 2
        placement = Placement(ranks, per_rank, self.name == "zbv" if self.vshape is None else self.vshape)
        self.build(placement, self.expected_count(ranks))
        return placement

    def expected_count(self, ranks: int) -> int:
        """M, as far as it is known before the first batch.

        Args:
            ranks: P.
        """
        return 4 * ranks if self.num_microbatches == "auto" else self.num_microbatches

    def build(self, placement: Placement, count: int) -> Schedule:
        """The schedule for a number of micro-batches."""
        units = self.name.startswith("zeropp")
        resident = None
        if self.resident != "auto":
            resident = min(self.resident, placement.stages_per_rank)
        elif units:
            resident = min(2, placement.stages_per_rank)
        return build_schedule(
            self.name,
            ranks=placement.ranks,
            stages_per_rank=placement.stages_per_rank,
            micro_batches=count,
            unit=min(self.unit, count) if units and self.unit != "auto" else None,
            vshape=placement.vshape if units else None,
            cap=self.cap,
            resident=resident,
            # An order that is listed for equal times takes up to a tenth longer with real ones.
            costs=TYPICAL_COSTS if is_listed(self.name, placement.vshape) else None,
        )

    def first_count(self, rows: int, ranks: int) -> int:
        """M, as the first batch decides it.

        Args:
            rows: Of the first batch.
            ranks: P.

        Raises:
            ValueError: If there are fewer rows than micro-batches, or fewer micro-batches than a unit has.
        """
        if self.num_microbatches != "auto":
            self.check_rows(rows)
            return self.num_microbatches
        count = choose_micro_batches(rows, ranks)
        if self.unit != "auto" and self.unit > count:
            raise ValueError(
                f"unit={self.unit}, but the first batch of {rows} rows is split into {count} micro-batches and a unit "
                "has at most all of them: lower unit, or set num_microbatches"
            )
        return count

    def check_loader(self, loader: object, ranks: int) -> None:
        """Refuse training data whose batches will be refused, where that is known before one is drawn.

        Rows are known of a DataLoader that stacks ``batch_size`` items; a collate function of a user's own makes as
        many rows as it likes, and the first batch tells.

        Args:
            loader: What training batches come from.
            ranks: P.

        Raises:
            ValueError: As ``first_count``.
        """
        if isinstance(loader, DataLoader) and loader.batch_size and loader.collate_fn is default_collate:
            self.first_count(loader.batch_size, ranks)

    def check_rows(self, rows: int) -> None:
        """Refuse batches that cannot be cut into the micro-batches that were asked for.

        Args:
            rows: Of a data-parallel rank's batch.

        Raises:
            ValueError: If there are fewer than micro-batches.
        """
        wanted = self.num_microbatches
        if wanted != "auto" and wanted > rows:
            raise ValueError(
                f"num_microbatches={wanted}, but the batch has {rows} rows and every micro-batch needs one: lower it, "
                "use larger batches, or drop_last=True if this is the last batch of an epoch"
            )
