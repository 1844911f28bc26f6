"""What every kind of node means, takes, gives and does beside, and how each backend runs it: one description a kind, as data.

``docs/programs.md`` holds the table that :func:`kinds_table` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsedsl.program.effect_rules import KEEPS_STATE, LATER_QUERIES

__all__ = ["KINDS", "Kind", "kinds_table"]


@dataclass(frozen=True)
class Kind:
    """One kind of node.

    ``function``: the public function or method that makes it. ``shapes``: axes taken -> axes given. A word of small letters is an axis; a
    capital letter stands for any one (``H+G``: heads as they join); ``keys/u`` counts blocks of ``u`` keys, one or more;
    ``keys/nu``, larger blocks, of ``n`` of these; ``..`` is what comes before or after. ``effects``: effect -> when.
    ``reference``, ``tiled``, ``flex``, ``triton``: how each backend runs it. ``source``: where it is published.
    """

    function: str
    meaning: str
    shapes: str
    reference: str
    tiled: str
    flex: str = "as tiled"
    triton: str = "as tiled"
    effects: tuple[tuple[str, str], ...] = ()
    source: str = ""


_NO_RECURRENCE = "refuses: FlexAttention has no state that runs along the keys"
_LISTS = "pieces of rows x blocks go by; out come lists of blocks, ascending"
_AS_TABLE = "as tiled; lists for single queries are then spread into a table"
_BY_BLOCK = ((LATER_QUERIES, "if one choice is made for several queries"),)
_BY_PROBE = ((LATER_QUERIES, "if the scores come from the last queries"),)
_BY_ALL_KEYS = ((LATER_QUERIES, "always: all keys of a call are compared with each other"),)
_STATE = ((KEEPS_STATE, "always"),)
_SCORES = "batch H queries/u keys/w"
_OUT = "batch heads queries value_dim"

_ALL = (
    Kind(
        "input",
        "a tensor of the call, by name",
        "-> as declared",
        "cast to the type computed in",
        "left in its type; pieces are cast where they are used",
    ),
    Kind(
        "summary",
        "one row for each block of rows: mean, max, min, sum, first or last; of keys also for windows that overlap",
        "batch H X/u D -> batch H X/nu D",
        "block by block",
        "one reduction, and one for a ragged last block",
    ),
    Kind("take", "rows of keys in the order of a sort", "batch G keys D, batch H keys -> batch H+G keys D", "gather", "gather"),
    Kind(
        "dot",
        "scaled dot products of rows for queries and rows for keys",
        "batch H queries/u D, batch G keys/w D -> batch H+G queries/u keys/w",
        "one product, held",
        "a source that gives pieces of scores when asked; nothing of queries x blocks is held",
    ),
    Kind(
        "bound",
        "an upper bound of a query's logits in a block of keys",
        "batch H queries/u D, batch G keys/w D -> batch H+G queries/u keys/nw",
        "all products, held",
        "a source, two products a piece",
        source="arXiv 2406.10774",
    ),
    Kind(
        "antidiagonal",
        "mass of blocks, from logits summed along antidiagonals",
        "batch H queries D, batch G keys D -> batch H+G queries/n keys/n",
        "one product for each token of the stride",
        "products of stride x dim long rows, summed into blocks row by row",
        source="arXiv 2503.16428",
    ),
    Kind(
        "softmax",
        "scores as mass over the blocks with an allowed pair",
        f"{_SCORES} -> {_SCORES}",
        "softmax of a row",
        "a source; the totals of rows come first, in a pass over the pieces",
    ),
    Kind(
        "regroup",
        "scores of larger blocks: sum, mean or max of neighbours",
        f"{_SCORES} -> batch H queries/u keys/nw",
        "reduction",
        "a source over a source",
    ),
    Kind(
        "gumbel",
        "scores with noise that a seed fixes: the best of them are a sample",
        f"{_SCORES}, 1 -> {_SCORES}",
        "noise of the same places, added",
        "noise is drawn piece by piece",
    ),
    Kind(
        "plus",
        "the sum of two scores",
        f"{_SCORES}, batch G queries/u keys/w -> batch H+G queries/u keys/w",
        "sum",
        "a source over sources",
    ),
    Kind(
        "rectified",
        "scores below 0 as 0",
        f"{_SCORES} -> {_SCORES}",
        "a comparison",
        "a source over a source",
        source="arXiv 2512.02556",
    ),
    Kind(
        "scaled",
        "scores times a number, plus a number",
        f"{_SCORES} -> {_SCORES}",
        "product and sum",
        "a source over a source",
    ),
    Kind(
        "weighted",
        "scores times a factor for each row",
        f"{_SCORES}, batch G queries/u -> batch H+G queries/u keys/w",
        "product",
        "a source over a source",
        source="arXiv 2512.02556",
    ),
    Kind(
        "overlap",
        "mass of windows that overlap, as mass of blocks: by the strips they share, or the greatest that touches",
        "batch H queries/u keys/w+s -> batch H queries/u keys/n",
        "window by window",
        "a source over a source: shifted sums of strips, then blocks",
        source="arXiv 2502.11089",
    ),
    Kind(
        "given_scores",
        "scores that a call is given",
        f"{_SCORES} -> {_SCORES}",
        "as they are",
        "a source; pieces are views",
    ),
    Kind(
        "given_key_scores",
        "one score a key that a call is given",
        "batch H keys -> batch H keys",
        "as they are",
        "as they are",
    ),
    Kind(
        "grouped",
        "scores, or scores of keys, with the heads of a group (or all) joined",
        "batch H .. -> batch G ..",
        "reduction over heads",
        "a source over a source; of scores of keys a reduction",
    ),
    Kind(
        "probe",
        "the mean attention that the last queries pay each key; or an estimate of it from means, of blocks",
        "batch H queries D, batch G keys D -> batch H+G keys/u",
        "one softmax of rows x keys",
        "two passes over the keys in pieces: totals of rows, then sums of keys",
        source="arXiv 2510.21270, 2602.03216",
    ),
    Kind(
        "diagonals",
        "the mean attention that the last queries pay keys at each distance",
        "batch H queries D, batch G keys D -> batch H+G X",
        "one softmax of rows x keys",
        "a few rows at a time, gathered by distance",
        source="arXiv 2407.02490, 2502.20766",
    ),
    Kind(
        "smooth",
        "scores of keys averaged with their neighbours, or the greatest of them",
        "batch H keys -> batch H keys",
        "pooling",
        "pooling",
    ),
    Kind(
        "top_k",
        "the blocks with the highest scores, as many as said",
        f"{_SCORES} -> {_SCORES}",
        "a sort of each row",
        f"{_LISTS}, the best so far are kept",
        _AS_TABLE,
        effects=_BY_BLOCK,
    ),
    Kind(
        "top_p",
        "the fewest blocks that hold a share of the mass",
        f"{_SCORES} -> {_SCORES}",
        "a sort and a running sum of each row",
        f"{_LISTS}, whole rows at a time",
        _AS_TABLE,
        effects=_BY_BLOCK,
    ),
    Kind(
        "threshold",
        "the blocks with at least some score",
        f"{_SCORES} -> {_SCORES}",
        "a comparison",
        f"{_LISTS}, whole rows at a time",
        _AS_TABLE,
        effects=_BY_BLOCK,
    ),
    Kind(
        "given",
        "blocks that a call is given, as lists or as a bitmap",
        "batch H queries/u .. -> batch H queries/u keys/w",
        "compared with every number",
        "checked, put in order: lists as of choices made here",
        _AS_TABLE,
    ),
    Kind(
        "keys_chosen",
        "keys of the highest scores of a head, or distances, or blocks of these: so many, or those that hold a share (`top_k`, `top_p`)",
        "batch H X -> batch H X/n",
        "a sort of each head",
        "a sort of each head; a table of flags, read by the mask",
        effects=_BY_ALL_KEYS,
    ),
    Kind(
        "divergence",
        "how far apart two scores of keys are: the Jensen-Shannon distance of a head",
        "batch H X/u, batch G X/w -> batch H+G",
        "one sum a head",
        "one sum a head; a number in the mask",
        effects=_BY_ALL_KEYS,
        source="arXiv 2502.20766",
    ),
    Kind(
        "segment_sort",
        "keys sorted by score within segments: a permutation",
        "batch H keys -> batch H keys",
        "stable sort",
        "stable sort of all segments at once",
        effects=_BY_PROBE,
        source="arXiv 2510.21270",
    ),
    Kind(
        "inverse", "for each key its place in a sort", "batch H keys -> batch H keys", "a sort of the permutation", "one scatter"
    ),
    Kind(
        "keep_tokens",
        "the best tokens of each head, as many in all of them",
        "batch H keys, batch one keys -> batch H keys",
        "sorts",
        "sorts and a running sum; the number is read back: the one wait for a GPU",
        effects=_BY_ALL_KEYS,
        source="arXiv 2602.03216, 2502.20766",
    ),
    Kind(
        "slots",
        "rows of memory that gates write and fade",
        "batch H keys D, batch H keys E, batch H keys M -> batch H keys M",
        "token by token",
        "see recall",
        _NO_RECURRENCE,
        "see recall",
        source="arXiv 2409.07146, 2510.07019",
    ),
    Kind(
        "per_chunk",
        "a softmax in each picked chunk, and weights for the chunks",
        "(a rule of attend)",
        "chunk by chunk, all of them",
        "along the lists; scores are worked out again where something was picked",
        "two passes: the LSE of every chunk, then one softmax with a bias of queries x chunks",
        "kernels; neighbouring queries share the union of their chunks",
        source="arXiv 2511.23319, 2504.16795",
    ),
    Kind(
        "attend",
        "softmax attention over the pairs of a mask",
        f"batch heads queries D, batch H keys/u D, batch H keys/u E, .. -> {_OUT}",
        "dense",
        "choices for single queries: along lists, joined with what attends in any case; for blocks: full tiles; else strips",
        "choices as tables in the mask, on compact block lists",
        "choices for single queries: kernels along lists; else kernels generated for the mask",
    ),
    Kind(
        "recall",
        "softmax attention over slots as they are at the query",
        f"batch H keys M, batch heads queries D -> {_OUT}",
        "token by token",
        "chunks of the keys, one after the other",
        _NO_RECURRENCE,
        "kernels over chunks",
        effects=_STATE,
    ),
    Kind(
        "linear",
        "decayed linear attention: a sum without a softmax; decays and write rules may come with the data",
        f"batch heads queries D, batch H keys D, batch H keys E, .. -> {_OUT}",
        "token by token",
        "chunks of the keys, state in float32",
        _NO_RECURRENCE,
        "kernels over chunks; decays from the data and the delta rule too",
        effects=_STATE,
        source="arXiv 2510.19338, 2405.17381, 2312.06635, 2405.21060, 2406.06484, 2412.06464, 2510.26692, 2404.05892, "
        "2503.14456, 2402.18668, 2405.04517",
    ),
    Kind(
        "joint",
        "one softmax over several branches",
        f"{_OUT}, .. -> {_OUT}",
        "outputs weighed by exp(lse - joint lse)",
        "as reference",
        "as reference; needs a device on which FlexAttention gives an LSE",
        "as reference",
    ),
    Kind(
        "mix",
        "the sum of branches, each times its gate",
        f"{_OUT}, .. -> {_OUT}",
        "sum",
        "as reference",
        "as reference",
        "as reference",
    ),
    Kind(
        "compact",
        "a program over the kept tokens of each head; other rows are 0",
        f"batch H keys, .. -> {_OUT}",
        "gather, run, scatter, one batch entry after the other",
        "as reference, what is inside on its own kernels",
    ),
)

KINDS: Mapping[str, Kind] = {kind.function: kind for kind in _ALL}


def kinds_table() -> str:
    """All kinds as two Markdown tables: what they are, and how each backend runs them.

    >>> print(kinds_table().splitlines()[2])
    | `input` | a tensor of the call, by name | → as declared |  |  |
    """
    what = ["| node | meaning | axes | effects | source |", "|---|---|---|---|---|"]
    how = ["| node | `reference` | `tiled` | `flex` | `triton` |", "|---|---|---|---|---|"]
    for kind in KINDS.values():
        shapes = kind.shapes.replace("->", "→")
        effects = "; ".join(f"{effect}, {when}" for effect, when in kind.effects)
        what.append(f"| `{kind.function}` | {kind.meaning} | {shapes} | {effects} | {kind.source} |")
        how.append(f"| `{kind.function}` | {kind.reference} | {kind.tiled} | {kind.flex} | {kind.triton} |")
    return "\n".join([*what, "", *how, ""])
