"""The real tokens of each sequence in a batch, for programs, which choose among all tokens they are given.

Input: a :class:`~sparsedsl.models.mask_arguments.MaskRequest` with padding or packed rows. Output: the sequences, those of the same
numbers of queries and keys together: a :class:`SequenceGroup` gathers what belongs to them out of any tensor of the batch, so that they
run as one call without padding, and puts the result back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.models.mask_arguments import MaskRequest

__all__ = ["Places", "SequenceGroup", "sequence_groups"]

_Sequence = tuple[int, torch.Tensor, torch.Tensor]  # its row, and where its tokens are: among the queries, among the keys


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of some sequences stand along one axis of a batch.

    ``rows``: (n,) the row of each sequence, ``numbers`` the same as plain numbers. ``slots``: (n, tokens) its tokens, in order. ``batch``,
    ``size``: how many rows there are, and how long the axis is. ``rectangle``: neighbouring rows and neighbouring slots, the same in each,
    where the tokens are just these.

    >>> places = Places.of([0, 1], torch.tensor([[2, 3], [1, 2]]), batch=2, size=4)
    >>> places.gather(torch.arange(8).view(2, 4), axis=1)
    tensor([[2, 3],
            [5, 6]])
    """

    rows: torch.Tensor
    slots: torch.Tensor
    batch: int
    size: int
    rectangle: tuple[slice, slice] | None
    numbers: list[int]

    @classmethod
    def of(cls, rows: list[int], slots: torch.Tensor, batch: int, size: int, device: Any = "cpu") -> Places:
        """Of rows and slots that are known on the CPU."""
        first, begin, tokens = rows[0], int(slots[0, 0]), slots.shape[1]
        neighbours = rows == list(range(first, first + len(rows))) and torch.equal(
            slots, torch.arange(begin, begin + tokens).expand_as(slots)
        )
        rectangle = (slice(first, first + len(rows)), slice(begin, begin + tokens)) if neighbours else None
        return cls(torch.tensor(rows, device=device), slots.to(device), batch, size, rectangle, rows)

    def gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The tokens alone: ``(batch, .., size, ..)`` -> ``(n, .., tokens, ..)``, for tokens along ``axis``. Gradients flow.

        A rectangle is a view, so that a step does not copy a cache. A batch of 1 stands for every row.
        """
        axis = self._checked(tensor, axis)
        tensor = tensor.expand(self.batch, *tensor.shape[1:])
        if self.rectangle is not None:
            rows, slots = self.rectangle
            return tensor[rows].narrow(axis, slots.start, slots.stop - slots.start)
        return tensor.movedim(axis, 1)[self.rows[:, None], self.slots].movedim(1, axis)

    def scatter(self, tokens: torch.Tensor, into: torch.Tensor, axis: int) -> None:
        """Write ``(n, .., tokens, ..)`` to their places in ``into``, ``(batch, .., size, ..)``, in place. Gradients flow."""
        axis = self._checked(into, axis)
        if self.rectangle is not None:
            rows, slots = self.rectangle
            into[rows].narrow(axis, slots.start, slots.stop - slots.start).copy_(tokens)
        else:
            into.movedim(axis, 1)[self.rows[:, None], self.slots] = tokens.movedim(axis, 1)

    @property
    def are_all(self) -> bool:
        """Whether these are all tokens of all rows, in order."""
        return self.rectangle == (slice(0, self.batch), slice(0, self.size))

    def _checked(self, tensor: torch.Tensor, axis: int) -> int:
        axis = axis % tensor.ndim
        if axis == 0 or tensor.shape[axis] != self.size or tensor.shape[0] not in (1, self.batch):
            raise ShapeError(
                f"a tensor of {self.batch} rows, with {self.size} tokens along axis {axis}, was wanted; got {tuple(tensor.shape)}"
            )
        return axis


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """Sequences of the same numbers of queries and keys: a batch without padding.

    ``queries``, ``keys``: where their tokens stand among the call's queries and keys. ``q_offset``: how many real tokens stand before the
    first query, among these keys. ``complete``: the keys are those of all tokens so far, none has left the cache.
    """

    queries: Places
    keys: Places
    q_offset: int
    complete: bool

    @property
    def rows(self) -> torch.Tensor:
        """(n,): the row of the batch that each sequence is in."""
        return self.queries.rows

    @property
    def whole(self) -> bool:
        """Whether the queries are all tokens of the sequences, as in a prompt."""
        return self.complete and self.queries.slots.shape[1] == self.keys.slots.shape[1]


def sequence_groups(request: MaskRequest, start: int, stop: int, batch: int, device: torch.device) -> tuple[SequenceGroup, ...]:
    """The sequences with a query in this call, over keys in the cache slots ``[start, stop)``; the same for every layer that asks.

    A sequence is a row without its padding, or one of those packed in a row. Rows whose queries are all padding are in no group.

    Raises UnsupportedError where the mask speaks of tokens that the model has not seen.
    """
    key = ("groups", start, stop, batch, device)
    if key not in request.known:
        found = defaultdict(list)
        for sequence, q_offset, complete in _sequences(request, start, min(stop, request.written), batch):
            found[len(sequence[1]), len(sequence[2]), q_offset, complete].append(sequence)
        request.known[key] = tuple(
            _group(members, q_offset, complete, (request.q_length, stop - start), batch, device)
            for (_, _, q_offset, complete), members in found.items()
        )
    groups: tuple[SequenceGroup, ...] = request.known[key]
    return groups


def _group(
    members: list[_Sequence], q_offset: int, complete: bool, sizes: tuple[int, int], batch: int, device: torch.device
) -> SequenceGroup:
    rows = [row for row, _, _ in members]
    queries, keys = (
        Places.of(rows, torch.stack(slots), batch, size, device)
        for slots, size in zip(([q for _, q, _ in members], [k for _, _, k in members]), sizes, strict=True)
    )
    return SequenceGroup(queries, keys, q_offset, complete)


def _sequences(request: MaskRequest, start: int, stop: int, batch: int) -> Iterator[tuple[_Sequence, int, bool]]:
    """Each sequence, how many of its tokens stand before the first query, and whether its keys are complete."""
    if request.packing is not None:
        yield from _packed(request, request.packing.sequence.expand(batch, -1).cpu(), stop)
        return
    first, end = request.q_offset, request.q_offset + request.q_length
    for row, real in enumerate(_seen(request, batch)):
        queries = real[first:end].nonzero()[:, 0]
        if len(queries):
            keys = real[start:stop].nonzero()[:, 0]
            yield (row, queries, keys), int(real[start:first].sum()), not bool(real[:start].any())


def _packed(request: MaskRequest, sequences: torch.Tensor, stop: int) -> Iterator[tuple[_Sequence, int, bool]]:
    """The same, of rows in which each token has the number of its sequence."""
    first = request.q_offset
    for row, numbers in enumerate(sequences):
        begin = 0
        for size in torch.unique_consecutive(numbers, return_counts=True)[1].tolist():
            low, high = max(begin, first), min(begin + size, first + request.q_length)
            if low < high:
                keys = torch.arange(begin, min(begin + size, stop))
                yield (row, torch.arange(low - first, high - first), keys), low - begin, True
            begin += size


def _seen(request: MaskRequest, batch: int) -> torch.Tensor:
    """(B, slots) on the CPU: the real tokens that the model has seen."""
    assert request.padding is not None
    real = request.real(batch, max(request.written, request.padding.shape[1])).cpu()
    if bool(real[:, request.written :].any()):
        raise UnsupportedError(
            f"the attention mask says that slots from {request.written} on hold tokens, which the model has not seen, and a program "
            f"would choose among them; cut it to what is there: attention_mask[:, :{request.written}]"
        )
    return real[:, : request.written]
