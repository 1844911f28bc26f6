"""The real tokens of each sequence: found, gathered along any axis, and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.models.mask_arguments import MaskRequest, Packing
from sparsedsl.models.sequences import Places, sequence_groups

CPU = torch.device("cpu")


def request(real: Any, q_length: int, kv_length: int, packing: Packing | None = None) -> MaskRequest:
    """Of a forward whose queries are the last ``q_length`` of so many slots; ``real`` has 1 for a token."""
    padding = None if real is None else torch.tensor(real).bool()
    offset = (kv_length if packing is None else packing.sequence.shape[1]) - q_length
    return MaskRequest(q_length, kv_length, offset, 0, padding, packing, None, (), lambda: None)


@st.composite
def batches(draw: Any) -> tuple[torch.Tensor, int, int]:
    rows, slots = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    real = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=rows, max_size=rows)))
    return real, draw(st.integers(1, slots)), draw(st.integers(0, slots - 1))


@settings(max_examples=150)
@given(batches())
def test_groups_hold_every_real_query_once_and_the_keys_of_its_row(case: tuple[torch.Tensor, int, int]) -> None:
    real, queries, start = case
    batch, slots = real.shape
    start = min(start, slots - queries)
    place = torch.arange(batch * slots).view(batch, slots, 1)
    found = torch.full((batch, queries), -1)
    for group in sequence_groups(request(real.tolist(), queries, slots), start, slots, batch, CPU):
        q = group.queries.gather(place[:, slots - queries :], 1)[..., 0]
        k = group.keys.gather(place[:, start:], 1)[..., 0]
        for row, own_queries, own_keys in zip(group.rows.tolist(), q, k, strict=True):
            kept = real[row].clone()
            kept[:start] = False
            assert own_keys.tolist() == (kept.nonzero()[:, 0] + row * slots).tolist()
            assert own_keys[group.q_offset : group.q_offset + len(own_queries)].tolist() == own_queries.tolist()
            assert group.complete == (not real[row, :start].any())
            assert group.whole == (group.complete and len(own_queries) == len(own_keys))
        group.queries.scatter(q, found, 1)
    tail = real[:, slots - queries :]
    assert torch.equal(found[tail], place[:, slots - queries :, 0][tail]) and (found[~tail] == -1).all()


def test_rows_of_one_length_are_one_group() -> None:
    real = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]
    groups = sequence_groups(request(real, 5, 5), 0, 5, 4, CPU)
    assert [(group.rows.tolist(), group.keys.slots.shape[1], group.whole) for group in groups] == [
        ([0, 1, 3], 3, True),
        ([2], 5, True),
    ]
    step = sequence_groups(request(real, 1, 5), 0, 5, 4, CPU)
    assert [(group.rows.tolist(), group.q_offset, group.whole) for group in step] == [([0, 1, 3], 2, False), ([2], 4, False)]
    asked = request(real, 5, 5)
    assert sequence_groups(asked, 0, 5, 4, CPU) is sequence_groups(asked, 0, 5, 4, CPU), "one for all layers"


def test_packed_sequences_are_rows_of_their_own() -> None:
    packing = Packing(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]), torch.zeros(1, 8))
    groups = sequence_groups(request(None, 8, 8, packing), 0, 8, 1, CPU)
    assert [(group.rows.tolist(), group.keys.slots.tolist()) for group in groups] == [
        ([0, 0], [[0, 1, 2], [5, 6, 7]]),
        ([0], [[3, 4]]),
    ]
    (last,) = sequence_groups(request(None, 2, 8, packing), 0, 8, 1, CPU)  # the mask's last rows alone
    assert (last.q_offset, last.keys.slots.tolist(), last.queries.slots.tolist()) == (1, [[5, 6, 7]], [[0, 1]])


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
def test_gather_and_scatter_along_any_axis_with_gradients(axis: int) -> None:
    places = Places.of([2, 0], torch.tensor([[0, 2, 4], [1, 2, 3]]), batch=3, size=5)
    tensor = torch.randn(3, 5, 5, 5, dtype=torch.float64, requires_grad=True)
    taken = places.gather(tensor, axis)
    assert torch.equal(taken[0].movedim(axis % 4 - 1, 0), tensor[2].movedim(axis % 4 - 1, 0)[[0, 2, 4]])
    into = torch.zeros_like(tensor)
    places.scatter(taken, into, axis)
    assert torch.equal(places.gather(into, axis), taken)
    into.sum().backward()
    assert tensor.grad is not None and tensor.grad.sum() == 2 * 3 * 25


def test_a_rectangle_is_a_view() -> None:
    tensor = torch.randn(4, 2, 9, 3)
    step = Places.of([1, 2], torch.tensor([[3, 4, 5, 6]] * 2), batch=4, size=9)
    taken = step.gather(tensor, 2)
    assert taken.data_ptr() == tensor[1:, :, 3:].data_ptr() and torch.equal(taken, tensor[1:3, :, 3:7])
    assert not step.are_all and Places.of([0, 1], torch.arange(9).expand(2, 9), batch=2, size=9).are_all
    assert step.gather(tensor[:1], 2).shape == (2, 2, 4, 3)


def test_a_tensor_of_another_batch_is_refused() -> None:
    places = Places.of([1], torch.tensor([[3, 4]]), batch=4, size=9)
    for wrong in (torch.zeros(4, 2, 8, 3), torch.zeros(3, 2, 9, 3)):
        with pytest.raises(sd.ShapeError, match=r"a tensor of 4 rows, with 9 tokens along axis 2, was wanted; got \("):
            places.gather(wrong, 2)
