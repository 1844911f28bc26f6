"""``sd.nn.Attention``: a compiled pattern that owns the values of its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from sparsedsl.errors import TableError
from sparsedsl.execute.compiled import Attention as Compiled
from sparsedsl.execute.compiling import as_declared
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.execute.functional import without_values
from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.execute.state import ProgramState
from sparsedsl.lang.advice import shown, surplus
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import TableSpec, by_kept_name, table_reads
from sparsedsl.program.graph import Program
from sparsedsl.program.program_text import read_program
from sparsedsl.runtime.arguments import joined_tables
from sparsedsl.runtime.call import check_table

__all__ = ["Attention"]

Tensor = torch.Tensor


class Attention(torch.nn.Module):
    """Attention along a pattern, as a module: learned tables are its parameters, other tables with values its buffers.

    Args:
        pattern: what :func:`sparsedsl.compile` takes. Tensors that are bound to it become the module's: of learned tables a copy, as a
            parameter (an ``nn.Parameter`` itself, so that it is shared); of others the tensor, as a buffer.
        backend, allow, layout: as :func:`sparsedsl.compile` takes them.
        tables: values by name, for names that are also words here: ``tables={"backend": tensor}``.
        values: values by name, as if they were bound; of a learned table also its shape, ``bias=(8, 32)``: it then begins as zeros.

    A table without values is given with each call, ``module(q, k, v, doc=ids)``, and so are inputs of programs. A table stands in
    ``state_dict()`` by its name (with ``_table`` behind it where a module has something else of that name), and so as an attribute.
    ``.to(dtype)`` casts float tables, integer and boolean ones stay as they are.

    Shapes: q ``(B, Hq, Sq, D)``, k ``(B, Hkv, Skv, D)``, v ``(B, Hkv, Skv, Dv)``, out ``(B, Hq, Sq, Dv)``; with ``layout="bshd"`` heads
    stand behind the rows in all four. The LSE is ``(B, Hq, Sq)``.

    Raises:
        PatternError: not a pattern, or an unknown backend or layout. TableError: a value for what is no table, or that does not fit its
            declaration.

    >>> import torch, sparsedsl as sd
    >>> bias = sd.table("bias", learned=True)
    >>> distance = sd.clamp(sd.q_idx - sd.kv_idx, 0, 31)
    >>> module = sd.nn.Attention(sd.attend(sd.kv_idx <= sd.q_idx, score=sd.score + bias[sd.h, distance]), bias=(2, 32))
    >>> [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    [('bias', (2, 32))]
    >>> q = k = v = torch.randn(1, 2, 8, 16)
    >>> module(q, k, v).sum().backward()
    >>> module.bias.grad.shape
    torch.Size([2, 32])
    """

    def __init__(
        self, /, pattern: Any, *, backend: str | None = None, allow: Sequence[str] | None = None, layout: str | None = None,
        tables: Mapping[str, Any] | None = None, **values: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        own: dict[str, Any] = {"backend": "auto", "allow": (), "layout": "bhsd"}
        if isinstance(pattern, Compiled):
            own = {"backend": pattern.backend, "allow": sorted(pattern.allow), "layout": pattern.layout}
            pattern = pattern.program if pattern.program.static is None else pattern.pattern
        options: dict[str, Any] = {"backend": backend, "allow": allow, "layout": layout}
        declared = as_declared(pattern, "nn.Attention()")
        given = {**declared.bound, **by_kept_name(joined_tables(values, tables), declared.tables)}
        _refuse_unknown(declared, given)
        bare = without_values(declared) if isinstance(declared, Pattern) else declared
        if isinstance(bare, Program) and bare.bound:
            bare = read_program(bare.text)
        self.compiled: Compiled = compile_pattern(bare, **{name: own[name] if x is None else x for name, x in options.items()})
        # Table -> the attribute that holds its values.
        self._held: dict[str, str] = {}
        ranks = {read.spec.name: len(read.args) for expr in declared.exprs for read in table_reads(expr)}
        for name, value in given.items():
            self._hold(declared.tables[name], value, ranks[name])

    def _hold(self, spec: TableSpec, value: Any, rank: int) -> None:
        attribute = spec.name
        while hasattr(self, attribute):
            attribute += "_table"
        if spec.learned and not isinstance(value, torch.Tensor):
            value = torch.zeros(_shape(spec, value))
        check_table(spec, value, rank, None)
        if spec.learned:
            shared = isinstance(value, torch.nn.Parameter)
            self.register_parameter(attribute, value if shared else torch.nn.Parameter(value.detach().clone()))
        else:
            self.register_buffer(attribute, value)
        self._held[spec.name] = attribute

    @property
    def pattern(self) -> Pattern | Program:
        """What it computes, without values."""
        program = self.compiled.program
        return program if program.static is None else program.static

    def forward(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | Tensor | Literal["end"] | None = None,
        return_lse: bool = False,
        scale: float | None = None,
        q_positions: Tensor | None = None,
        kv_positions: Tensor | None = None,
        head_offset: int | None = None,
        heads: int | None = None,
        whole: tuple[int, int] | None = None,
        cp: Any = None,
        state: ProgramState | None = None,
        return_state: bool = False,
        summaries: KeptSummaries | None = None,
        tables: Mapping[str, Tensor] | None = None,
        **named: Any,
    ) -> Any:
        """As a call of :class:`sparsedsl.Attention`. Tables that are given replace the module's own for this call."""
        own = {name: getattr(self, attribute) for name, attribute in self._held.items()}
        return self.compiled(
            q, k, v, q_offset=q_offset, return_lse=return_lse, scale=scale, q_positions=q_positions, kv_positions=kv_positions,
            head_offset=head_offset, heads=heads, whole=whole, cp=cp, state=state, return_state=return_state, summaries=summaries,
            tables={**own, **by_kept_name(joined_tables(named, tables), own)},
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The pattern, the options that are not the default, and which tables come from where."""
        attn, pattern = self.compiled, self.pattern
        words = [repr(pattern) if isinstance(pattern, Program) else pattern.text.splitlines()[-1]]
        words += [f"backend={attn.backend!r}"] if attn.backend != "auto" else []
        words += [f"layout={attn.layout!r}"] if attn.layout != "bhsd" else []
        held = {name: getattr(self, attribute) for name, attribute in self._held.items()}
        for what, some in (
            ("learned", {name: x for name, x in held.items() if isinstance(x, torch.nn.Parameter)}),
            ("fixed", {name: x for name, x in held.items() if not isinstance(x, torch.nn.Parameter)}),
        ):
            words += [f"{what}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in some.items())] if some else []
        called = [name for name in (*pattern.tables, *attn.program.inputs) if name not in held]
        words += [f"given with the call: {', '.join(called)}"] if called else []
        return ", ".join(words)


def _shape(spec: TableSpec, value: Any) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else value
    whole = isinstance(sizes, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    if not whole or not math.prod(sizes):
        raise TableError(
            f"table {spec.name!r} is learned: give its first values as a tensor, or its shape as whole numbers; got {shown(value)}"
        )
    return tuple(sizes)


def _refuse_unknown(declared: Pattern | Program, given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in declared.tables]
    if unknown:
        inputs = getattr(declared, "inputs", {})
        of_calls = [name for name in unknown if name in inputs]
        more = f". {of_calls[0]} is an input of the program: give it with each call" if of_calls else ""
        reads = ", ".join(declared.tables) or "no table"
        raise TableError(surplus(unknown, [*declared.tables, "backend", "allow", "layout"], f"the pattern reads {reads}") + more)
