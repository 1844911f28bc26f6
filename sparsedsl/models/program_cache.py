"""What a layer that runs a program keeps while a model generates: a layer of transformers' caches.

A program with a state keeps the state alone: as many bytes after a million tokens as after a thousand. Any other keeps keys, values, and
all inputs that have rows for keys, or of these what its windows see where it reads others by landmarks alone; of landmarks those of chunks
that are over, and of the chunk that is not its hidden states. Rows of a
batch that differ in how many real tokens they have had are held apart: padding leaves nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from sparsedsl.analysis.cached_keys import CacheBound
from sparsedsl.errors import ArgumentError, UnsupportedError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.execute.state import ProgramState, horizon
from sparsedsl.lang.advice import shown
from sparsedsl.models.layer import by_tokens, chunk_of
from sparsedsl.models.row_shares import RowShares, tensors_of
from sparsedsl.program.graph import Program

__all__ = ["Held", "ProgramCacheLayer", "bound_beside_chunks", "keeps_state"]

Tensor = torch.Tensor


@functools.lru_cache(maxsize=256)
def keeps_state(program: Program) -> bool:
    """Whether a program goes on from a state of constant size."""
    try:
        horizon(program)
    except UnsupportedError:
        return False
    return chunk_of(program) is None


@functools.lru_cache(maxsize=256)
def bound_beside_chunks(program: Program) -> CacheBound | None:
    """What is needed of the keys themselves, where a program reads most of them by landmarks alone; None: every key."""
    if chunk_of(program) is None:
        return None
    bound = cache_bound(program)
    return bound if bound.blocks else None


@dataclass(frozen=True, eq=False)
class Held:
    """What is kept of rows that have had equally many ``tokens``. Each tensor's first axis counts these rows.

    ``state``: of a program that has one. Else ``rows``: input name -> its rows for keys, which stand at ``places``, numbers of tokens, or
    are all where that is None; ``landmarks``: input name -> its rows for
    finished chunks; ``hidden``: (n, fewer than a chunk, hidden size), of the chunk that is not over; ``summaries`` of finished blocks.
    """

    tokens: int
    state: ProgramState | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    landmarks: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    summaries: KeptSummaries | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Held:
        """With every tensor replaced by what ``change`` makes of it."""
        changed = [{name: change(x) for name, x in part.items()} for part in (self.rows, self.landmarks)]
        return replace(
            self, rows=changed[0], landmarks=changed[1], state=None if self.state is None else self.state.each(change),
            hidden=None if self.hidden is None else change(self.hidden),
            summaries=None if self.summaries is None else self.summaries.each(change),
        )  # fmt: skip

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return tensors_of(self)


class ProgramCacheLayer(CacheLayerMixin):
    """A layer of a transformers cache, for a layer of a model that runs a program.

    ``program``: what runs. ``constant``: whether that keeps a state, so that nothing here grows. Batch entries are reordered, repeated and
    selected with all that is kept of them. Without a state the last tokens can be taken back (``crop``); a state cannot go back, and says
    so.

    >>> import torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> handle = sd.models.convert(model, {0: sd.patterns.ring_linear([0.5, 0.9])})
    >>> sizes = []
    >>> for length in (8, 64):
    ...     cache = handle.cache()
    ...     _ = model(torch.arange(length)[None] % 8, past_key_values=cache)
    ...     sizes.append(cache.layers[0].nbytes)
    >>> sizes[0] == sizes[1]
    True
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, index: int, program: Program) -> None:
        super().__init__()
        if not isinstance(program, Program):
            raise ArgumentError(f"ProgramCacheLayer: program must be a sd.Program; got {shown(program)}")
        self.index, self.program, self.constant = index, program, keeps_state(program)
        self.slots = 0
        self.batch: int | None = None
        self.device: Any = None
        self.rows: RowShares[Held] = RowShares()
        self._padded = False

    # ---- what the model's layer does with it ---------------------------------------------------------------------------------------

    def take(self, rows: list[int], tokens: int) -> Held | None:
        """What is kept of these rows, which have had so many tokens; None: nothing yet."""
        have = self.rows.tokens(rows)
        if have != {tokens}:
            raise UnsupportedError(
                f"layer {self.index}: its cache has seen {sorted(have)} real tokens of rows {rows}, and the attention mask now speaks of "
                f"{tokens}; give every call the mask of all tokens so far, 1 for the same tokens as before"
            )
        return self.rows.take(rows)

    def put(self, rows: list[int], held: Held, batch: int) -> None:
        """Keep this of these rows, in place of what was kept."""
        self.rows.put(rows, held, batch)

    def advance(self, slots: int, batch: int, device: Any, padded: bool) -> None:
        """The model has read so many slots, padding included."""
        self.slots, self.batch, self.device = self.slots + slots, batch, device
        self._padded = self._padded or padded
        self.is_initialized = True

    @property
    def held(self) -> list[Held]:
        """What is kept, of rows with equally many tokens together."""
        return self.rows.shares

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.rows.nbytes

    # ---- what transformers asks of a layer of a cache ------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not self.constant and chunk_of(self.program) is None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it holds what the first call brings."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: this is what the donor's own attention would call."""
        raise UnsupportedError(
            f"layer {self.index}: the cache was begun by the converted layer, and the donor's attention cannot go on with it; begin with a "
            "new cache (past_key_values=None) where identity() is on"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys and first one, as for a layer that keeps everything: native layers' masks are made by it."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Slots so far, padding included."""
        return self.slots

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def reset(self) -> None:
        """As new."""
        self.rows, self.slots, self.batch, self._padded, self.is_initialized = RowShares(), 0, None, False, False

    def offload(self) -> None:
        """To the CPU."""
        self.rows.shares = [held.each(lambda x: x.to("cpu", non_blocking=True)) for held in self.held]

    def prefetch(self) -> None:
        """Back to where the model computes."""
        if self.device is not None:
            self.rows.shares = [held.each(lambda x: x.to(self.device, non_blocking=True)) for held in self.held]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, ``-n`` of them; 0 is always right.

        Raises:
            UnsupportedError: a state cannot go back, nor can rows with padding, of which it is not known which tokens were the last.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if tokens_to_remove > 0:
            raise UnsupportedError(
                f"layer {self.index}: crop() takes -n, the number of last tokens to take back; got {tokens_to_remove}"
            )
        if self.constant or self._padded:
            why = "its state holds what it has read for good" if self.constant else "the batch has padding"
            raise UnsupportedError(
                f"layer {self.index}: {-tokens_to_remove} tokens cannot be taken back, since {why}. Assisted decoding and prompt lookup "
                "need that: generate() without assistant_model and prompt_lookup_num_tokens"
            )
        self.rows.shares = [self._shortened(held, -tokens_to_remove) for held in self.held]
        self.slots += tokens_to_remove
        if self.slots <= 0:
            self.reset()

    def _shortened(self, held: Held, fewer: int) -> Held:
        left = max(held.tokens - fewer, 0)
        if chunk_of(self.program) is None:
            axes = by_tokens(self.program)
            if held.summaries is not None:
                held.summaries.crop(left)
            return replace(held, tokens=left, rows={name: x.narrow(axes[name], 0, left) for name, x in held.rows.items()})
        raise UnsupportedError(
            f"layer {self.index}: {fewer} tokens cannot be taken back, since the hidden states of chunks that are over are gone. Assisted "
            "decoding and prompt lookup need that: generate() without assistant_model and prompt_lookup_num_tokens"
        )

    def _select(self, rows: list[int]) -> None:
        """The batch becomes these of its rows."""
        self.rows.select(rows)
        self.batch = len(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beams."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._select([row for row in range(self.batch or 0) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        chosen = torch.arange(self.batch or 0)[indices.cpu()]
        self._select(chosen.tolist())
