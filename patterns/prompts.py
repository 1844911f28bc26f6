"""Programs that choose for a prompt as a whole: blocks for blocks of queries, keys for all queries of a head, tokens of a head."""

from __future__ import annotations

from sparsedsl import program as sd
from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import b, h, kv_idx, kv_len, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.patterns.checked_arguments import check_choice, check_whole
from sparsedsl.patterns.local import causal, sliding_window
from sparsedsl.program.branches import Attend, Mix

__all__ = ["flexprefill", "h2o", "mosa", "seer_attention", "snapkv", "vsa", "xattention"]


def xattention(stride: int = 8, block: int = 128, mass: float = 0.9) -> Pattern | Attend:
    """Blocks that hold ``mass`` of the attention, as sums of logits along antidiagonals estimate it.

    The first block and a block's own are taken and counted, then the others by their mass, until the share is reached. For prefill, not for
    training.

    Args:
        stride: tokens in an antidiagonal; divides ``block``.
        block: tokens in a block, of queries and of keys.
        mass: share of the mass, above 0, at most 1.

    Source: XAttention (arXiv 2503.16428).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.xattention(stride=4, block=16))
    >>> q = k = v = torch.randn(1, 2, 128, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 128, 16])
    """
    block, stride = check_whole("xattention", "block", block, 1), check_whole("xattention", "stride", stride, 1)
    if block % stride:
        raise PatternError(f"xattention(): stride must divide block, which is {block}; got {stride}")
    forced = (kv_idx < block) | (q_idx // block == kv_idx // block)
    held = sd.antidiagonal(sd.q, sd.k, stride, block)
    return sd.attend(causal() & sd.top_p(held, mass, among=causal(), forced=forced, forced_in_mass=True))


def seer_attention(block: int = 64, least: float = 0.002) -> Pattern | Attend:
    """Blocks to which a learned gate gives at least ``least`` of its attention.

    ``softmax_c(gate_q_u . gate_k_c / sqrt(Dg)) >= least`` over the blocks ``c <= u``; nothing is forced, so that a row may be empty. The
    gate learns from a loss of its own.

    Args:
        block: tokens in a block, of queries and of keys.
        least: share of the gate's attention, from which on a block is seen.

    Call-time inputs: ``gate_q (B, Hkv, NB, Dg)``, ``gate_k (B, Hkv, NB, Dg)``, made of pooled q and k, ``NB`` the number of blocks.

    Source: SeerAttention (arXiv 2410.13276).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.seer_attention(block=16, least=0.1))
    >>> q, k, gate = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 4, 8)
    >>> attn(q, k, k, gate_q=gate, gate_k=gate).shape
    torch.Size([1, 4, 64, 16])
    """
    block = check_whole("seer_attention", "block", block, 1)
    queries, keys = (
        sd.input(f"gate_{x}", f"batch kv_heads {axis}/{block} gate_dim") for x, axis in (("q", "queries"), ("k", "keys"))
    )
    paid = sd.dot(queries, keys).softmax(causal())
    return sd.attend(causal() & sd.threshold(paid, least, among=causal()))


def flexprefill(block: int = 128, mass: float = 0.95, tau: float = 0.1) -> Pattern | Attend:
    """Two ways to choose blocks, of which each head takes one: by pooled queries and keys, or vertical lines and slashes.

    A head whose estimate from means is near to what its last ``block`` queries really pay, by less than ``tau`` in Jensen-Shannon distance,
    takes the greatest blocks of its pooled attention map until they hold ``mass`` of all rows together (rows that ask for little may get
    the first block and their own alone). The others take the columns of blocks, and the diagonals of blocks, that these queries pay most:
    as many as single keys, and distances, hold ``mass`` of it, ``n // block + 1``, the first of each among them. For prefill, not for
    training.

    Args:
        block: tokens in a block, of queries and of keys; and last queries that probe.
        mass: share of the attention, above 0, at most 1.
        tau: distance from which on a head takes lines and slashes; 0: all heads.

    Source: FlexPrefill (arXiv 2502.20766).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.flexprefill(block=16, mass=0.8))
    >>> q = k = v = torch.randn(1, 2, 128, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 128, 16])
    """
    block = check_whole("flexprefill", "block", block, 1)
    paid, slashes = sd.probe(sd.q, sd.k, rows=block, causal=True), sd.diagonals(sd.q, sd.k, rows=block)
    lines = sd.top_p(paid, mass, forced=kv_idx < 1, block=block) | sd.top_p(slashes, mass, forced=q_idx - kv_idx < 1, block=block)
    pooled = sd.dot(sd.summary(sd.q, block), sd.summary(sd.k, block))
    forced = (kv_idx < block) | (q_idx // block == kv_idx // block)
    aware = sd.top_p(pooled, mass, over="map", inclusive=False, among=causal(), forced=forced)
    near = sd.divergence(sd.probe(sd.q, sd.k, rows=block, pooled=block), paid) < tau
    return sd.attend(causal() & (near & aware | ~near & lines))


def vsa(cube: int = 64, top_k: int = 32) -> Mix:
    """Video sparse attention: attention from mean query to mean keys of cubes, and full attention to the ``top_k`` cubes it likes best.

    ``o_t = g_1 sum_c p_uc mean(v in c) + g_2 softmax over the keys of the top_k cubes``,
    ``p_u = softmax_c(mean q_u . mean k_c / sqrt(D))``, ``u`` the cube of the query. Not causal.
    Tokens lie cube by cube (:func:`grid_position` with ``order="tiled"``).

    Args:
        cube: tokens in a cube, 64 for 4 x 4 x 4.
        top_k: cubes that the queries of a cube see.

    Call-time input: ``gate (B, Hq, Sq, 2)``, the weights of both; published: a learned one, and 1.

    Source: VSA (arXiv 2505.13389).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.vsa(cube=8, top_k=2))
    >>> q = k = v = torch.randn(1, 2, 64, 16)
    >>> attn(q, k, v, gate=torch.rand(1, 2, 64, 2)).shape
    torch.Size([1, 2, 64, 16])
    """
    cube, top_k = check_whole("vsa", "cube", cube, 1), check_whole("vsa", "top_k", top_k, 1)
    queries, keys, values = (sd.summary(x, cube) for x in (sd.q, sd.k, sd.v))
    pooled = sd.dot(queries, keys)
    coarse = sd.attend(True, score=pooled[b, h, q_idx // cube, kv_idx], k=keys, v=values)
    return sd.mix(coarse, sd.attend(sd.top_k(pooled, top_k)), weights=sd.input("gate", "batch heads queries 2"))


def snapkv(capacity: int = 1024, window: int = 32, pool: int = 5, *, how: str = "mean") -> Pattern | Attend:
    """The keys of a prompt that stay: its last ``window``, and those before that these look at most, ``capacity`` in all.

    ``vote_j`` is what the last ``window`` queries pay key ``j``, joined with its neighbours. Published, the prompt itself attends to all
    its keys, and only what follows to those that stay: ``attn.choices(q, k, v)["kept"]`` says which these are, and :func:`retained` attends
    to them. Called as it is, the program says what the prompt would see of them.

    Args:
        capacity: keys that stay, those of the window included.
        window: last queries, which vote; their keys stay.
        pool: neighbours that votes are joined over; odd.
        how: ``"mean"`` of the neighbours, zeros beyond the ends included, or their ``"max"``.

    Source: SnapKV (arXiv 2404.14469).

    >>> import torch
    >>> import sparsedsl as sd
    >>> q, k, v = torch.randn(1, 2, 67, 16), torch.randn(1, 2, 67, 16), torch.randn(1, 2, 67, 16)
    >>> prompt = sd.compile(sd.patterns.snapkv(capacity=16, window=6), allow=["selection reads later queries"])
    >>> stays = prompt.choices(*(x[:, :, :64] for x in (q, k, v)))["kept"]
    >>> stays.sum(-1)  # beside the window
    tensor([[10, 10]])
    >>> sd.compile(sd.patterns.retained(64, recent=6))(q[:, :, 64:], k, v, q_offset=64, stays=stays).shape
    torch.Size([1, 2, 3, 16])
    """
    window = check_whole("snapkv", "window", window, 1)
    capacity = check_whole("snapkv", "capacity", capacity, window + 1, "the window stays, and one key before it")
    pool, how = check_whole("snapkv", "pool", pool, 1), check_choice("snapkv", "how", how, ("mean", "max"))
    votes = sd.smooth(sd.probe(sd.q, sd.k, rows=window, causal=True, keep="before"), pool, how)
    last = kv_idx >= kv_len - window
    return sd.attend(causal() & (sd.top_k(votes, capacity - window, among=~last, name="kept") | last))


def h2o(heavy: int = 128, recent: int = 128, probe: int = 1 << 20) -> Pattern | Attend:
    """Heavy hitters: the last ``recent`` keys, and the ``heavy`` ones to which all queries together pay most.

    This is the ranking by a whole prompt (it reads later queries): what a cache holds once the prompt is over. ``attn.choices(q, k,
    v)["kept"]`` says it, and :func:`retained` attends to it. The policy that drops a key after every token is none of this language: what
    it adds up depends on what it dropped before.

    Args:
        heavy: keys beside the recent ones, one set a head.
        recent: last keys a query sees, its own included.
        probe: last queries whose attention is added up, fewer if the prompt has fewer.

    Source: H2O (arXiv 2306.14048).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.h2o(heavy=4, recent=8), allow=["selection reads later queries"])
    >>> q = k = v = torch.randn(1, 2, 64, 16)
    >>> attn(q, k, v).shape, attn.choices(q, k, v)["kept"].sum(-1)
    (torch.Size([1, 2, 64, 16]), tensor([[4, 4]]))
    """
    heavy, recent = check_whole("h2o", "heavy", heavy, 1), check_whole("h2o", "recent", recent, 1)
    paid = sd.probe(sd.q, sd.k, rows=check_whole("h2o", "probe", probe, 1), causal=True)
    return sd.attend(causal() & (sd.top_k(paid, heavy, name="kept") | sliding_window(recent)))


def mosa(count: int = 64) -> Mix:
    """Mixture of sparse attention: every head takes the ``count`` tokens that its router likes best, and attends causally among them.

    The result of a token is multiplied by its router's number, which learns by this alone; rows of tokens that a head did not take are 0.
    A token is chosen by comparing it with all others, later ones too: that it is meant is to be said where such a model is trained, and
    what a prompt gives is not what its pieces give.

    Args:
        count: tokens a head takes.

    Call-time inputs: ``router (B, Hq, Skv)``, at least 0, as sigmoids; ``weights (B, Hq, Sq, 1)``, the same numbers.

    Source: MoSA (arXiv 2505.00315).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.mosa(count=8), allow=["selection reads later queries"])  # to train it
    >>> q = k = v = torch.randn(1, 2, 64, 16)
    >>> router = torch.rand(1, 2, 64)
    >>> int(attn(q, k, v, router=router, weights=router[..., None])[0, 0].any(-1).sum())
    8
    """
    taken = sd.keep_tokens(
        sd.given_key_scores(sd.input("router", "batch heads keys")), tail=1.0, least=check_whole("mosa", "count", count, 2)
    )
    return sd.mix(sd.compact(taken, causal()), weights=sd.input("weights", "batch heads queries 1"))
