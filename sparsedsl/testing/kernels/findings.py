"""What a property finds on one case: a failure, or that it has nothing to say; and what a property is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from sparsedsl.testing.kernels.calling import Call
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import Fault

__all__ = ["Failure", "KernelProperty", "Skip", "differ", "failure"]

Tensor = torch.Tensor


class Skip(Exception):
    """This case says nothing about the property; the text says why."""


@dataclass(frozen=True)
class Failure:
    """How one case fails. ``kind``: "shape", "NaN", "infinite", "number", "bits", "memory", "raised" or "refused".

    ``what``: a sentence. ``fault``: the element that is furthest off, where numbers are compared.
    """

    kind: str
    what: str
    fault: Fault | None = None


@dataclass(frozen=True)
class KernelProperty:
    """A property of kernels.

    ``run(call)``: a failure or None; it raises :class:`Skip`. ``unfit(kernel)``: why it says nothing about a kernel, or "". ``wish(kernel,
    drawn)``: what its cases should be like. ``share``: of the examples of a check.
    """

    name: str
    meaning: str
    run: Callable[[Call], Failure | None]
    unfit: Callable[[Kernel], str] = lambda kernel: ""
    wish: Callable[[Kernel, Random], Mapping[str, Any]] = lambda kernel, drawn: {}
    share: float = 1.0
    first: tuple[Mapping[str, Any], ...] = field(default=())


def failure(fault: Fault | None, before: str = "") -> Failure | None:
    """The failure that a fault is, with a few words in front."""
    return None if fault is None else Failure(fault.kind, f"{before}{fault}", fault)


def differ(one: Tensor, other: Tensor, where: Tensor | None = None) -> Tensor | None:
    """The first element in which two results are not the same bits (NaN is NaN), or None."""
    wrong = ~((one == other) | (torch.isnan(one) & torch.isnan(other)))
    if where is not None:
        wrong = wrong & where.to(wrong.device)
    return wrong.nonzero()[0] if bool(wrong.any()) else None
