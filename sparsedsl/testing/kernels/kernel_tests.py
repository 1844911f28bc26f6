"""A kernel as a test that pytest collects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_check import check_kernel

__all__ = ["kernel_test"]


def kernel_test(
    implements: Any, *, examples: int | None = None, seed: int = 0, budget: str = "quick", only: Any = None, **claims: Any
) -> Callable[[Callable[..., Any]], Callable[[], None]]:
    """A decorator that makes a test of a kernel: a function without arguments, which pytest collects if its name begins with ``test``.

    Args:
        implements: a mask, a pattern or a program.
        examples: cases of the cheapest property; None: as the budget says.
        seed: of the cases; the same ones in every run.
        budget: ``"quick"`` (25 examples, 20 s), ``"default"`` (100, 2 min) or ``"deep"`` (1,000, an hour).
        only: the name of a property, or several.
        claims: what :class:`Kernel` takes.

    The test raises AssertionError with the whole report where a property fails, or where none could be run.

    >>> import torch, sparsedsl as sd
    >>> @kernel_test(implements=sd.kv_idx >= 0, group=1, dtypes="float32", examples=3)
    ... def test_mine(q, k, v):
    ...     return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
    >>> test_mine()
    """

    def decorate(fn: Callable[..., Any]) -> Callable[[], None]:
        kernel = Kernel(fn, implements=implements, **claims)

        def test() -> None:
            __tracebackhide__ = True
            report = check_kernel(kernel, examples=examples, seed=seed, budget=budget, only=only)
            if not report.ok:
                raise AssertionError(f"{report}")

        # No functools.wraps: pytest would look through it and take q, k and v for fixtures.
        test.__name__ = test.__qualname__ = kernel.name or "test"
        test.__module__, test.__doc__ = getattr(fn, "__module__", __name__), fn.__doc__
        test.kernel = kernel  # type: ignore[attr-defined]
        return test

    return decorate
