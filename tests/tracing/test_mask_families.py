"""The mask families of the public example collections, written as FlexAttention users write them, value by value."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from sparsedsl.lang.text import parse
from sparsedsl.tracing import trace_mask

LENGTHS = torch.tensor([3, 5, 1, 4, 4])
OFFSETS = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
DOCUMENT = torch.repeat_interleave(torch.arange(5), LENGTHS)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding(window):
    def mask(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    return mask


def dilated(window, step):
    def mask(b, h, q_idx, kv_idx):
        distance = (q_idx - kv_idx).abs()
        return torch.logical_and(distance % step == 0, distance // step <= window)

    return mask


def prefix_lm(lengths):
    def mask(b, h, q_idx, kv_idx):
        return or_masks(causal, lambda b, h, q, kv: kv < lengths[b])(b, h, q_idx, kv_idx)

    return mask


def within_documents(inner):
    """Each document sees ``inner`` with positions counted from its own start."""

    def mask(b, h, q_idx, kv_idx):
        same = DOCUMENT[q_idx] == DOCUMENT[kv_idx]
        return same & inner(b, h, q_idx - OFFSETS[DOCUMENT[q_idx]], kv_idx - OFFSETS[DOCUMENT[kv_idx]])

    return mask


def shared_prefix(prefix, branch):
    """One prompt, several answers packed behind it: an answer sees the prompt and itself."""

    def mask(b, h, q_idx, kv_idx):
        answer = torch.div(q_idx - prefix, branch, rounding_mode="floor")
        same = answer == torch.div(kv_idx - prefix, branch, rounding_mode="floor")
        return (q_idx >= kv_idx) & ((kv_idx < prefix) | ((q_idx >= prefix) & same))

    return mask


def block_diffusion(length, block):
    """Noisy half, then clean half: own block in the noisy half, earlier clean blocks, block-causal in the clean half."""

    def mask(b, h, q_idx, kv_idx):
        q_clean, kv_clean = q_idx >= length, kv_idx >= length
        q_block = torch.where(q_clean, (q_idx - length) // block, q_idx // block)
        kv_block = torch.where(kv_clean, (kv_idx - length) // block, kv_idx // block)
        diagonal = (q_block == kv_block) & (q_clean == kv_clean)
        look_back = (q_block > kv_block) & kv_clean & ~q_clean
        clean_causal = (q_block >= kv_block) & kv_clean & q_clean
        return diagonal | look_back | clean_causal

    return mask


def neighbourhood(width, radius):
    def mask(b, h, q_idx, kv_idx):
        q_x, q_y, kv_x, kv_y = q_idx % width, q_idx // width, kv_idx % width, kv_idx // width
        return ((q_x - kv_x).abs() <= radius) & (torch.abs(q_y - kv_y) <= radius)

    return mask


def clamped_neighbourhood(width, height, radius):
    """Windows are moved inside at the edges, as NATTEN does."""

    def mask(b, h, q_idx, kv_idx):
        centre_x = (q_idx % width).clamp(radius, width - 1 - radius)
        centre_y = (q_idx // width).clamp(min=radius, max=height - 1 - radius)
        return ((kv_idx % width - centre_x).abs() <= radius) & ((kv_idx // width - centre_y).abs() <= radius)

    return mask


def tiled_neighbourhood(width, tile, radius):
    """Tokens are ordered tile by tile."""

    def place(i):
        t, inside = i // (tile * tile), i % (tile * tile)
        tiles = width // tile
        return (t % tiles) * tile + inside % tile, (t // tiles) * tile + inside // tile

    def mask(b, h, q_idx, kv_idx):
        (q_x, q_y), (kv_x, kv_y) = place(q_idx), place(kv_idx)
        return (torch.abs(q_x - kv_x) <= radius) & (torch.abs(q_y - kv_y) <= radius)

    return mask


def compacted(x):
    """Every second bit of ``x``, from the lowest."""
    x = x & 0x55555555
    for shift, keep in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        x = (x | (x >> shift)) & keep
    return x


def repeat_kv(x):
    """The bits of ``x`` with a zero behind each."""
    x = x & 0xFFFF
    for shift, keep in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        x = (x | (x << shift)) & keep
    return x


def morton_neighbourhood(radius):
    """Tokens of an image in Z order."""

    def mask(b, h, q_idx, kv_idx):
        near_x = (compacted(q_idx) - compacted(kv_idx)).abs() <= radius
        near_y = (compacted(q_idx >> 1) - compacted(kv_idx >> 1)).abs() <= radius
        return near_x & near_y

    return mask


def morton_order(width):
    """Row-major tokens; a query sees what comes before it in Z order."""

    def code(i):
        return repeat_kv(i % width) | (repeat_kv(i // width) << 1)

    return lambda b, h, q, kv: code(q) >= code(kv)


def sliding_tiles(canvas, tile, window):
    """Video tokens in tiles of (t, y, x); a query's tile sees a window of tiles, moved inside at the edges."""
    tiles = [c // t for c, t in zip(canvas, tile, strict=True)]
    size = tile[0] * tile[1] * tile[2]

    def coordinates(i):
        t = i // size
        return t // (tiles[1] * tiles[2]), t % (tiles[1] * tiles[2]) // tiles[2], t % tiles[2]

    def mask(b, h, q_idx, kv_idx):
        allowed = torch.ones_like(q_idx, dtype=torch.bool)
        for q, kv, n, w in zip(coordinates(q_idx), coordinates(kv_idx), tiles, window, strict=True):
            centre = torch.clamp(q, w // 2, (n - 1) - w // 2)
            allowed = allowed & (torch.abs(centre - kv) <= w // 2)
        return allowed

    return mask


def global_tokens(flags):
    return lambda b, h, q, kv: (q - kv).abs().le(2) | flags[q] | flags[kv]


def blocks(table, block):
    return lambda b, h, q, kv: table[b, h, q // block, kv // block]


def per_head_window(windows):
    return lambda b, h, q, kv: (q >= kv) & (q - kv < windows[h])


GRAPH = torch.rand(17, 17, generator=torch.Generator().manual_seed(1)).add(torch.eye(17)) > 0.6
BLOCKS = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(2)) > 0.5
DISTANCE = (torch.arange(17)[:, None] * 7 % 5 - torch.arange(17) % 4).abs().to(torch.int32)

FAMILIES = {
    "causal": causal,
    "noop": noop_mask,
    "sliding": sliding(4),
    "sliding by and_masks": and_masks(causal, lambda b, h, q, kv: q - kv <= 3),
    "dilated": dilated(3, 2),
    "prefix": prefix_lm(torch.tensor([2, 6])),
    "documents": lambda b, h, q, kv: DOCUMENT[q] == DOCUMENT[kv],
    "documents, causal": and_masks(causal, lambda b, h, q, kv: DOCUMENT[q].eq(DOCUMENT[kv])),
    "documents through offsets": within_documents(sliding(2)),
    "shared prefix": shared_prefix(5, 4),
    "block diffusion": block_diffusion(8, 3),
    "neighbourhood": neighbourhood(5, 1),
    "neighbourhood, clamped": clamped_neighbourhood(4, 5, 1),
    "neighbourhood, tiled": tiled_neighbourhood(4, 2, 1),
    "neighbourhood, Morton": morton_neighbourhood(1),
    "Morton order": morton_order(4),
    "sliding tiles": sliding_tiles((2, 4, 6), (1, 2, 2), (1, 1, 3)),
    "checkerboard": lambda b, h, q, kv: (q + kv) % 2 == 0,
    "transposed causal": lambda b, h, q, kv: q <= kv,
    "global tokens": global_tokens(torch.arange(17) % 6 == 0),
    "random blocks": blocks(BLOCKS, 4),
    "per-head windows": per_head_window(torch.tensor([1, 4, 9])),
    "batch and head": lambda b, h, q, kv: torch.where((b + h) % 2 == 0, q >= kv, kv >= q),
    "graph": lambda b, h, q, kv: GRAPH[q, kv],
    "graph distance": lambda b, h, q, kv: DISTANCE[q, kv] <= 2,
    "padding": (lambda lengths: lambda b, h, q, kv: (kv < lengths[b]) & (q < lengths[b]))(torch.tensor([9, 14])),
    "strided": lambda b, h, q, kv: ((q - kv) % 4 == 0) & (kv <= q),
    "circle": lambda b, h, q, kv: torch.sqrt(((q % 4 - kv % 4) ** 2 + (q // 4 - kv // 4) ** 2).float()) <= 2.0**0.5,
    "LSH buckets": (lambda hashes: lambda b, h, q, kv: (hashes[q] ^ hashes[kv]) < 4)(torch.arange(17) * 5 % 13),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, same_mask):
    same_mask(FAMILIES[name])


@pytest.mark.parametrize(
    "name", ["causal", "dilated", "shared prefix", "Morton order", "sliding tiles", "neighbourhood, clamped"]
)
def test_rectangles_and_offsets(name, same_mask):
    same_mask(FAMILIES[name], shape=(1, 1, 33, 7))
    same_mask(FAMILIES[name], shape=(1, 2, 3, 40), q_offset=29)


def test_large_positions_are_exact(same_mask):
    """Bit operations and divisions at positions beyond 2**24, where float32 would round."""
    same_mask(lambda b, h, q, kv: (compacted(q) - kv) % 3 == 0, shape=(1, 1, 9, 5), q_offset=(1 << 30) - 3)
    same_mask(lambda b, h, q, kv: (q // 7 - kv) % 5 < 2.5, shape=(1, 1, 9, 5), q_offset=(1 << 30) - 3)


@pytest.mark.parametrize(
    "mask_mod, text",
    [
        (sliding(512), "(q_idx >= kv_idx) & (q_idx - kv_idx <= 511)"),
        (noop_mask, "True"),
        (lambda b, h, q, kv: (q - kv).float() < 2.5, "q_idx - kv_idx <= 2"),
        (lambda b, h, q, kv: q - kv <= 128 / 2, "q_idx - kv_idx <= 64"),
        (lambda b, h, q, kv: (q - kv) / 1 <= 7, "f32_le(f32_div(q_idx - kv_idx, 1), 7) != 0"),
        (lambda b, h, q, kv: ((q >= kv) * (kv < 4)).int() == 1, "(q_idx >= kv_idx) & (kv_idx <= 3)"),
        (lambda b, h, q, kv: compacted(q & 0xF) == kv, "q_idx % 2 + 2 * (q_idx // 4 % 2) == kv_idx"),
        (lambda b, h, q, kv: (q >> 3 << 3) == kv & ~7, "q_idx // 8 == kv_idx // 8"),
    ],
)
def test_forms_that_analysis_can_use(mask_mod, text):
    """What matters is not only the value: a mask comes out as one would write it in the language."""
    assert trace_mask(mask_mod).same_as(parse(text)), trace_mask(mask_mod)
