"""Results kept as long as the tables they were made of live unchanged, and never more bytes of them than the bound."""

from __future__ import annotations

import functools
import gc
import random
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.analysis.caches import Cache, cache_bytes, clear_caches, held_bytes
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.triton.prepared import prepare


class Counter:
    """Makes a new number each time."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return self.made


def test_a_result_is_made_once_for_a_key_and_its_tables():
    known, make, table = Cache(), Counter(), torch.zeros(3)
    assert [known.get("a", [table], make) for _ in range(3)] == [1, 1, 1]
    assert known.get("b", [table], make) == 2
    assert known.get("a", [], make) == 3
    assert known.get("a", [table, table], make) == 4
    assert known.get("a", [table], make) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 5),
        lambda t: t[1:].zero_(),
        lambda t: torch.add(t, 1, out=t),
        lambda t: t.copy_(t),
    ],
    ids=["in place", "item", "through a view", "out=", "copy"],
)
def test_a_table_that_was_written_to_makes_it_anew(change):
    known, make, table = Cache(), Counter(), torch.zeros(3)
    known.get("a", [table], make)
    change(table)
    assert known.get("a", [table], make) == 2 and known.get("a", [table], make) == 2


def test_another_table_with_the_same_values_makes_it_anew():
    known, make, table = Cache(), Counter(), torch.zeros(3)
    assert [known.get("a", [t], make) for t in (table, table.clone(), table)] == [1, 2, 1]


def test_tables_in_another_order_are_other_tables():
    known, make, one, two = Cache(), Counter(), torch.zeros(1), torch.ones(1)
    assert [known.get("a", tables, make) for tables in ([one, two], [two, one], [one, two])] == [1, 2, 1]


def test_it_keeps_no_table_alive_and_takes_no_new_one_for_it():
    known, make = Cache(), Counter()
    for _ in range(8):
        table = torch.zeros(1000)
        seen = weakref.ref(table)
        count = known.get("a", [table], make)
        del table
        gc.collect()
        assert seen() is None
    assert count == 8, "a new tensor at the address of an old one is not the old one"


def test_a_failure_is_not_remembered():
    known, make = Cache(), Counter()
    with pytest.raises(ZeroDivisionError):
        known.get("a", [], lambda: 1 // 0)
    assert known.get("a", [], make) == 1


# ---- the bound --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bound(monkeypatch):
    """Set the bound in bytes; nothing is kept before and after."""

    def put(count: int) -> None:
        monkeypatch.setenv("SPARSEDSL_MEMORY_BYTES", str(count))

    clear_caches()
    yield put
    clear_caches()


SMALL = 4096  # float32 numbers of a result; with what an entry itself takes it is over 17 KiB and below 18 KiB
ENTRY = 18 << 10


def result(number: float = 0) -> torch.Tensor:
    return torch.full((SMALL,), float(number))


def test_what_was_not_asked_for_longest_goes_first(bound):
    bound(4 * ENTRY)
    known: Cache[torch.Tensor] = Cache()
    first = known.get("a", [], result)
    for key in "bcd":
        known.get(key, [], result)
    assert known.get("a", [], result) is first
    known.get("e", [], result)  # "b" goes
    assert known.get("a", [], result) is first and len(known) == 4
    assert float(known.get("b", [], lambda: result(7))[0]) == 7


def test_several_caches_share_the_bound_and_each_frees_its_part_when_it_dies(bound):
    bound(4 * ENTRY)
    one, two = Cache(), Cache()
    for key in range(4):
        one.get(key, [], result)
    for key in range(3):
        two.get(key, [], result)
    assert (len(one), len(two)) == (1, 3) and cache_bytes() <= 4 * ENTRY
    before = cache_bytes()
    del two
    gc.collect()
    assert before // 4 - 1 <= cache_bytes() <= before // 4 + 1
    del one
    gc.collect()
    assert cache_bytes() == 0


def test_a_result_that_refers_to_the_owner_of_its_cache_does_not_keep_it_alive(bound):
    class Owner:
        def __init__(self):
            self.known = Cache()
            self.known.get("me", [], lambda: self)

    owner = Owner()
    seen = weakref.ref(owner)
    del owner
    gc.collect()
    assert seen() is None and cache_bytes() == 0


def test_nothing_is_kept_with_a_bound_of_0(bound):
    bound(0)
    known, make = Cache(), Counter()
    assert [known.get("a", [], make) for _ in range(3)] == [1, 2, 3] and len(known) == 0


def test_what_is_larger_than_the_bound_is_not_kept_and_pushes_nothing_out(bound):
    bound(3 * ENTRY)
    known: Cache[torch.Tensor] = Cache()
    small = known.get("small", [], result)
    known.get("large", [], lambda: torch.zeros(SMALL * 4))
    assert known.get("small", [], result) is small and len(known) == 1


def test_tiles_never_push_results_out_of_their_half_nor_results_tiles(bound):
    bound(8 * ENTRY)
    results, tiles = Cache(), Cache(tiles=True)
    for key in range(4):
        results.get(key, [], result)
    for key in range(20):
        tiles.get(key, [], result)
    assert (len(results), len(tiles)) == (4, 4)
    for key in range(20):
        results.get(key, [], result)
    assert (len(results), len(tiles)) == (4, 4)
    clear_caches()
    for key in range(20):
        tiles.get(key, [], result)
    assert len(tiles) == 8, "what nobody else wants is free to use"


def test_a_tile_of_more_than_a_quarter_of_the_bound_is_not_kept(bound):
    bound(3 * ENTRY)
    tiles: Cache[torch.Tensor] = Cache(tiles=True)
    assert tiles.get("a", [], result).numel() == SMALL and len(tiles) == 0


def test_a_cache_may_have_a_bound_of_its_own(bound):
    bound(100 * ENTRY)
    mine, other = Cache(most=2 * ENTRY), Cache()
    other.get("a", [], result)
    first = mine.get(0, [], result)
    for key in range(1, 9):
        mine.get(key, [], result)
        assert mine.get(0, [], result) is first, "asked for in between"
    assert len(mine) == 2 and len(other) == 1


def test_clearing_lets_go_of_everything(bound):
    known, make, seen = Cache(), Counter(), []

    def tensor():
        made = result()
        seen.append(weakref.ref(made))
        return made

    known.get("a", [], tensor)
    known.get("b", [], make)
    assert cache_bytes() > SMALL * 4
    clear_caches()
    gc.collect()
    assert cache_bytes() == 0 and len(known) == 0 and seen[0]() is None
    assert known.get("b", [], make) == 2


@given(
    limit=st.integers(0, 12 * ENTRY),
    asked=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 2 * SMALL)), max_size=40),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_never_more_than_the_bound_whatever_is_asked_for(monkeypatch, limit, asked):
    monkeypatch.setenv("SPARSEDSL_MEMORY_BYTES", str(limit))
    clear_caches()
    caches = [Cache(), Cache(tiles=True), Cache(most=limit // 2)]
    for which, name, size in asked:
        got = caches[which].get((name, size), [], lambda name=name, size=size: torch.full((size,), float(name)))
        assert got.shape == (size,) and bool((got == name).all())
        held = [entry for cache in caches for entry in cache._entries.values()]
        assert sum(place.size for place, *_ in held) == cache_bytes() <= limit
        assert sum(place.size for place, *_ in caches[2]._entries.values()) == caches[2]._bytes <= limit // 2


def test_threads_may_ask_make_clear_and_die_at_once(bound):
    bound(6 * ENTRY)
    shared, wrong = Cache(), []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            key = draw.randrange(8)
            table = torch.zeros(1)
            make = functools.partial(result, key)
            if float(shared.get(key, [], make)[0]) != key:
                wrong.append(key)
            shared.get(("of", key), [table], make)
            Cache(tiles=bool(key % 2)).get(key, [], result)
            if key == 0:
                clear_caches()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    gc.collect()
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert sum(place.size for place, *_ in shared._entries.values()) == cache_bytes() <= 6 * ENTRY


def test_what_a_cuda_graph_records_stays_while_the_cache_lives(bound, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    known: Cache[torch.Tensor] = Cache()
    seen = weakref.ref(known.get("a", [], result))
    clear_caches()
    gc.collect()
    assert seen() is not None
    del known
    gc.collect()
    assert seen() is None


# ---- sizes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two things."""

    left: object
    right: object


