"""Keys and values of one request after another, read out of the pages of a pool as a program asks for them: those that it attends to, those
that it sums up, or all.

The rows of a request stand in memory that is as long as the request, where whole pages of the pool are put when they are read; what nobody
asks for is never written, and on a CPU takes no memory. So a program runs as over keys in order, and no list or mask is made for pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy
import torch

from sparsedsl.execute.kept_summaries import Pooling
from sparsedsl.execute.page_summaries import PageSummaries, RequestPages
from sparsedsl.execute.pools import Pools, as_numbers
from sparsedsl.program import tensors

if TYPE_CHECKING:
    from sparsedsl.program.tensors import Input

__all__ = ["PagedKeys", "RequestKeys"]

Tensor = torch.Tensor


@dataclass(eq=False)
class _Side:
    """Keys, or values: ``memory (pages, page, H, D)``; ``pool``, ``scale``: where they come from; ``read``: pages read so far, by all
    requests; ``here``: whether each page of the request is there."""

    memory: Tensor
    pool: Tensor
    scale: Tensor | None
    read: int = 0
    here: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def fetch(self, pages: Tensor, numbers: Tensor) -> None:
        """Read those of ``pages``, flags on the CPU, that are not there. ``numbers``: where each lies in the pool, -1: nowhere."""
        wanted = (pages & ~self.here).nonzero()[:, 0]
        if not wanted.numel():
            return
        self.here[wanted] = True
        self.read += wanted.numel()
        there, device = numbers[wanted] >= 0, self.memory.device
        if not bool(there.all()):  # a page that is not there shows where somebody sees it
            self.memory[wanted[~there].to(device)] = float("nan")
            wanted = wanted[there]
        self.memory[wanted.to(device)] = as_numbers(self.pool, self.scale, numbers[wanted].to(device), self.memory.dtype)

    def forget(self, pages: int) -> None:
        """Another request, of so many pages: nothing of the one before stays, as what nobody sees goes into products with weights of 0."""
        old = self.here.nonzero()[:, 0]
        if old.numel():
            self.memory[old.to(self.memory.device)] = 0
        self.here = torch.zeros(pages, dtype=torch.bool)


class PagedKeys:
    """The memory for the requests of a call, of ``pages`` pages at most. ``summaries``: those that are kept of the pools, if any."""

    def __init__(self, pools: Pools, pages: int, dtype: torch.dtype, summaries: PageSummaries | None) -> None:
        self.page, self.summaries = pools.page, summaries
        self.sides = {
            node: _Side(_zeros((pages, *pool.shape[1:]), dtype, pool.device), pool, scale)
            for node, pool, scale in ((tensors.k, pools.k, pools.k_scale), (tensors.v, pools.v, pools.v_scale))
        }

    def request(self, numbers: Tensor, tokens: int, fresh: int) -> RequestKeys:
        """Those of a request with so many tokens, in the pages ``numbers``, int64 on the CPU. ``fresh``: the first new token."""
        for side in self.sides.values():
            side.forget(numbers.numel())
        return RequestKeys(self, RequestPages(numbers, fresh), tokens)

    @property
    def pages_read(self) -> tuple[int, int]:
        """Pages of keys, and of values."""
        return self.sides[tensors.k].read, self.sides[tensors.v].read


@dataclass(frozen=True, eq=False)
class RequestKeys:
    """Keys and values of one request, ``tokens`` of them."""

    keys: PagedKeys
    where: RequestPages
    tokens: int

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.keys.page

    @property
    def inputs(self) -> dict[Input, _Side]:
        """What is read here: k and v."""
        return self.keys.sides

    def rows(self, node: Input) -> Tensor:
        """``(1, H, tokens, D)``, of which only what was asked for is there; the others are 0."""
        memory = self.inputs[node].memory[: self.where.numbers.numel()]
        return memory.flatten(0, 1)[: self.tokens].transpose(0, 1)[None]

    def all(self, node: Input) -> Tensor:
        """All rows."""
        return self.seen(node, None)

    def seen(self, node: Input, pages: Tensor | None) -> Tensor:
        """The rows of some pages, flags ``(pages,)``, among others that may be 0; None: of all."""
        numbers = self.where.numbers
        wanted = torch.ones(numbers.numel(), dtype=torch.bool) if pages is None else pages.cpu()
        self.inputs[node].fetch(wanted, numbers)
        return self.rows(node)

    def pooled(self, node: Any, of: Input, pool: Pooling) -> Tensor:
        """One row for every block of an input, as :meth:`sparsedsl.execute.lowering.Lowering.pooled` gives them."""
        if self.keys.summaries is None:
            return pool(self.all(of))

        def read(first: int, last: int) -> None:
            number = torch.arange(self.where.numbers.numel())
            self.seen(of, (number >= first // self.page) & (number <= (last - 1) // self.page))

        return self.keys.summaries.rows(node, self.rows(of), self.where, read, pool)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Memory of this kind is taken where it is written: most of it never is.
    return torch.from_numpy(numpy.zeros(size, dtype=numpy.uint8)).view(dtype).view(shape)
