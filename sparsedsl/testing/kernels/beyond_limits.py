"""What a kernel does outside its declared limits: to refuse is right, a right answer is well, a wrong one without a word is a warning."""

from __future__ import annotations

from dataclasses import replace

from sparsedsl.testing.kernels.calling import Broken, Refused, changed, made, results
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.limits import fits, near

__all__ = ["outside"]


def outside(kernel: Kernel) -> tuple[str, ...]:
    """Warnings: calls outside the declared limits that give wrong numbers and no error."""
    if kernel.is_program:
        return ()
    inside = near(kernel, {"q_len": 5, "kv_len": 5, "head_dim": 4, "head_dim_v": 4})
    if inside is None:
        return ()
    found = [_wrong(kernel, what, case) for what, case in _cases(kernel, inside)]
    return tuple(text for text in (*found, _uneven(kernel, inside)) if text)


def _cases(kernel: Kernel, inside: KernelCase) -> list[tuple[str, KernelCase]]:
    longer = replace(inside, kv_len=inside.kv_len + 3)
    tried = [
        ("lengths", longer if kernel.offset is not True else replace(longer, q_offset=3)),
        ("lengths", replace(inside, q_len=inside.q_len + 1, kv_len=inside.kv_len + 1)),
        ("head_dims", replace(inside, head_dim=inside.head_dim + 1, head_dim_v=inside.head_dim_v + 1)),
        ("head_dims", replace(inside, head_dim_v=inside.head_dim_v + 1)),
        ("group", replace(inside, heads=2 * inside.heads)),
        ("dtypes", replace(inside, dtype="float16")),
    ]
    heads = getattr(kernel.implements, "heads", None)
    declared = {
        "lengths": kernel.lengths,
        "head_dims": kernel.head_dims,
        "group": kernel.group,
        "dtypes": "dtypes" in kernel.given,
    }
    tried = [(what, case) for what, case in tried if declared[what] and not (what == "group" and heads is not None)]
    if kernel.offset == "last":
        tried = [(what, replace(case, q_offset=case.kv_len - case.q_len)) for what, case in tried]
    return [(what, case) for what, case in tried if not fits(kernel, case) and not kernel.implements.bound]


def _wrong(kernel: Kernel, what: str, case: KernelCase) -> str:
    problem = made(kernel, case).problem
    try:
        fault = expectation(kernel, problem).fault("out", results(kernel, problem)["out"])
    except (Refused, Broken):
        return ""
    return f"silently wrong outside its declared {what}: {case!r} gives {fault} (an error would be safe)" if fault else ""


def _uneven(kernel: Kernel, inside: KernelCase) -> str:
    """Query heads that are no multiple of the key heads mean nothing: any number is wrong."""
    if getattr(kernel.implements, "heads", None) is not None or kernel.implements.bound:
        return ""
    problem = made(kernel, replace(inside, heads=2 * inside.heads, kv_heads=2 * inside.kv_heads)).problem
    if problem.k.shape[1] < 2:
        return ""
    q = problem.q[:, :1].repeat(1, problem.k.shape[1] + 1, 1, 1)
    try:
        results(kernel, changed(problem, q=q))
    except (Refused, Broken):
        return ""
    heads = f"{q.shape[1]} query heads on {problem.k.shape[1]} key heads"
    return f"silently wrong outside its limits: {heads} give numbers (an error would be safe)"
