"""What a server may run that cuts prompts as its steps have room, and puts requests into another order in every step."""

from __future__ import annotations

from sparsedsl.analysis.proofs import PROVED, causality
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, KV_LEN, Q_LEN
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import is_for_prefill
from sparsedsl.program.relocation import reads_rows

__all__ = ["refuse_scheduled"]


def refuse_scheduled(given: Pattern | Program, where: str, scheduler: str, ways: str) -> None:
    """Refuse what the cuts of a scheduler, or its order of requests, would change.

    Args:
        given: what a layer runs. where: the layer. scheduler: who cuts prompts. ways: the ways out; all three for messages.

    Raises:
        UnsupportedError: it chooses by later queries, may see later keys, or depends on ``q_len``, ``kv_len`` or ``b``.

    >>> import sparsedsl as sd
    >>> refuse_scheduled(sd.attend(sd.kv_idx <= sd.q_idx), "layer 0", "the server", "Leave it")
    >>> refuse_scheduled(sd.attend(sd.kv_idx < sd.kv_len - 1), "layer 0", "the server", "Leave it")
    Traceback (most recent call last):
    ...
    sparsedsl.errors.UnsupportedError: layer 0: what it runs lets queries see later keys, so that a prompt cut in two gives something ...
    """
    if isinstance(given, Program) and is_for_prefill(given):
        raise UnsupportedError(
            f"{where}: the program chooses by later queries, so that it needs a whole prompt, and {scheduler} cuts prompts as its "
            f"steps have room. {ways}"
        )
    verdict = program_causality(given) if isinstance(given, Program) else causality(given.mask)
    if verdict != PROVED:
        known = "lets queries see later keys" if verdict.status == "REFUTED" else "may let queries see later keys"
        raise UnsupportedError(
            f"{where}: what it runs {known}, so that a prompt cut in two gives something else, and {scheduler} cuts prompts as its "
            f"steps have room. Add & (sd.kv_idx <= sd.q_idx). {ways}"
        )
    if any({Q_LEN, KV_LEN} & expr.free_symbols for expr in given.exprs):
        raise UnsupportedError(
            f"{where}: what it runs depends on q_len or kv_len, which for {scheduler} is how much of a prompt a step has room for. {ways}"
        )
    if reads_rows(given) if isinstance(given, Program) else any(BATCH in expr.free_symbols for expr in given.exprs):
        raise UnsupportedError(
            f"{where}: what it runs depends on b, and requests of {scheduler} have another place in every step. {ways}"
        )
