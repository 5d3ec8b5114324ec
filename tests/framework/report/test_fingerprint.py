"""Fingerprints of tensors: the formula, what they tell apart, and what makes no difference."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from loopwright.framework.report.fingerprint import (
    BLOCK,
    ROW,
    combined,
    fingerprint,
    fingerprints,
    sums_of,
)
from loopwright.strategies.tensor_shards import TensorShard

TYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int8,
    torch.int64, torch.complex64,
)  # fmt: skip
# None, less than an integer, and around the ends of rows.
SIZES = (0, 1, 3, ROW + 1, 2 * ROW)


def mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@cache
def factor(kind: int, index: int) -> int:
    return mix(mix(kind) + index) | 1


def sum_by_hand(tensor: Tensor) -> int:
    """The sum as it is described, with Python's integers."""
    data = bytes(tensor.contiguous().view(-1, 1).view(torch.uint8).flatten().tolist())
    data += bytes(-len(data) % 4)
    total = 0
    for place in range(len(data) // 4):
        word = int.from_bytes(data[4 * place : 4 * place + 4], "little", signed=True)
        row, column = divmod(place, ROW)
        block, row = divmod(row, BLOCK)
        total += word * factor(0, column) * factor(1, row) * factor(2, block)
    return total % 2**64


def test_it_is_the_sum_of_all_bits_times_odd_factors_whatever_the_type_and_size():
    for kind in TYPES:
        for size in SIZES:
            tensor = torch.randn(size).to(kind)
            assert sums_of([tensor]) == [sum_by_hand(tensor)], (kind, size)
            # As views in a bucket of gradients begin: not where a number of 32 bits would.
            shifted = torch.cat((tensor[:1], tensor))[1:] if size else tensor
            assert sums_of([shifted]) == sums_of([tensor]), (kind, size)


def test_many_tensors_have_the_fingerprints_that_each_has_alone():
    tensors = [torch.randn(size, 3) for size in (1, 4, 0, 5000, 2, ROW)]
    tensors += [torch.tensor(2.0), torch.eye(5).to_sparse()]
    together = fingerprints(tensors)
    assert together == [fingerprints([tensor])[0] for tensor in tensors]
    assert len({*together}) == len(tensors)


def test_each_flipped_bit_is_found_and_so_are_changed_signs_that_come_in_pairs():
    tensor = torch.randn(9)
    seen = {fingerprint([tensor])}
    for place in range(9):
        for bit in range(32):
            changed = tensor.clone()
            changed.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 1 << bit
            seen.add(fingerprint([changed]))
    assert len(seen) == 1 + 9 * 32
    # Sums modulo 2**64 of integers of 64 bits would see the parity of these only.
    long = torch.randn(2 * ROW)
    for places in ([1, 3], [1, 5, 7, 9], [ROW - 1, ROW + 1]):
        changed = long.clone()
        changed[places] *= -1
        assert fingerprint([changed]) != fingerprint([long])


def test_layout_order_and_names_make_no_difference_and_type_and_shape_do():
    matrix = torch.randn(6, 8)
    same = (matrix.T.contiguous().T, torch.stack((matrix, matrix), 2)[..., 0])
    assert {fingerprint([each]) for each in same} == {fingerprint([matrix])}
    number = torch.randn(4, dtype=torch.complex64)
    assert fingerprint([number.conj()]) == fingerprint([number.conj().resolve_conj()])
    assert fingerprint([number.conj()]) != fingerprint([number])
    other = torch.randn(6, 8)
    assert fingerprint([matrix, other]) == fingerprint([other, matrix])
    different = (matrix.T, matrix.view(-1), matrix.double(), matrix.view(torch.int32))
    assert len({fingerprint([each]) for each in (matrix, *different)}) == 5
    assert fingerprint([torch.zeros(2)]) != fingerprint([-torch.zeros(2)])
    assert fingerprint([]) == combined([])


def test_shards_sum_up_to_the_whole_tensor():
    for whole in (torch.randn(11, 1000), torch.randn(11, 999).to(torch.bfloat16)):
        # The last one is empty, as where there are more processes than rows.
        cuts = (0, 3, 4, 11, 11)
        shards = [
            TensorShard(whole[start:end], tuple(whole.shape), (start, 0))
            for start, end in pairwise(cuts)
        ]
        assert sum(sums_of(shards)) % 2**64 == sums_of([whole])[0]


def test_it_neither_changes_nor_needs_anything_of_its_surroundings():
    module = nn.Linear(3, 3)
    state = torch.get_rng_state()
    expected = fingerprint(module.parameters())
    with torch.inference_mode(), torch.device("meta"):
        assert fingerprint(module.parameters()) == expected
    assert torch.equal(torch.get_rng_state(), state)
