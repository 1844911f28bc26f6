"""Programs over pages: what each request gets by itself, by the pages it attends to and summaries of the others, none of them stale."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

Tensor = torch.Tensor
EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}
CAUSAL = kv_idx <= q_idx
CHOSEN = {
    "moba": sd.patterns.moba(16, 3),
    "quest": sd.attend(CAUSAL & sd.top_k(sd.bound(sd.q, sd.k, 8), 4)),
    "window and choice": CAUSAL & ((q_idx - kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16, pad="zero")), 2)),
    "windows of keys": sd.patterns.infllm_v2(length=8, stride=4, select=8, top_k=3, local=1),
    "both ways": (abs(q_idx - kv_idx) < 5) | (sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8, "last")), 2) & CAUSAL),
}
PROGRAMS = {
    **CHOSEN,
    "nsa": sd.patterns.nsa(block=8, select=16, top_k=4, window=16),
    "means of means": CAUSAL & ((q_idx - kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.summary(sd.k, 4, "max"), 4)), 2)),
    "by request": CAUSAL & ((kv_idx % 5 == sd.b) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2)),
    "mass": CAUSAL & sd.top_p(sd.dot(sd.q, sd.summary(sd.k, 8)), 0.6, among=CAUSAL, forced=q_idx // 8 == kv_idx // 8),
}


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(name: str, rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {"gate": numbers(1, 4, rows, 3, seed=seed).sigmoid()} if name == "nsa" else {}


@dataclass
class Server:
    """Pools, what is kept of them, and the sequences of requests, whose keys it writes into their pages."""

    name: str
    backend: str
    page: int
    pages: int = 80
    attn: Any = field(init=False)
    reference: Any = field(init=False)

    def __post_init__(self) -> None:
        program = PROGRAMS[self.name]
        self.attn, self.reference = sd.compile(program, backend=self.backend), sd.compile(program, backend="reference")
        nan = float("nan")
        self.pools = [torch.full((self.pages, self.page, 2, dim), nan, dtype=torch.float64) for dim in (8, 12)]
        self.kept = self.attn.page_summaries(*self.pools)

    def write(self, table: Tensor, start: int, end: int, keys: tuple[Tensor, Tensor], *, tell: bool = True) -> None:
        """Put rows of ``keys (N, 2, D)`` where they belong."""
        at = torch.arange(start, end)
        slots = table[at // self.page] * self.page + at % self.page
        for pool, x in zip(self.pools, keys, strict=True):
            pool.view(-1, *pool.shape[2:])[slots] = x[start:end]
        if tell:
            self.kept.mark_written(slots)

    def step(self, q: Tensor, tables: list[Tensor], starts: list[int], ends: list[int], seed: int = 0) -> Tensor:
        """New tokens of requests."""
        lens = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
        cu = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
        width = max(len(table) for table in tables)
        table = torch.stack([torch.nn.functional.pad(table, (0, width - len(table)), value=2**30) for table in tables])
        more = inputs_of(self.name, int(cu[-1]), seed)
        return self.attn.paged(q, *self.pools, table, torch.tensor(ends), cu, torch.tensor(starts), summaries=self.kept, **more)

    def wanted(self, q: Tensor, keys: list[tuple[Tensor, Tensor]], starts: list[int], ends: list[int], seed: int = 0) -> Tensor:
        """The same, each request in an ordinary call of the dense meaning, among as many batch entries as make it the one it is."""
        found, begin = [], 0
        more = inputs_of(self.name, q.shape[0], seed)
        for n, ((k, v), start, end) in enumerate(zip(keys, starts, ends, strict=True)):
            rows = slice(begin, begin + end - start)
            begin = rows.stop
            own = {name: x[:, :, rows] for name, x in more.items()}
            parts = (x.transpose(0, 1)[None].expand(n + 1, -1, -1, -1) for x in (q[rows], k[:end], v[:end]))
            found.append(self.reference(*parts, q_offset=start, **own)[n].transpose(0, 1))
        return torch.cat(found)


def sequence(tokens: int, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return numbers(tokens, 4, 8, seed=seed), (numbers(tokens, 2, 8, seed=seed + 1), numbers(tokens, 2, 12, seed=seed + 2))


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize(("name", "page"), [(name, page) for n, name in enumerate(PROGRAMS) for page in [(4, 7), (8, 16)][n % 2]])
def test_steps_are_those_of_ordinary_calls(name: str, page: int, backend: str) -> None:
    server, (q, keys) = Server(name, backend, page), sequence(120, seed=3)
    table = torch.randperm(80, generator=torch.Generator().manual_seed(1))[: -(-120 // page)]
    start = 0
    for end in [33, 34, 40, 64, 100, 101, 102, 120]:
        server.write(table, start, end, keys)
        found = server.step(q[start:end], [table], [start], [end])
        torch.testing.assert_close(found, server.wanted(q[start:end], [keys], [start], [end]), **EXACT)
        start = end
    assert server.kept.nbytes > 0


def pages_that_count(server: Server, q: Tensor, keys: tuple[Tensor, Tensor], start: int, end: int) -> Tensor:
    """Flags of the pages that hold a key that is attended to: its value has a gradient."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q[start:end], keys[0][:end], keys[1][:end]))
    v = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(server.reference(q, k, v, q_offset=start).square().sum(), [v])
    counts = grad[0].abs().sum((0, 2)) > 0
    return torch.nn.functional.pad(counts, (0, -end % server.page)).view(-1, server.page).any(1)


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize(("name", "page"), [(name, page) for n, name in enumerate(CHOSEN) for page in [(8,), (16, 4)][n % 2]])
def test_a_step_reads_the_pages_that_it_attends_to_and_no_others(name: str, page: int, backend: str) -> None:
    """All other pages hold NaN once they were summed up; but for the block that is not over, which is summed up anew."""
    server, (q, keys) = Server(name, backend, page), sequence(150, seed=5)
    table = torch.randperm(80, generator=torch.Generator().manual_seed(2))[: -(-150 // page)]
    server.write(table, 0, 149, keys)
    server.step(q[:149], [table], [0], [149])
    server.write(table, 149, 150, keys)
    counts = pages_that_count(server, q, keys, 149, 150)
    assert int(counts.sum()) < len(counts) - 2
    unfinished = torch.arange(len(counts)) >= 144 // page  # (of 16 tokens at most)
    for pool, gone in zip(server.pools, (~(counts | unfinished), ~counts), strict=True):
        pool.numpy()[table[gone].numpy()] = float("nan")  # (torch does not see it)
    found = server.step(q[149:], [table], [149], [150])
    torch.testing.assert_close(found, server.wanted(q[149:], [keys], [149], [150]), **EXACT)
    of_keys, of_values = server.kept.pages_read
    assert of_values == int(counts.sum()) and of_values <= of_keys <= int((counts | unfinished).sum())


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
def test_values_that_are_not_chosen_are_not_read_without_summaries_either(backend: str) -> None:
    server, (q, keys) = Server("quest", backend, 8), sequence(150, seed=5)
    table = torch.arange(19)
    server.write(table, 0, 150, keys)
    counts = pages_that_count(server, q, keys, 149, 150)
    server.pools[1][:19][~counts] = float("nan")
    words = (table[None], torch.tensor([150]), torch.tensor([0, 1]))
    found = server.attn.paged(q[149:], *server.pools, *words)
    torch.testing.assert_close(found, server.wanted(q[149:], [keys], [149], [150]), **EXACT)


# ---- pages that are written again ----------------------------------------------------------------------------------------------------


def test_a_page_that_is_written_and_not_told_of_is_an_error() -> None:
    server, (q, keys) = Server("moba", "tiled", 16), sequence(100, seed=7)
    other, table = sequence(100, seed=8)[1], torch.arange(10, 17)
    server.write(table, 0, 100, keys)
    server.step(q, [table], [0], [100])
    server.write(table, 16, 32, other, tell=False)
    with pytest.raises(sd.ShapeError, match=re.escape("was written since mark_written() was called last")):
        server.step(q[99:], [table], [99], [100])
    mixed = tuple(torch.cat([x[:16], y[16:32], x[32:]]) for x, y in zip(keys, other, strict=True))
    server.kept.mark_written(pages=table[1:2])
    torch.testing.assert_close(server.step(q[99:], [table], [99], [100]), server.wanted(q[99:], [mixed], [99], [100]), **EXACT)
    server.write(table, 32, 48, other, tell=False)
    server.kept.reset()
    mixed = tuple(torch.cat([x[:32], y[32:48], x[48:]]) for x, y in zip(mixed, other, strict=True))
    torch.testing.assert_close(server.step(q[99:], [table], [99], [100]), server.wanted(q[99:], [mixed], [99], [100]), **EXACT)


def test_new_tokens_are_summed_up_anew_where_torch_does_not_see_who_writes() -> None:
    """A page goes to another request, whose keys a kernel writes: they come as new tokens of that request."""
    server, (q, keys) = Server("moba", "cpp", 16), sequence(100, seed=7)
    own, table = sequence(70, seed=11), torch.arange(10, 17)
    server.write(table, 0, 100, keys)
    server.step(q, [table], [0], [100])
    for pool, x in zip(server.pools, own[1], strict=True):
        pool.numpy()[10:14] = x[:64].view(4, 16, *x.shape[1:]).numpy()
        pool.numpy()[14, :6] = x[64:].numpy()
    for start, end in ((0, 70), (69, 70)):
        found = server.step(own[0][start:end], [table], [start], [end])
        torch.testing.assert_close(found, server.wanted(own[0][start:end], [own[1]], [start], [end]), **EXACT)


@pytest.mark.parametrize("page", [4, 6, 8])
def test_requests_that_share_pages_share_summaries(page: int) -> None:
    server, (q, keys) = Server("moba", "tiled", page), sequence(96, seed=7)
    first = torch.arange(20, 20 + 96 // page)
    server.write(first, 0, 96, keys)
    server.step(q, [first], [0], [96])
    # A second one with the same first 48 tokens, and a third that begins three pages later: of pages of 6 tokens it has blocks in the same
    # pages as the first one, at other places in them.
    own = sequence(96, seed=12)
    forked = tuple(torch.cat([x[:48], y[48:]]) for x, y in zip(keys, own[1], strict=True))
    second = torch.cat([first[: 48 // page], torch.arange(50, 50 + 48 // page)])
    server.write(second, 48, 96, forked)
    turned = tuple(torch.cat([x[3 * page :], x[: 3 * page]]) for x in keys)
    third = torch.cat([first[3:], first[:3]])
    starts, ends, tables = [95, 48, 95], [96, 96, 96], [first, second, third]
    queries = torch.cat([q[95:], own[0][48:], q[95:]])
    for _ in range(2):
        found = server.step(queries, tables, starts, ends)
        torch.testing.assert_close(found, server.wanted(queries, [keys, forked, turned], starts, ends), **EXACT)
    server.step(q[95:], [first], [95], [96])
    assert server.kept.pages_read[0] == server.kept.pages_read[1]  # no key is read for a summary


def test_a_page_twice_in_a_table() -> None:
    server, (q, _) = Server("moba", "tiled", 8), sequence(64, seed=7)
    block = sequence(16, seed=20)[1]
    keys = tuple(torch.cat([x[:8], x[:8], x[8:], x[:8], x[:8], x[8:], x[8:], x[8:]]) for x in block)
    table = torch.tensor([4, 4, 9, 4, 4, 9, 9, 9])
    server.write(table, 0, 64, keys)
    for start in (0, 63, 63):
        found = server.step(q[start:], [table], [start], [64])
        torch.testing.assert_close(found, server.wanted(q[start:], [keys], [start], [64]), **EXACT)


def test_quantised_pools_and_scales_that_change() -> None:
    attn = sd.compile(PROGRAMS["quest"], backend="tiled")
    q, floats = numbers(1, 4, 8, seed=1).float(), [numbers(12, 8, 2, 8, seed=n).float() for n in (2, 3)]
    scales = [pool.abs().amax((1, 2, 3)) / 127 for pool in floats]
    small = [(pool / scale[:, None, None, None]).round().to(torch.int8) for pool, scale in zip(floats, scales, strict=True)]
    kept = attn.page_summaries(*small)
    words = (torch.arange(12)[None], torch.tensor([96]), torch.tensor([0, 1]))
    for factor in (1.0, 3.0):
        scales[0][4:6] *= factor
        exact = [pool.float() * scale[:, None, None, None] for pool, scale in zip(small, scales, strict=True)]
        for _ in range(2):
            found = attn.paged(q, *small, *words, k_scale=scales[0], v_scale=scales[1], summaries=kept)
            torch.testing.assert_close(found, attn.paged(q, *exact, *words))
    assert kept.pages_read[0] <= kept.pages_read[1] + 1 < 12  # (the last block is of the new token)


# ---- inputs in pages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("page", [4, 8, 16])
@pytest.mark.parametrize("backend", ["tiled", "cpp"])
def test_landmarks_lie_in_pages_beside_the_keys(page: int, backend: str, layout: str) -> None:
    program = sd.patterns.hsa(chunk=8, top_k=2)
    attn, reference = (sd.compile(program, backend=which) for which in (backend, "reference"))
    lens, each = [61, 9, 40], 64 // page
    table = torch.randperm(50, generator=torch.Generator().manual_seed(4))[: 3 * each].view(3, each)
    pools = [torch.full((50, page, 2, dim), float("nan"), dtype=torch.float64) for dim in (8, 12)]
    marks = torch.full((50, max(page // 8, 1), 2, 6), float("nan"), dtype=torch.float64)
    q, rq = numbers(3, 4, 8, seed=0), numbers(1, 2, 3, 6, seed=1)
    want = []
    for n, length in enumerate(lens):
        _, (k, v) = sequence(64, seed=30 + n)
        own = numbers(8, 2, 6, seed=40 + n)
        for number, place in enumerate(table[n].tolist()):
            for pool, x in zip(pools, (k, v), strict=True):
                pool[place] = x[number * page : (number + 1) * page]
            if page >= 8:
                marks[place] = own[number * page // 8 : (number + 1) * page // 8]
            elif (number + 1) * page % 8 == 0:
                marks[place, 0] = own[number * page // 8]
        parts = (x.transpose(0, 1)[None] for x in (q[n : n + 1], k[:length], v[:length]))
        more = {"retrieval_q": rq[:, :, n : n + 1], "landmarks": own[: length // 8].transpose(0, 1)[None]}
        want.append(reference(*parts, q_offset=length - 1, **more)[0].transpose(0, 1))
    given = [*pools, marks] if layout == "nhd" else [x.transpose(1, 2).contiguous() for x in (*pools, marks)]
    words = {"retrieval_q": rq, "landmarks": given[2], "pool_layout": layout}
    found = attn.paged(q, *given[:2], table, torch.tensor(lens), torch.arange(4), **words)
    torch.testing.assert_close(found, torch.cat(want), **EXACT)
    with pytest.raises(
        sd.ShapeError, match=r"'landmarks' has rows for keys, which lie in pages: it must be a pool of its own, \(50, "
    ):
        attn.paged(q, *given[:2], table, torch.tensor(lens), torch.arange(4), **{**words, "landmarks": given[2][:40]})


def test_rows_for_every_key_lie_in_pages() -> None:
    program = sd.patterns.nha(slots=3, window=8)
    attn, reference = (sd.compile(program, backend=which) for which in ("tiled", "reference"))
    (q, (k, v)), gate = sequence(40, seed=1), numbers(40, 2, 3, seed=9)
    pools = [x.reshape(5, 8, *x.shape[1:])[torch.tensor([4, 2, 0, 1, 3])] for x in (k, v, gate)]
    found = attn.paged(
        q[38:], *pools[:2], torch.tensor([[2, 3, 1, 4, 0]]), torch.tensor([40]), torch.tensor([0, 2]), gate=pools[2]
    )
    parts = (x.transpose(0, 1)[None] for x in (q[38:], k, v))
    torch.testing.assert_close(found, reference(*parts, q_offset=38, gate=gate.transpose(0, 1)[None])[0].transpose(0, 1), **EXACT)
    odd = sd.attend(CAUSAL, k=sd.summary(sd.input("other", "batch kv_heads keys/12 head_dim"), 1), v=sd.summary(sd.v, 12))
    with pytest.raises(sd.UnsupportedError, match="keys lie in pages of 8: its rows have a place there if one is a multiple"):
        sd.compile(odd).paged(q[38:], *pools[:2], torch.arange(5)[None], torch.tensor([40]), torch.tensor([0, 2]), other=pools[0])


# ---- a server --------------------------------------------------------------------------------------------------------------------------


def assert_served(seed: int) -> None:
    """Requests come, grow, share first pages, and go; freed pages hold NaN until somebody writes them."""
    rng = random.Random(seed)
    server = Server(rng.choice(list(PROGRAMS)), rng.choice(["tiled", "cpp"]), rng.choice([3, 4, 8, 16]))
    free, users = list(range(server.pages)), [0] * server.pages
    rng.shuffle(free)
    live: list[dict[str, Any]] = []
    for number in range(rng.randint(4, 9)):
        if len(live) < 3 and len(free) * server.page > 150:
            q, keys = sequence(90, seed=seed * 100 + number)
            request = {"q": q, "keys": keys, "pages": [], "length": 0}
            if live and rng.random() < 0.5:  # begins as another one does
                other = rng.choice(live)
                shared = rng.randint(0, other["length"] // server.page)
                tokens = shared * server.page
                request["keys"] = tuple(torch.cat([x[:tokens], y[tokens:]]) for x, y in zip(other["keys"], keys, strict=True))
                request |= {"pages": other["pages"][:shared], "length": tokens}
                for place in request["pages"]:
                    users[place] += 1
            live.append(request)
        starts, ends, tables = [], [], []
        for request in live:
            start = request["length"]
            end = min(90, start + rng.choice([1, 1, 1, 2, 5, 17, 33]))
            while len(request["pages"]) * server.page < end:
                place = free.pop()
                users[place] += 1
                request["pages"].append(place)
            table = torch.tensor(request["pages"])
            server.write(table, start, end, request["keys"])
            request["length"] = end
            starts, ends, tables = [*starts, start], [*ends, end], [*tables, table]
        q = torch.cat([r["q"][start:end] for r, start, end in zip(live, starts, ends, strict=True)])
        found = server.step(q, tables, starts, ends, seed=number)
        want = server.wanted(q, [request["keys"] for request in live], starts, ends, seed=number)
        torch.testing.assert_close(found, want, **EXACT, msg=lambda text, n=number: f"seed {seed}, step {n}: {text}")
        gone = [r for r in live if r["length"] == 90 or rng.random() < 0.2]
        live = [r for r in live if not any(r is other for other in gone)]
        for request in gone:
            for place in request["pages"]:
                users[place] -= 1
                if not users[place]:
                    free.insert(rng.randint(0, len(free)), place)
                    server.pools[0][place] = server.pools[1][place] = float("nan")
            server.kept.mark_written(pages=torch.tensor(request["pages"]))


@pytest.mark.parametrize("seed", range(8))
def test_a_server(seed: int) -> None:
    assert_served(seed)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(10))
def test_two_thousand_servers(part: int) -> None:
    for seed in range(1000 + 200 * part, 1200 + 200 * part):
        assert_served(seed)


# ---- refusals --------------------------------------------------------------------------------------------------------------------------


def test_mix_ups_say_what_they_are() -> None:
    server, (q, keys) = Server("moba", "tiled", 16), sequence(40, seed=1)
    table = torch.arange(3)
    server.write(table, 0, 40, keys)
    server.step(q, [table], [0], [40])
    words = (table[None], torch.tensor([40]), torch.tensor([0, 1]))
    quest = sd.compile(PROGRAMS["quest"], backend="tiled")
    for attn, summaries in ((quest, server.kept), (server.attn, 3), (server.attn, server.attn.keep_summaries())):
        with pytest.raises(sd.ShapeError, match=re.escape("summaries must be what page_summaries() of this program made; got ")):
            attn.paged(q[39:], *server.pools, *words, summaries=summaries)
    with pytest.raises(sd.ShapeError, match=re.escape("were made for another k_pool, (80, 16, 2, 8)")):
        server.attn.paged(q[39:], server.pools[0].clone(), server.pools[1], *words, summaries=server.kept)
    with pytest.raises(sd.UnsupportedError, match="makes no summaries or bounds of keys"):
        sd.compile(sd.patterns.sliding_window(4)).page_summaries(*server.pools)
    with pytest.raises(sd.ShapeError, match="v_pool must have the same pages"):
        server.attn.page_summaries(server.pools[0], server.pools[1][:4])
    with pytest.raises(sd.ShapeError, match=re.escape("mark_written() wants slots=")):
        server.kept.mark_written()
    with pytest.raises(sd.ShapeError, match="slots must be a tensor of int32 or int64; got"):
        server.kept.mark_written([3])  # type: ignore[arg-type]
    with pytest.raises(sd.ShapeError, match="slots go up to 1279 in pools of 80 pages; got 1280"):
        server.kept.mark_written(torch.tensor([1280, -1]))
    out = sd.compile(PROGRAMS["moba"], backend="reference").paged(q[39:], *server.pools, *words, summaries=server.kept)
    torch.testing.assert_close(out, server.wanted(q[39:], [keys], [39], [40]), **EXACT)
