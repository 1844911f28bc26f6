"""What a call says beside q, k and v, as it goes from one stage of the call to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.execute.paged_keys import RequestKeys
from sparsedsl.execute.state import ProgramState
from sparsedsl.runtime.standing import Standing

__all__ = ["CallWords"]


class CallWords(NamedTuple):
    """Words of :meth:`sparsedsl.Attention.__call__`. ``named``: tables and inputs by name. ``where``: what it says of positions, heads and
    lengths. ``layout``: of the tensors as they were given, for messages; those that go along with the words have heads first.
    ``in_pages``: what reads the rows of k and v, of which none are there before they are asked for."""

    named: Mapping[str, Any]
    q_offset: Any = None
    return_lse: bool = False
    scale: float | None = None
    where: Standing | None = None
    state: ProgramState | None = None
    return_state: bool = False
    summaries: KeptSummaries | None = None
    layout: str = "bhsd"
    in_pages: RequestKeys | None = None
