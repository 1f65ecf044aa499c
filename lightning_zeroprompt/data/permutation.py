# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers and keyed permutations in closed form, vectorised over numpy arrays.

A data stream that can be entered at any position needs random access to "the x-th element of the shuffled rows"
without a shuffled copy. :func:`permute` is a Feistel network on Z_a x Z_b with a * b just above n (alternating, with
addition modulo a and b, so that n need not be a power of two), made a permutation of exactly [0, n) by cycle walking:
results outside are fed in again. With a = ceil(sqrt(n)) and b = ceil(n / a) fewer than one value in sqrt(n) is
outside, against up to three in four for a network on bits. Affine maps are cheaper and visibly regular; cached
permutations are cheaper to read and grow with the rows. :func:`mix64` is the finaliser of splitmix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

Measured: 0.1 to 0.15 microseconds of processor time a value of :func:`permute`, in arrays of some thousands.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ROWS", "SHORT", "below", "mix64", "permute", "stream_key"]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
ROWS, SHORT = 8, 16
"""Half rounds of :func:`permute`: for orders of many rows, and for short lists whose every order should be equally
likely (with 8 half rounds the likeliest order of 6 elements comes up about twice as often as it should, with 16 within
sampling noise)."""
_HIGH = np.uint64(32)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit changes about half of the output bits.

    Args:
        values: uint64, any shape.

    Returns:
        A new uint64 array of the same shape.

    Example:
        >>> len(set(mix64(np.arange(1000, dtype=np.uint64)).tolist()))
        1000
    """
    mixed = values + np.uint64(_GOLDEN)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def stream_key(seed: int, purpose: str) -> np.uint64:
    """The key of one independent stream of random words.

    Args:
        seed: Any integer; its low 64 bits count.
        purpose: What the stream decides; streams of different purposes are unrelated.

    Returns:
        A 64-bit key to add a counter to and give to :func:`mix64`.
    """
    word = np.array([seed & _MASK], dtype=np.uint64)
    for byte in purpose.encode():
        word = mix64(word ^ np.uint64(byte))
    return np.uint64(mix64(word)[0])


def below(words: NDArray[np.uint64], bound: ArrayLike) -> NDArray[np.int64]:
    """Turn random words into integers of [0, bound) by the upper half of the word; the bias is below bound / 2**32.

    Args:
        words: uint64, any shape.
        bound: Positive integers below 2**31 that broadcast against ``words``.

    Returns:
        int64 of the broadcast shape.
    """
    return (((words >> _HIGH) * np.asarray(bound).astype(np.uint64)) >> _HIGH).astype(np.int64)


def _feistel(
    a: NDArray[np.uint64], b: NDArray[np.uint64], key: NDArray[np.uint64], values: NDArray[np.uint64], rounds: int
) -> NDArray[np.uint64]:
    """Permute [0, a * b) by half rounds, each adding a keyed hash of one half to the other."""
    left, right = np.divmod(values, b)
    word, other = np.empty_like(left), np.empty_like(left)
    for number in range(rounds):
        target, source, size = (left, right, a) if number % 2 == 0 else (right, left, b)
        np.add(source, key, out=word)
        word += np.uint64((_GOLDEN * (2 * number + 1)) & _MASK)
        word *= np.uint64(0xBF58476D1CE4E5B9)
        word ^= np.right_shift(word, np.uint64(29), out=other)
        word *= np.uint64(0x94D049BB133111EB)
        word >>= _HIGH
        word *= size
        word >>= _HIGH
        target += word
        # Modulo size: where the sum is below it, the difference wraps round to a larger number.
        np.minimum(target, np.subtract(target, size, out=other), out=target)
    left *= b
    left += right
    return left


def permute(size: ArrayLike, key: ArrayLike, positions: ArrayLike, *, rounds: int = ROWS) -> NDArray[np.int64]:
    """Where each position goes under the permutation of [0, size) that its key names.

    Args:
        size: Lengths of the permutations, 1 to 2**62, integers.
        key: uint64 names of the permutations; should already be random words (see :func:`mix64`).
        positions: Integers in [0, size). The three broadcast against each other.
        rounds: Half rounds of the network, :data:`ROWS` or :data:`SHORT`.

    Returns:
        int64 of the broadcast shape; for one size and key, distinct positions go to distinct values in [0, size).

    Example:
        >>> sorted(permute(10, 7, np.arange(10)).tolist()) == list(range(10))
        True
    """
    sizes, keys, where = np.broadcast_arrays(
        np.asarray(size).astype(np.uint64), np.asarray(key, dtype=np.uint64), np.asarray(positions).astype(np.uint64)
    )
    shape = where.shape
    sizes, keys, where = sizes.ravel(), keys.ravel(), where.ravel()
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    b = (sizes + a - np.uint64(1)) // a
    moved = _feistel(a, b, keys, where, rounds)
    outside = np.flatnonzero(moved >= sizes)
    while outside.size:
        moved[outside] = _feistel(a[outside], b[outside], keys[outside], moved[outside], rounds)
        outside = outside[moved[outside] >= sizes[outside]]
    return moved.astype(np.int64).reshape(shape)