def test_bytes_are_those_of_storages_each_once():
    table = torch.zeros(1000, dtype=torch.float64)
    assert held_bytes(table) == held_bytes(table[:3]) == held_bytes(table.expand(4, 1000)) == 8000
    for value in ([table, table], {"a": table, "b": table[1:]}, (table, [table.view(10, 100)]), Pair(table, {table: (table,)})):
        assert 8000 <= held_bytes(value) < 9000, value
    assert 16000 <= held_bytes(Pair(table, [table.clone()])) < 17000


def test_what_belongs_to_somebody_else_is_not_counted():
    pattern = sd.attend(sd.kv_idx < sd.table("end")[sd.q_idx]).bind(end=torch.zeros(100_000, dtype=torch.int64))
    full: Cache[torch.Tensor] = Cache()
    full.get("a", [], lambda: torch.zeros(100_000))
    for value in (pattern, full, lambda: pattern, [pattern] * 3, [pattern.bind]):
        assert held_bytes(value) < 20_000, value


# ---- what calls keep ----------------------------------------------------------------------------------------------------


def kept_tensors() -> int:
    """Bytes of all tensors that live."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum(storages.values())


LENGTHS = [700 + 61 * number for number in range(34)]


@pytest.mark.parametrize("kind", ["window | top_k", "documents"])
def test_34_prompt_lengths_stay_under_the_bound(bound, kind):
    limit = 1 << 19
    bound(limit)
    causal = sd.kv_idx <= sd.q_idx
    if kind == "documents":
        attn = sd.compile(causal & sd.patterns.documents(), backend="tiled")
    else:
        selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 2)
        attn = sd.compile(sd.attend(causal & (sd.patterns.sliding_window(128) | selected)), backend="tiled")
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, max(LENGTHS), 16) for _ in range(3)]
    ids = torch.arange(max(LENGTHS)) // 100
    before = kept_tensors()
    for length in LENGTHS:
        # Tables that live on, as those of a data loader: their results would stay for good.
        tables = {"doc": ids[:length].clone()} if kind == "documents" else {}
        attn(*(t[:, :, :length] for t in inputs), **tables)
        before += sum(t.nbytes for t in tables.values())
        assert cache_bytes() <= limit
        LIVING.append(tables)
    assert cache_bytes() > limit // 8, "nothing was kept, so that nothing was tested"
    assert kept_tensors() - before <= limit
    LIVING.clear()


LIVING: list[dict[str, torch.Tensor]] = []


def test_a_table_dies_with_its_last_user_on_triton_too(bound):
    table = torch.arange(64) // 9
    pattern = sd.attend(sd.patterns.documents() & (sd.kv_idx <= sd.q_idx))
    known: Cache[object] = Cache()
    device, lists = torch.device("cpu"), sd.compile(pattern).lists
    make = functools.partial(prepare, pattern, Domain(64, 64, tables={"doc": table}), device, (16, 16), lists)
    known.get("prepared", [table], make)
    seen = weakref.ref(table)
    del table, make
    gc.collect()
    assert seen() is None and len(known) == 0
