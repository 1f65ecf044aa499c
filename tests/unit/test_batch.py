# SPDX-License-Identifier: Apache-2.0
"""Micro-batches: joined again they are the batch."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zeroprompt.pipeline.batch import batch_rows, choose_micro_batches, signature, split_batch, split_sizes


class Point(NamedTuple):
    x: torch.Tensor
    y: float


@dataclass(frozen=True)
class Record:
    points: Point
    name: str


def nested(rows):
    x = torch.arange(rows * 2).view(rows, 2)
    return {"a": [x, (x[:, 0], None)], "b": Record(Point(x + 1, 2.5), "n"), "scalar": torch.tensor(3.0), "empty": []}


def join(parts):
    """The parts of a split batch as one."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.dim() else first
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, Point):
        return Point(*(join(list(group)) for group in zip(*parts, strict=True)))
    if isinstance(first, (list, tuple)):
        return type(first)(join(list(group)) for group in zip(*parts, strict=True))
    if isinstance(first, Record):
        return Record(join([part.points for part in parts]), first.name)
    return first


@settings(deadline=None)
@given(rows=st.integers(1, 20), count=st.integers(1, 20))
def test_micro_batches_joined_are_the_batch(rows, count):
    count = min(count, rows)
    sizes = split_sizes(rows, count)
    assert (sum(sizes), len(sizes)) == (rows, count)
    assert max(sizes) - min(sizes) <= 1
    batch = nested(rows)
    assert batch_rows(batch) == rows
    parts = split_batch(batch, sizes)
    assert [batch_rows(part) for part in parts] == sizes
    assert signature(join(parts)) == signature(batch)
    torch.testing.assert_close(join(parts)["a"][0], batch["a"][0])
    torch.testing.assert_close(join(parts)["b"].points.x, batch["b"].points.x)
    assert parts[0]["b"].name == "n"


def test_subclasses_of_dict_stay_what_they_are():
    from transformers import BatchEncoding

    first, _ = split_batch(BatchEncoding({"input_ids": torch.zeros(3, 2)}), [2, 1])
    assert isinstance(first, BatchEncoding)
    assert first.input_ids.shape == (2, 2)


def test_signature_tells_shapes_and_types_apart():
    same = signature({"x": torch.zeros(2, 3), "n": 1})
    assert same == signature({"x": torch.ones(2, 3), "n": 2})
    for other in ({"x": torch.zeros(2, 4)}, {"x": torch.zeros(2, 3).long()}, {"y": torch.zeros(2, 3)}):
        assert signature(other) != same


@settings(deadline=None)
@given(rows=st.integers(1, 200), ranks=st.integers(1, 8))
def test_chosen_micro_batches_divide_the_rows(rows, ranks):
    count = choose_micro_batches(rows, ranks)
    assert rows % count == 0
    assert count <= 4 * ranks
    assert not any(rows % more == 0 for more in range(count + 1, min(rows, 4 * ranks) + 1))


def test_batches_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"type dict holds no tensor .* num_microbatches=1"):
        batch_rows({"x": 1, "y": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"batch\['y'\]\[0\] has 3 rows, batch\['x'\] has 2"):
        batch_rows({"x": torch.zeros(2), "y": [torch.zeros(3)]})
