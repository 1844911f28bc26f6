"""Score sources: every block of one is the block of a plain tensor, whatever it is cut into; noise; gradients at selected
blocks; totals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.selection.antidiagonals import antidiagonal
from sparsedsl.selection.candidates import Candidates
from sparsedsl.selection.chunking import PIECES
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.selection.gather import take
from sparsedsl.selection.noise import GumbelScores
from sparsedsl.selection.proxies import bounds
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.scores import DotScores, TensorScores
from sparsedsl.selection.scores_at_blocks import lse_over_candidates, selected_scores
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.testing import tensor

DOUBLE = torch.float64
HEADS = st.sampled_from(((1, 1), (4, 2), (2, 4), (3, 1), (1, 3)))
KINDS = st.sampled_from(("dot", "bound", "grouped", "sum", "tensor"))


def near(got, wanted, tolerance=1e-10):
    assert got.shape == wanted.shape
    assert torch.equal(got.isinf(), wanted.isinf())
    return float((got - wanted).detach().nan_to_num(0.0, 0.0, 0.0).abs().amax()) <= tolerance if got.numel() else True


def repeated(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def made(kind, heads, rows, blocks, width=3, batch=2):
    """A source, the tensors that it has gradients for, and the plain function of these that gives all its scores."""
    (ha, hb), most = heads, max(heads)
    a = tensor(batch, ha, rows, width, seed=0, dtype=DOUBLE).requires_grad_()
    b = tensor(batch, hb, blocks, width, seed=1, dtype=DOUBLE).requires_grad_()
    c = (b.detach() + tensor(batch, hb, blocks, width, seed=2, dtype=DOUBLE).abs()).requires_grad_()
    bias = tensor(1, 1, 1, blocks, seed=3, dtype=DOUBLE).requires_grad_()
    given = tensor(batch, most, rows, blocks, seed=4, dtype=DOUBLE).requires_grad_()

    def dots(a, b):
        return torch.einsum("bhrd,bhud->bhru", repeated(a, most), repeated(b, most)) * 0.7

    match kind:
        case "dot":
            return DotScores(a, b, 0.7), (a, b), dots
        case "bound":
            plain = lambda a, b, c: (  # noqa: E731
                torch.maximum(repeated(a, most)[:, :, :, None] * repeated(b, most)[:, :, None],
                              repeated(a, most)[:, :, :, None] * repeated(c, most)[:, :, None]).sum(-1) * 0.7
            )  # fmt: skip
            return BoundScores(a, b, c, 0.7), (a, b, c), plain
        case "grouped":
            return GroupedScores(DotScores(a, b, 0.7), 1, "max"), (a, b), lambda a, b: dots(a, b).amax(1, keepdim=True)
        case "sum":
            source = SumScores((DotScores(a, b, 0.7), TensorScores(bias), TensorScores(given)), (1.0, 2.0, -0.5))
            return source, (a, b, bias, given), lambda a, b, x, y: dots(a, b) + 2 * x - y / 2
        case _:
            return TensorScores(given), (given,), lambda x: x


@given(kind=KINDS, heads=HEADS, rows=st.integers(1, 9), blocks=st.integers(1, 9), data=st.data())
@settings(max_examples=60)
def test_a_block_is_that_of_all_scores(kind, heads, rows, blocks, data):
    source, tensors, plain = made(kind, heads, rows, blocks)
    r0, u0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, blocks - 1))
    r, u = slice(r0, data.draw(st.integers(r0 + 1, rows))), slice(u0, data.draw(st.integers(u0 + 1, blocks)))
    wanted = plain(*tensors)
    assert source.shape == wanted.shape and source.dtype == DOUBLE
    assert near(source.block(r, u), wanted[:, :, r, u])
    block = source.block(r, u).detach().zero_()
    assert float(block.sum()) == 0 and near(source.scores(), wanted), "scores are a tensor of their own"


def test_half_precision_is_cast_before_the_product():
    a, b = (tensor(1, 2, n, 64, seed=n, dtype=torch.bfloat16) for n in (5, 7))
    got = DotScores(a, b).scores()
    assert got.dtype == torch.float32
    assert near(got, DotScores(a.double(), b.double()).scores().float(), 64 * 25 * torch.finfo(torch.float32).eps)


@given(
    heads=HEADS, lists=st.sampled_from((1, 0)), rows=st.integers(1, 7), blocks=st.integers(1, 8), k=st.integers(1, 9),
    kind=KINDS, piece=st.sampled_from((1, 700, 10**6)),
)  # fmt: skip
@settings(max_examples=60)
def test_scores_at_picks_and_their_gradients(heads, lists, rows, blocks, k, kind, piece):
    source, tensors, plain = made(kind, heads, rows, blocks)
    scores = plain(*tensors)
    few = scores[:, : (1 if lists else scores.shape[1])]
    with PIECES.using(bytes=piece):
        selected = top_k(TensorScores(few.detach()), k, Candidates(end=torch.arange(rows)))
        got = selected_scores(source, selected)
        index = repeated(selected.indices.long(), scores.shape[1])
        wanted = scores.gather(-1, index.clamp(min=0)).masked_fill(index < 0, float("-inf"))
        assert near(got, wanted)
        grad = tensor(*got.shape, seed=9, dtype=DOUBLE)
        found = torch.autograd.grad(got, tensors, grad)
    expected = torch.autograd.grad(wanted, tensors, grad)
    for x, y in zip(found, expected, strict=True):
        assert near(x, y)


def test_units_that_nobody_picked_get_no_gradient_at_all():
    a, b = tensor(1, 2, 40, 8, seed=0), tensor(1, 2, 30, 8, seed=1).requires_grad_()
    source = DotScores(a, b)
    selected = top_k(source, 2, Candidates(end=torch.arange(40) // 2))
    (grad,) = torch.autograd.grad(selected_scores(source, selected).masked_fill(selected.indices < 0, 0.0).sum(), b)
    chosen = selected.table().any(2)
    assert 0 < int(chosen.sum()) < chosen.numel()
    assert bool((grad[~chosen] == 0).all()) and bool((grad[chosen] != 0).any(-1).all())


def test_gradients_do_not_depend_on_chance():
    a, b = tensor(1, 4, 300, 16, seed=0), tensor(1, 2, 50, 16, seed=1).requires_grad_()
    source = DotScores(a, b)
    selected = top_k(source, 8)
    grads = [torch.autograd.grad(selected_scores(source, selected).square().sum(), b)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_gradients_of_half_precision_are_added_up_in_float32(options):
    a = torch.ones(1, 1, 4096, 1, dtype=torch.bfloat16)
    b = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    options(PIECES, bytes=4096)
    selected = SelectedBlocks(torch.zeros(1, 1, 4096, 1, dtype=torch.int32), torch.ones(1, 1, 4096, dtype=torch.int32), 1, 1, 1)
    (grad,) = torch.autograd.grad(selected_scores(DotScores(a, b), selected).sum(), b)
    assert float(grad) == 4096.0, "4096 ones added in bfloat16 give 256"


@given(rows=st.integers(1, 9), blocks=st.integers(1, 9), heads=HEADS, kind=KINDS, piece=st.sampled_from((1, 900, 10**6)))
@settings(max_examples=60)
def test_totals_over_candidates_and_their_gradients(rows, blocks, heads, kind, piece):
    source, tensors, plain = made(kind, heads, rows, blocks)
    begin, end = (torch.arange(rows) - 4).clamp(min=0), torch.arange(rows)
    candidates = Candidates(begin, end, lambda r, u: (r[:, None] + u) % 5 != 0)
    block, row = torch.arange(blocks), torch.arange(rows)[:, None]
    allowed = (block >= begin[:, None]) & (block < end[:, None]) & ((row + block) % 5 != 0)
    scores = plain(*tensors).masked_fill(~allowed, float("-inf"))
    wanted = torch.logsumexp(scores, -1)
    with PIECES.using(bytes=piece, blocks=3, align=1):
        got = lse_over_candidates(source, candidates)
        assert near(got, wanted)
        some = ~wanted.isinf()
        found = torch.autograd.grad((got[some] * got[some]).sum(), tensors)
    filled = torch.logsumexp(scores.masked_fill(~some[..., None], 0.0), -1)
    expected = torch.autograd.grad((filled[some] * filled[some]).sum(), tensors)
    for x, y in zip(found, expected, strict=True):
        assert near(x, y)


@given(count=st.integers(0, 30), blocks=st.integers(1, 6), heads=st.sampled_from(((1, 1), (2, 4), (4, 2))))
@settings(max_examples=30)
def test_taking_rows_and_adding_them_up_again(count, blocks, heads):
    table = tensor(2, heads[0], blocks, 3, seed=0, dtype=DOUBLE).requires_grad_()
    indices = torch.randint(blocks, (2, heads[1], 2, count), generator=torch.Generator().manual_seed(count))
    got = take(table, indices)
    most = max(heads)
    plain = repeated(table, most)[
        torch.arange(2)[:, None, None, None], torch.arange(most)[:, None, None], repeated(indices, most)
    ]
    assert near(got, plain, 0.0)
    grad = tensor(*got.shape, seed=1, dtype=DOUBLE)
    assert near(*(torch.autograd.grad(x, table, grad)[0] for x in (got, plain)))


# ---- pages, antidiagonals, noise ---------------------------------------------------------------------------


@given(page=st.integers(1, 5), keys=st.integers(1, 14))
@settings(max_examples=30)
def test_S3_no_key_of_a_page_passes_its_bound(page, keys):
    q, k = tensor(1, 4, 3, 6, seed=0, dtype=DOUBLE), tensor(1, 2, keys, 6, seed=1, dtype=DOUBLE)
    bound = BoundScores(q, *bounds(k, page)).scores()
    logits = DotScores(q, k).scores()
    for block in range(bound.shape[3]):
        most = logits[..., block * page : (block + 1) * page].amax(-1)
        assert bool((bound[..., block] >= most - 1e-12).all())
        if page == 1:
            assert near(bound[..., block], most, 1e-12)


def antidiagonal_mass(q, k, stride, block, offset=0):
    """The masses of blocks, entry by entry from the definition."""
    (batch, heads, rows, width), keys = q.shape, k.shape[2]
    k = repeated(k, heads)
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % stride)) for x in (q, k))
    m, n = q.shape[2] // stride, k.shape[2] // stride
    logits = torch.full((batch, heads, m, n), float("-inf"), dtype=q.dtype)
    for i in range(m):
        for j in range(min(n, i + offset // stride + 1)):
            pairs = [(q[:, :, stride * i + stride - 1 - s] * k[:, :, stride * j + s]).sum(-1) for s in range(stride)]
            logits[:, :, i, j] = torch.stack(pairs).sum(0) / (width**0.5 * stride)
    weights = torch.softmax(logits, -1)
    mass = torch.zeros(batch, heads, -(-rows // block), -(-keys // block), dtype=q.dtype)
    for i in range(m):
        for j in range(n):
            mass[:, :, i * stride // block, j * stride // block] += weights[:, :, i, j]
    return mass


@given(
    stride=st.sampled_from((1, 2, 4)), cells=st.integers(1, 3), rows=st.integers(1, 20), behind=st.integers(0, 2),
    piece=st.sampled_from((1, 1000, 10**6)), data=st.data(),
)  # fmt: skip
@settings(max_examples=40)
def test_S2_antidiagonal_sums(stride, cells, rows, behind, piece, data):
    block = stride * cells
    offset = behind * block
    q = tensor(1, 2, rows, 4, seed=0, dtype=DOUBLE)
    k = tensor(1, 1, offset + rows, 4, seed=1, dtype=DOUBLE)
    with PIECES.using(bytes=piece):
        source = antidiagonal(q, k, stride=stride, block=block, q_offset=offset)
    wanted = antidiagonal_mass(q, k, stride, block, offset)
    assert source.shape == wanted.shape
    assert near(source.scores(), wanted)
    row, block = data.draw(st.integers(0, wanted.shape[2] - 1)), data.draw(st.integers(0, wanted.shape[3] - 1))
    assert near(source.block(slice(row, row + 1), slice(block, block + 1)), wanted[:, :, row : row + 1, block : block + 1])
    strided = torch.tensor([min(cells, -(-rows // stride) - cells * i) for i in range(wanted.shape[2])], dtype=DOUBLE)
    assert near(wanted.sum(-1), strided.expand(1, 2, -1)), "the masses of a row of blocks add up to its strided rows"


def test_antidiagonal_scores_only_drive_a_choice():
    q = torch.zeros(1, 1, 4, 2)
    source = antidiagonal(q, q, stride=2, block=2)
    with pytest.raises(UnsupportedError, match="AntidiagonalScores only drives a choice and has no gradient; use DotScores"):
        source.at(torch.zeros(1, 1, 2, 1, dtype=torch.int32))
    with pytest.raises(ShapeError, match="q_offset is 3; wanted a multiple of the block of 2"):
        antidiagonal(q, q, stride=2, block=2, q_offset=3)


def test_noise_is_gumbels_and_belongs_to_its_place():
    noise = GumbelScores((2, 3, 200, 300), seed=5)
    x = noise.scores().double()
    assert abs(float(x.mean()) - 0.57722) < 0.01 and abs(float(x.var()) - 1.64493) < 0.02 and bool(x.isfinite().all())
    assert torch.equal(noise.block(slice(3, 9), slice(7, 70)), noise.scores()[:, :, 3:9, 7:70])
    index = torch.tensor([5, 0, 299]).expand(1, 3, 200, 3)
    assert torch.equal(noise.at(index), noise.scores()[..., [5, 0, 299]])
    later = noise.narrowed(slice(0, 200), slice(10, 300)).at(index.clamp(max=5))
    assert torch.equal(later, noise.scores()[..., [15, 10, 15]])
    assert not torch.equal(noise.scores(), GumbelScores((2, 3, 200, 300), seed=6).scores())
    flat = x.flatten(0, 1).flatten(1)
    assert float((torch.corrcoef(flat) - torch.eye(6, dtype=DOUBLE)).abs().max()) < 0.02
    rows = torch.corrcoef(x[0, 0])
    assert float((rows - torch.eye(200, dtype=DOUBLE)).abs().max()) < 0.35


def test_noise_changes_what_is_picked_and_not_what_it_scores():
    a, b = tensor(1, 2, 50, 8, seed=0), tensor(1, 2, 40, 8, seed=1)
    source = DotScores(a, b)
    quiet = top_k(source, 4)
    noisy = top_k(SumScores((source, GumbelScores(source.shape, seed=1))), 4)
    assert not torch.equal(quiet.indices, noisy.indices)
    wanted = source.scores().gather(-1, noisy.indices.long())
    assert near(selected_scores(source, noisy), wanted, 1e-5)


def test_shapes_that_do_not_fit_are_refused():
    a, b = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ShapeError, match="one number of heads a multiple of the other"):
        DotScores(a, b)
    with pytest.raises(ShapeError, match=r"a is torch.int64 \(1, 2, 3, 4\); wanted a float tensor of four dimensions"):
        DotScores(torch.zeros(1, 2, 3, 4, dtype=torch.int64), b)
    with pytest.raises(ShapeError, match="heads_out 2 does not divide the 3 heads"):
        GroupedScores(TensorScores(a), 2)
    with pytest.raises(ShapeError, match="do not fit; wanted the same"):
        SumScores((TensorScores(a), TensorScores(b)))
    with pytest.raises(ShapeError, match="wanted a factor for each source"):
        SumScores((TensorScores(a),), (1.0, 2.0))
    with pytest.raises(ShapeError, match="2 heads of lists do not divide 1 groups; choose by group"):
        GroupedScores(TensorScores(torch.zeros(1, 2, 2, 5)), 1).at(torch.zeros(1, 2, 2, 1, dtype=torch.int32))
    with pytest.raises(ShapeError, match="wanted the same shape"):
        BoundScores(b, b, a)
    assert accumulated(torch.float16) == torch.float32
