"""How far an assignment leads away from the model: KL and loss, position by position.

For every judged position the logits of the model as it is (the *donor*) and of the model with the assignment are compared over the whole
vocabulary, some positions at a time: a text of 2,048 tokens would otherwise take gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.adjustable import Adjustable
from sparsedsl.models.layer_search.candidates import Assignment, Candidate, put_in
from sparsedsl.models.layer_search.partial_forward import Body, Head
from sparsedsl.plain_values import Reported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["JUDGING", "Judge", "Judging", "Measured", "Sums", "positions_of"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Judging:
    """``logits``: numbers in the logits of the positions that are compared at once, 64 MiB of float32; a few such tensors are alive.
    ``together``: assignments that share the donor's logits; their hidden states are kept until then."""

    logits: int = 1 << 24
    together: int = 16


JUDGING = Adjustable(Judging())


@dataclass(frozen=True)
class Sums:
    """Sums over positions: KL, the loss, how much larger it is than the donor's (``change``), and right next tokens."""

    positions: int = 0
    kl: float = 0.0
    kl_squares: float = 0.0
    loss: float = 0.0
    change: float = 0.0
    change_squares: float = 0.0
    right: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> list[Any]:
        """All of it, in order: what a file keeps."""
        return list(vars(self).values())


@dataclass(frozen=True)
class Measured(Reported):
    """Means over the judged positions, in nats a token, and their standard errors (as if positions were independent).

    ``kl``: from the donor to the assignment. ``loss``: negative log-likelihood of the next token; ``change``: how much larger it is than
    the donor's. ``right``: share of positions whose most likely token is the next one.
    """

    positions: int
    kl: float
    kl_error: float
    loss: float
    change: float
    change_error: float
    right: float

    _adds = ("perplexity", "ratio")

    @classmethod
    def of(cls, sums: Iterable[Sums]) -> Measured:
        """The means of sums over several texts."""
        total = sum(sums, Sums())
        n = total.positions

        def error(first: float, squares: float) -> float:
            return math.sqrt(max(squares / n - (first / n) ** 2, 0.0) / max(n - 1, 1))

        return cls(
            n, max(total.kl / n, 0.0), error(total.kl, total.kl_squares), total.loss / n,
            total.change / n, error(total.change, total.change_squares), total.right / n,
        )  # fmt: skip

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)

    @property
    def ratio(self) -> float:
        """Perplexity over that of the donor."""
        return math.exp(self.change)


def positions_of(rows: Tensor, warm_up: int, most: int | None, seed: int) -> list[Tensor]:
    """For each row of token ids ``(N, S)`` the positions that are judged by the token after them, rising.

    All from ``warm_up`` on, or ``most`` of them, drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    all_of_them = torch.arange(warm_up, rows.shape[1] - 1)
    if most is None or most >= len(all_of_them):
        return [all_of_them] * len(rows)
    return [all_of_them[torch.randperm(len(all_of_them), generator=generator)[:most]].sort().values for _ in rows]


class Judge:
    """Judges assignments on texts: token ids ``(N, S)``, and for each row the positions that count."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[int, Any], candidates: Mapping[str, Candidate], rows: Tensor,
        positions: Sequence[Tensor], backend: str,
    ) -> None:  # fmt: skip
        self.model, self.candidates, self.backend = model, candidates, backend
        self.rows, self.positions = rows, positions
        self.body = Body(model, layers, rows[:1])
        self.head = Head(model, self.body, rows[:1])
        self._donors: dict[int, Tensor] = {}  # row -> hidden states of the judged positions

    @torch.no_grad()
    def row(self, number: int, assignments: Sequence[Assignment]) -> Iterator[Sums]:
        """The sums of each assignment over one row, in order; the empty one is the donor."""
        ids, at = self.rows[number : number + 1], self.positions[number]
        firsts = {assignment[0][0] for assignment in assignments if assignment}
        recorded: dict[int, Any] = {}
        if number not in self._donors or len(assignments) > 1:
            hidden, recorded = self.body.recorded(ids, firsts)
            self._donors[number] = hidden[0, at]
        for first in range(0, len(assignments), JUDGING.now.together):
            some = assignments[first : first + JUDGING.now.together]
            yield from self._compared(number, [self._hidden(number, assignment, recorded) for assignment in some])

    def _hidden(self, number: int, assignment: Assignment, recorded: Mapping[int, Any]) -> Tensor:
        """Hidden states of the judged positions of a row."""
        if not assignment:
            return self._donors[number]
        ids = self.rows[number : number + 1]
        put = put_in(self.model, {layer: self.candidates[name] for layer, name in assignment}, backend=self.backend)
        try:
            return self.body.hidden_from(ids, assignment[0][0], recorded)[0, self.positions[number]]
        finally:
            put.restore()

    def _compared(self, number: int, several: Sequence[Tensor]) -> list[Sums]:
        """The sums of several hidden states of a row's judged positions."""
        donor, at = self._donors[number], self.positions[number]
        totals = [Sums()] * len(several)
        count = max(1, JUDGING.now.logits // self.head.words)
        for first in range(0, len(at), count):
            place = slice(first, first + count)
            known = _Teacher(self.head(donor[place]), self.rows[number, at[place] + 1])
            totals = [total + known.sums(self.head(hidden[place])) for total, hidden in zip(totals, several, strict=True)]
        return totals


class _Teacher:
    """The donor's logits of some positions ``(n, V)`` and the tokens that follow ``(n,)``."""

    def __init__(self, logits: Tensor, following: Tensor) -> None:
        self.logits = logits.float()
        self.lse = self.logits.logsumexp(-1)
        self.share = (self.logits - self.lse[:, None]).exp_()
        self.following = following[:, None]
        self.loss = self.lse - self.logits.gather(-1, self.following)[:, 0]

    def sums(self, logits: Tensor) -> Sums:
        """What other logits of the same positions differ by; they are overwritten."""
        logits = logits.float()
        lse = logits.logsumexp(-1)
        loss = lse - logits.gather(-1, self.following)[:, 0]
        right = int((logits.argmax(-1) == self.following[:, 0]).sum())
        # sum_w p_w (log p_w - log q_w), with log p_w - log q_w = (t_w - lse_t) - (s_w - lse_s)
        kl = ((lse - self.lse) - logits.sub_(self.logits).mul_(self.share).sum(-1)).double()
        change = (loss - self.loss).double()
        return Sums(
            len(kl), kl.sum().item(), kl.square().sum().item(), loss.double().sum().item(),
            change.sum().item(), change.square().sum().item(), right,
        )  # fmt: skip
