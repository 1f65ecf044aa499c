# SPDX-License-Identifier: Apache-2.0
"""The ring's arithmetic against a ring of bytes; copies between GPUs are in tests/gpu."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zeroprompt.pipeline.peer_copy import Ring

SIZE = 2048


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 3 * SIZE), max_size=40))
def test_nothing_is_overwritten_before_it_is_copied_out(lengths):
    """A sender that is as early as it may be, against a receiver that is as late."""
    sender, receiver = Ring(SIZE), Ring(SIZE)
    memory = [-1] * SIZE
    waiting, copied = [], 0
    for number, length in enumerate(lengths):
        sent, received = sender.place(length), receiver.place(length)
        assert sent == received
        assert sum(chunk.length for chunk in sent) == length
        for chunk in sent:
            # The chunks that have to be out by now; every other one is still there, whole.
            while copied < chunk.behind:
                copied += 1
                waiting.pop(0)
            memory[chunk.offset : chunk.offset + chunk.length] = [number] * chunk.length
            assert len(memory) == SIZE
            waiting.append((number, chunk))
            for owner, held in waiting:
                assert memory[held.offset : held.offset + held.length] == [owner] * held.length
            assert chunk.behind <= chunk.index
    assert copied + len(waiting) == sum(1 for _ in _chunks(lengths))


def _chunks(lengths):
    ring = Ring(SIZE)
    for length in lengths:
        yield from ring.place(length)


def test_a_message_may_wait_for_no_other_where_there_is_room():
    ring = Ring(SIZE)
    assert [chunk.behind for _ in range(8) for chunk in ring.place(SIZE // 8)] == [0] * 8
    assert [chunk.behind for _ in range(8) for chunk in ring.place(SIZE // 8)] == list(range(1, 9))


@pytest.mark.parametrize("size", [0, 256, 1000])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=f"size={size}: a ring has a multiple of 256 bytes"):
        Ring(size)
