"""Layers of transformers caches for programs over a layer's own q, k and v: those that hold every key and the summaries that programs
choose by, and one that holds no key once a program goes on from a state.

Both stand where the model's attention puts its keys; what programs make of these is kept by row of the batch, so that padding, beams and
selected rows leave it right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.execute.state import ProgramState
from sparsedsl.models.kept_keys import check_claimed
from sparsedsl.models.row_shares import RowShares
from sparsedsl.program.graph import Program

__all__ = ["FoldedKeys", "StaticSummarisedKeys", "SummarisedKeys", "WithSummaries"]

Tensor = torch.Tensor


class _ProgramKeys:
    """Before a layer of transformers: ``kept``, what each program has made of the keys, by row; rows move with all that is kept.
    ``claimed``: a forward of the model with the programs runs."""

    keys: Any
    values: Any

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.kept: dict[Any, RowShares[Any]] = {}
        self.claimed = False

    def reset(self) -> None:
        """Empty, as when it was new."""
        super().reset()  # type: ignore[misc]
        self.kept.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As beams go on."""
        self._select(beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._select(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self._select(torch.arange(self._batch)[indices.cpu()])

    @property
    def _batch(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[0])

    def _select(self, rows: Tensor) -> None:
        """The batch becomes these of its rows."""
        if self.keys is None:
            return
        self.keys, self.values = (x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values))
        for shares in self.kept.values():
            shares.select(rows.tolist())


class WithSummaries(_ProgramKeys):
    """A layer that holds every key, and what programs choose by: summaries of finished blocks, which a step reads in place of most keys."""

    kept: dict[Any, RowShares[KeptSummaries]]

    def summaries(self, attention: Attention, rows: Sequence[int]) -> KeptSummaries:
        """Those of a compiled program, of rows with equally many tokens; empty ones where the rows had not so before."""
        shares = self.kept.setdefault(attention.program.key, RowShares())
        found = shares.take(rows) if len(shares.tokens(rows)) == 1 else None
        found = attention.keep_summaries(self.max_tokens) if found is None else found
        shares.put(rows, found, self._batch)
        return found

    @property
    def max_tokens(self) -> int | None:
        """So many tokens take their memory at once; None: as they come."""
        return None

    def _take_back(self, tokens: int) -> None:
        for shares in self.kept.values():
            for kept in shares.shares:  # (where some of what was taken back is padding, more is forgotten than was said)
                kept.crop(max(0, kept.tokens - tokens))


class SummarisedKeys(WithSummaries, DynamicLayer):
    """The same in memory that grows."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number."""
        super().crop(tokens_to_remove)
        self._take_back(-tokens_to_remove)


class StaticSummarisedKeys(WithSummaries, StaticLayer):
    """The same in memory of a fixed size, taken once: keys, values and summaries of ``max_cache_len`` tokens.

    As a static layer of transformers does, it hands out all of its slots, written or not.
    """

    is_croppable = True
    is_compileable = False  # the offset would be a tensor, which block lists cannot follow

    @property
    def max_tokens(self) -> int:
        """So many tokens take their memory at once."""
        return int(self.max_cache_len)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All slots, the new keys and values in theirs."""
        check_claimed(self)
        return super().update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number."""
        _check_taken_back(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        self._take_back(-tokens_to_remove)


def _check_taken_back(tokens: int) -> None:
    if tokens > 0:
        raise ShapeError(f"crop() takes back tokens by a negative number, as transformers' layers do; got {tokens}")


class FoldedKeys(_ProgramKeys, DynamicLayer):
    """A layer whose programs go on from states of constant size: it hands out the keys of new tokens alone.

    ``programs``: index of each attention layer that reads it -> its program. ``is_late``: keys of the first forward stay until the second
    begins, when it is known whether tokens are taken back; who does that (prompt lookup, assistants) does so after each. ``holds_all``:
    some were, or are to be (``record_past``), before any key was gone: it holds every key from then on.
    """

    kept: dict[Any, RowShares[ProgramState]]

    def __init__(self, programs: Mapping[int, Program], *, stands_for: Any, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.programs, self.stands_for, self.max_cache_len = dict(programs), stands_for, max_cache_len
        self.seen = 0
        self.is_late = self.record_past = self.holds_all = self._folded = False

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not self._folded

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        held = [] if self.keys is None else [self.keys, self.values]
        return sum(x.numel() * x.element_size() for x in held) + sum(shares.nbytes for shares in self.kept.values())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, behind what was held of others."""
        if self._folded and not self.claimed:
            raise UnsupportedError(
                f"this cache was made for a program and holds its state after {self.seen} tokens, and no keys; the model that was called "
                "with it runs without the program. Give it a cache of its own, or put the program back with models.apply"
            )
        if self.max_cache_len is not None:
            check_claimed(self)
        if not self.claimed or (self.record_past and not self._folded):
            self.hold_all()
        if self.is_late and self.seen:
            self.is_late = False
            self.settle()
        self.seen += key_states.shape[-2]
        return (key_states, value_states) if self._folded else super().update(key_states, value_states)

    def settle(self) -> None:
        """The forward's keys are in the states."""
        if self.is_late or self.holds_all or self._folded:
            return
        self._folded = True
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()

    def state(self, index: int, rows: Sequence[int], tokens: int) -> ProgramState | None:
        """What the program of a layer goes on from in these rows, which have had so many tokens."""
        shares = self.kept.setdefault(index, RowShares())
        have = shares.tokens(rows)
        if have != {tokens}:
            raise UnsupportedError(
                f"layer {index}: its cache has seen {sorted(have)} real tokens of rows {list(rows)}, and the attention mask now speaks of "
                f"{tokens}; give every call the mask of all tokens so far, 1 for the same tokens as before"
            )
        return shares.take(rows)

    def keep(self, index: int, rows: Sequence[int], state: ProgramState) -> None:
        """Go on from this."""
        self.kept[index].put(rows, state, self._batch)

    def hold_all(self) -> None:
        """Hold every key from now on, where none is gone."""
        if self._folded:
            raise UnsupportedError(
                f"the states of {self.seen} tokens that a cache holds cannot be told apart again. Begin with a new cache, or go without "
                "one: use_cache=False"
            )
        self.holds_all, self.is_late = True, False
        self.kept.clear()

    def activate_past_recording(self) -> None:
        """Tokens will be taken back: hold every key, where none is gone; else :meth:`crop` refuses."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number.

        Raises :class:`~sparsedsl.UnsupportedError` where they are in a state.
        """
        _check_taken_back(tokens_to_remove)
        if not self.is_initialized:
            return
        if self._folded:
            if tokens_to_remove:
                raise UnsupportedError(
                    f"{-tokens_to_remove} tokens cannot be taken back, since a state holds what it has read for good. Call "
                    "activate_past_recording() on the cache before the first tokens, and every key is held"
                )
            return
        self.hold_all()
        super().crop(tokens_to_remove)
        self.seen = max(self.seen + tokens_to_remove, 0)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of a layer that holds everything: masks of other layers may be made by this one."""
        return self.max_cache_len or self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that it was made for; -1: any number."""
        return self.max_cache_len or -1

    def reset(self) -> None:
        """Empty, as when it was new."""
        super().reset()
        self.seen, self.holds_all, self._folded = 0, False, False

    def __repr__(self) -> str:
        return f"FoldedKeys({'every key' if self.holds_all else 'state'} of {self.seen} tokens)"
