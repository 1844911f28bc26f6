"""From a program to a callable. The stages of a call: *check* (``call``), *choose* the kernels (``kernels``), *run* node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from sparsedsl.analysis.program_report import analyse_program
from sparsedsl.analysis.report import ITEM_BYTES
from sparsedsl.backends.reference.nodes import REFERENCE_RULES, Reference
from sparsedsl.backends.triton.attention import missing
from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.execute import operators
from sparsedsl.execute.kernels import Kernels, kernels_of, triton_refusal
from sparsedsl.execute.node_rules import LOWERED_RULES, lowered
from sparsedsl.execute.program_empty import run_empty
from sparsedsl.execute.program_explain import ProgramExplanation, explain_program
from sparsedsl.execute.state import ProgramState, advanced, continued
from sparsedsl.lang.advice import check_word
from sparsedsl.plan import TRITON_DTYPES, TRITON_WIDEST, check_backend
from sparsedsl.program.effects import KEEPS_STATE, LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.rules import check_rules
from sparsedsl.program.text import TEXT_RULES, read_program
from sparsedsl.runtime.arguments import arranged, warn_of_slips
from sparsedsl.runtime.interpreter import Evaluation
from sparsedsl.runtime.program_call import ProgramCall, check_program_call
from sparsedsl.runtime.torch_modes import is_traced, is_transformed
from sparsedsl.selection.scores import ScoreSource

__all__ = ["CompiledProgram"]

Tensor = torch.Tensor


class CompiledProgram:
    """A compiled program; call it on tensors. Made by :func:`sparsedsl.compile`."""

    def __init__(self, program: Program, backend: str, allow: Sequence[str] = ()):
        check_rules(program, REFERENCE_RULES, LOWERED_RULES, TEXT_RULES)
        self.program = program
        self.backend = check_backend(backend)
        known = (LATER_QUERIES, KEEPS_STATE)
        if isinstance(allow, str) or not all(effect in known for effect in allow):
            raise PatternError(f"allow must be a list of effects, of {', '.join(map(repr, known))}; got {allow!r}")
        self.allow = frozenset(allow)
        # What a traced call needs, as plain values.
        self._handle, self._bound = f"program {backend} {'; '.join(sorted(allow))}\n{program.text}", program.bound
        operators.remember(self._handle, self)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | Tensor | Literal["end"] | None = None,
        return_lse: bool = False,
        scale: float | None = None,
        state: ProgramState | None = None,
        return_state: bool = False,
        **named: Any,
    ) -> Any:
        """Attention of ``q (B, Hq, Sq, D)`` over ``k (B, Hkv, Skv, D)``, ``v (B, Hkv, Skv, Dv)``; ``Hq % Hkv == 0``.

        Args:
            q_offset: position of the first query; a number or a 0-d integer tensor. ``"end"``: the last query stands at the last key.
                None is 0, and warns once where there are fewer queries than keys.
            return_lse: also return the LSE of the logits, ``(B, Hq, Sq)`` in float32 or float64.
            scale: factor on the dot products of attention; default the program's, else ``D ** -0.5``.
            state: what an earlier call returned: q, k, v and inputs then are those of the tokens after it.
            return_state: also return the state after the last key, for programs that keep one.
            named: the inputs and tables of the program.

        Returns:
            ``out (B, Hq, Sq, Dv)``; then the LSE and the state, if asked for.

        Raises:
            ShapeError, TableError: q, k, v or an input is missing or does not fit.
            UnsupportedError: the backend cannot run this call, or it is a training step of a program whose choices read later queries.
        """
        given = q_offset
        q, k, v, q_offset = arranged(q, k, v, q_offset)
        if is_traced(q, k, v) or is_transformed(q, k, v):
            return self._in_a_graph(q, k, v, named, q_offset, return_lse, scale, state is not None or return_state)
        warn_of_slips(self.program.expressions, q, k, given if state is None else 0)
        return self.attend_now(
            q, k, v, named, q_offset=q_offset, return_lse=return_lse, scale=scale, state=state, return_state=return_state
        )

    def attend_now(
        self, q: Any, k: Any, v: Any, named: Mapping[str, Any], *, q_offset: Any, return_lse: bool, scale: float | None,
        state: ProgramState | None = None, return_state: bool = False,
    ) -> Any:  # fmt: skip
        """The call on tensors that hold values; :meth:`__call__` says what it takes and gives."""
        call = check_program_call(self.program, q, k, v, named, q_offset=q_offset, scale=scale)
        if return_lse and not self.program.root.weighable:
            raise UnsupportedError(f"{self.program.root!r} is no softmax and has no LSE; leave return_lse=False")
        self._check_training(call)
        if call.is_empty:
            return self._empty(call, return_lse, state, return_state)
        if state is not None:
            call = continued(call, state)
        with torch.autocast(call.q.device.type, enabled=False):
            out, lse = self._runner(call, return_lse).value(self.program.root)
            after = advanced(call, self.kernels(call)) if return_state else None
        results = [out.to(call.q.dtype), *([lse] if return_lse else []), *([after] if return_state else [])]
        return results[0] if len(results) == 1 else tuple(results)

    def _in_a_graph(
        self, q: Any, k: Any, v: Any, named: Mapping[str, Any], q_offset: Any, return_lse: bool, scale: float | None, keeps: bool
    ) -> Any:
        """The call as one operator: its choices depend on values, which a graph does not have."""
        if keeps:
            raise UnsupportedError(
                "state= and return_state= are not part of a graph (torch.compile, torch.export, torch.func): call the program outside of "
                "it, or pass all keys and values with q_offset="
            )
        given = {name: x for name, x in named.items() if x is not None}
        return operators.attend_traced(
            self._handle, self._bound, q, k, v, given, q_offset=q_offset, return_lse=return_lse, scale=scale, has_lse=self.has_lse
        )

    @property
    def has_lse(self) -> bool:
        """Whether it is a softmax."""
        return self.program.root.weighable

    @property
    def reads_batch(self) -> bool:
        """Whether batch entries are told apart."""
        return self.program.reads_batch

    # For the operators: its results come from several calls.
    one_call = False

    def _empty(self, call: ProgramCall, return_lse: bool, state: ProgramState | None, return_state: bool) -> Any:
        if return_state and state is None:
            raise ShapeError(f"there are no tokens to make a state of: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}")
        out, lse = run_empty(call)
        results = [out, *([lse] if return_lse else []), *([state] if return_state else [])]
        return results[0] if len(results) == 1 else tuple(results)

    def _check_training(self, call: ProgramCall) -> None:
        why = reasons(self.program).get(LATER_QUERIES)
        if why and call.needs_grad and LATER_QUERIES not in self.allow:
            raise UnsupportedError(
                f"{LATER_QUERIES} ({'; '.join(why)}): an output depends on tokens after it, so that a model trained on it learns from the "
                f"future. For inference call it under torch.no_grad(); if it is meant, sd.compile(..., allow=[{LATER_QUERIES!r}])"
            )

    def _runner(self, call: ProgramCall, lse: bool) -> Evaluation:
        if self.backend == "reference":
            return Reference(call)
        return lowered(call, self.kernels(call), lse=lse)

    def kernels(self, call: ProgramCall) -> Kernels:
        """The kernels that a call runs on."""
        dtype = str(call.q.dtype).removeprefix("torch.")
        widest = max(call.q.shape[3], call.v.shape[3])
        lacks = None
        if self.backend == "triton":
            lacks = missing(call.q.device.type) or triton_refusal(self.program, call.q.dtype, widest)
        if lacks is not None:
            raise UnsupportedError(
                f"backend 'triton' cannot run this call: {lacks}. Use backend='tiled', which runs everywhere, or 'auto'"
            )
        return self._kernels(call.q.device.type, dtype, widest)[0]

    def _kernels(self, device: str, dtype: str, widest: int) -> tuple[Kernels, str]:
        """The kernels for calls of a kind, and why these."""
        if self.backend != "auto":
            return kernels_of(self.backend, triton=False), "asked for"
        lacks = "no GPU" if device != "cuda" else missing("cuda")
        if lacks is None and dtype not in TRITON_DTYPES:
            lacks = f"the kernels have no {dtype}"
        if lacks is None and widest > TRITON_WIDEST:
            lacks = f"the kernels have heads up to {TRITON_WIDEST} wide"
        lacks = lacks or triton_refusal(self.program, getattr(torch, dtype), widest)
        chosen = kernels_of("auto", triton=lacks is None)
        return chosen, f"torch: {lacks}" if lacks else "kernels on the GPU"

    def explain(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int = 1,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dtype: Any = "float32",
        device: Any = "cpu",
        q_offset: int = 0,
        sizes: Mapping[str, int] | None = None,
        **tables: Any,
    ) -> ProgramExplanation:
        """How a call of this shape would run, node by node, and what it would cost, before anything runs; ``print`` it.

        ``sizes``: of axes with names of their own, as ``{"retrieval_heads": 2}``. Lengths in tokens.

        >>> import sparsedsl as sd
        >>> print(str(sd.compile(sd.patterns.moba()).explain(8192, heads=4)).splitlines()[0])
        backend: auto (torch: no GPU)
        """
        name = check_word("dtype", str(dtype).removeprefix("torch."), ITEM_BYTES)
        analysis = analyse_program(
            self.program, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            head_dim_v=head_dim_v, item=ITEM_BYTES[name], sizes=sizes, **tables,
        )  # fmt: skip
        if self.backend == "reference":
            return explain_program(self.program, "reference", None, "asked for", analysis)
        kernels, reason = self._kernels(torch.device(device).type, name, max(head_dim, head_dim_v or 0))
        return explain_program(self.program, self.backend, kernels, reason, analysis)

    def choices(
        self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int | Tensor | Literal["end"] | None = None, **named: Any
    ) -> dict[str, Any]:
        """What the program chooses for these inputs, by the label of the node: :class:`Picks`, positions of an order, kept tokens.

        On ``reference`` choices are boolean tables.

        >>> import sparsedsl as sd
        >>> attn = sd.compile(sd.patterns.moba(chunk=16, top_k=2), backend="tiled")
        >>> q = k = v = torch.randn(1, 2, 64, 16)
        >>> [picks.indices.shape for picks in attn.choices(q, k, v).values()]
        [torch.Size([1, 2, 64, 1])]
        """
        given = q_offset
        q, k, v, q_offset = arranged(q, k, v, q_offset)
        warn_of_slips(self.program.expressions, q, k, given)
        call = check_program_call(self.program, q, k, v, named, q_offset=q_offset)
        with torch.no_grad():
            runner = self._runner(call, False)
            chosen = [node for node in self.program.order if node.gives in ("picks", "order", "tokens")]
            values = {self.program.labels[node]: runner.value(node) for node in chosen}
        return {label: value for label, value in values.items() if not isinstance(value, ScoreSource)}

    @property
    def effects(self) -> frozenset[str]:
        """What it does beside computing from the past."""
        return frozenset(reasons(self.program))

    @property
    def source(self) -> str:
        """The program's text form; the code of its kernels lies in ``codegen/kernels``."""
        return self.program.text

    def __repr__(self) -> str:
        return f"<CompiledProgram backend={self.backend!r} {self.program!r}>"

    def __reduce__(self) -> Any:
        return CompiledProgram, (self.program, self.backend, tuple(sorted(self.allow)))


def _again(first: str, text: str) -> CompiledProgram:
    _, backend, allowed = first.split(" ", 2)
    return CompiledProgram(read_program(text), backend, [effect for effect in allowed.split("; ") if effect])


operators.register("program", _again)
