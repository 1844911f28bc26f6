"""What a search found, as data: :class:`SearchReport`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import PatternError
from sparsedsl.models.applying import AppliedPatterns
from sparsedsl.models.converting import Conversion
from sparsedsl.models.layer_search.bounds import Bound, bound_from
from sparsedsl.models.layer_search.candidates import NATIVE, Candidate, put_in
from sparsedsl.models.layer_search.evaluations import write_atomically
from sparsedsl.models.layer_search.judging import Measured
from sparsedsl.models.layers import attention_layers
from sparsedsl.plain_values import Reported, plain
from sparsedsl.quantities import bytes_text, flops_text, number_text, seconds_text, share_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Probe", "SearchReport", "Tried"]

FORMAT = "sparsedsl search report 1"
_COST_TEXT = {"flops": flops_text, "cache_bytes": bytes_text, "prefill_time": seconds_text}


@dataclass(frozen=True)
class Tried(Reported):
    """One true run of a whole assignment: layer -> candidate for all searched layers."""

    assignment: Mapping[int, str]
    cost: float
    measured: Measured
    holds: bool


@dataclass(frozen=True)
class Probe(Reported):
    """Random tokens that come twice, ``distance`` apart: loss and share of right tokens in the second copy, before and with the assignment.

    Perplexity does not see whether a model still finds what it read long ago; this does.
    """

    distance: int
    native: Measured
    chosen: Measured


@dataclass(frozen=True, eq=False)
class SearchReport(Reported):
    """What :func:`sparsedsl.models.search` found. It prints as a table, is kept as JSON (patterns as text, no code), and can be applied.

    ``assignment``: searched layer -> name of a candidate, or ``"native"``. ``measured``: a true run of it. ``singles``: layer -> candidate
    -> a run with that layer alone replaced. ``tried``: true runs of whole assignments, in order. ``frontier``: (cost, expected loss in
    KL) of the assignments that none beats, as the knapsack sees them. ``complete``: False if ``evaluations`` ended the search early.
    ``costs``: layer -> option -> cost, for ``length`` tokens.

    >>> import sparsedsl as sd
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model, text = LlamaForCausalLM(LlamaConfig(**tiny)).eval(), torch.randint(32, (1, 64))
    >>> window = sd.patterns.sliding_window(8)
    >>> report = sd.models.search(model, {"window": window}, text, bound=sd.models.Kl(1.0), cost="cache_bytes", progress=False)
    >>> report.save("found.json")
    >>> again = sd.models.SearchReport.load("found.json")
    >>> again.assignment, again.cost < again.native_cost
    ({0: 'window', 1: 'window'}, True)
    >>> again.to_dict()["assignment"], again.to_dict()["bound"]
    ({'0': 'window', '1': 'window'}, {'kind': 'Kl', 'nats': 1.0, 'sigmas': 0.0})
    >>> with again.apply(model) as applied:
    ...     print(applied)
    <AppliedPatterns on LlamaForCausalLM: layers 0, 1 attend((kv_idx <= q_idx) & (q_idx - kv_idx < 8))>
    """

    _adds = ("cost", "native_cost")

    model: str
    attention_layers: int
    candidates: Mapping[str, Candidate]
    assignment: Mapping[int, str]
    bound: Bound
    holds: bool
    complete: bool
    cost_name: str
    length: int
    costs: Mapping[int, Mapping[str, float]]
    singles: Mapping[int, Mapping[str, Measured]]
    tried: tuple[Tried, ...]
    frontier: tuple[tuple[float, float], ...]
    native: Measured
    measured: Measured
    probe: Probe | None
    text: Mapping[str, int]
    seconds: float

    def _said(self) -> dict[str, Any]:
        return {**super()._said(), "bound": {"kind": type(self.bound).__name__, **plain(self.bound)}}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were searched."""
        return tuple(self.assignment)

    @property
    def perplexity(self) -> float:
        """Of the judged positions, with the assignment."""
        return self.measured.perplexity

    @property
    def native_perplexity(self) -> float:
        """Of the same positions, with the model as it is."""
        return self.native.perplexity

    @property
    def kl(self) -> float:
        """Mean KL divergence from the model as it is, in nats a token."""
        return self.measured.kl

    @property
    def cost(self) -> float:
        """Of the searched layers, with the assignment."""
        return sum(self.costs[layer][name] for layer, name in self.assignment.items())

    @property
    def native_cost(self) -> float:
        """Of the searched layers as they are."""
        return sum(row[NATIVE] for row in self.costs.values())

    def apply(self, model: PreTrainedModel, *, backend: str = "auto") -> AppliedPatterns | Conversion:
        """Put the assignment into a model of the kind that was searched, as :func:`sparsedsl.models.apply` does; with hybrid layers in
        it as :func:`sparsedsl.models.convert` does, ready to be trained.

        Raises :class:`~sparsedsl.PatternError` for a model of another class or with another number of attention layers.
        """
        got = type(model).__name__, len(attention_layers(model))
        if got != (self.model, self.attention_layers):
            raise PatternError(
                f"this report is of a {self.model} with {self.attention_layers} attention layers; got a {got[0]} with {got[1]}"
            )
        chosen = {layer: self.candidates[name] for layer, name in self.assignment.items() if name != NATIVE}
        return put_in(model, chosen, backend=backend)

    def table(self) -> str:
        """What each layer loses with each candidate alone, in nats of KL, what it costs beside native, and what was chosen (``*``)."""
        names = list(self.candidates)
        width = max(14, *(len(name) + 2 for name in names))
        lines = [f"{'layer':>5} " + "".join(f"{name:>{width}}" for name in (NATIVE, *names))]
        for layer, chosen in self.assignment.items():
            cells = [f"{'0':>{width - 1}}{'*' if chosen == NATIVE else ' '}"]
            for name in names:
                found = self.singles[layer].get(name)
                text = "-" if found is None else f"{found.kl:.5f}"
                cells.append(f"{text:>{width - 1}}{'*' if chosen == name else ' '}")
            lines.append(f"{layer:>5} " + "".join(cells))
            own = self.costs[layer][NATIVE]
            shares = [self.costs[layer][name] / own if own else 1.0 for name in names]
            lines.append(f"{'cost':>5} " + f"{'1':>{width - 1}} " + "".join(f"{share:>{width - 1}.3f} " for share in shares))
        return "\n".join(lines + ["(KL of one replaced layer, in nats; -: costs no less than native; *: chosen)"])

    def __str__(self) -> str:
        cost = _COST_TEXT.get(self.cost_name, number_text)
        found, share = self.measured, self.cost / self.native_cost if self.native_cost else 1.0
        lines = [
            f"{self.model}: {len(self.layers)} of {self.attention_layers} attention layers searched, {len(self.candidates)} candidates",
            *(f"  {name:14} {candidate.text}" for name, candidate in self.candidates.items()),
            self.table(),
            f"  bound            {self.bound}: {'holds' if self.holds else 'DOES NOT HOLD'}",
            f"  {self.cost_name:16} {cost(self.cost)} of {cost(self.native_cost)} ({share_text(share)}), {self.length:,} tokens, "
            "searched layers",
            f"  perplexity       {found.perplexity:.3f}, native {self.native_perplexity:.3f}: {found.ratio - 1:+.2%} "
            f"(standard error {found.change_error:.2%})",
            f"  KL               {found.kl:.5f} nats (standard error {found.kl_error:.5f})",
        ]
        if self.probe is not None:
            near, far = self.probe.chosen, self.probe.native
            lines.append(
                f"  retrieval        {share_text(near.right)} right, native {share_text(far.right)}; loss {near.loss:.3f}, "
                f"native {far.loss:.3f} "
                f"(random tokens repeated {self.probe.distance} later)"
            )
        lines.append(
            f"  {found.positions:,} positions of {self.text['rows']} texts of {self.text['tokens']:,} tokens; {len(self.tried)} whole "
            f"assignments run; {seconds_text(self.seconds)}"
        )
        if not self.complete:
            lines.append("  ! evaluations= ended the search before all swaps were run")
        return "\n".join(lines)

    def plot_pareto(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Cost over loss: what the knapsack expects, what runs gave, what was chosen. Needs matplotlib.

        Returns the figure, and writes it if a path is given. Raises :class:`~sparsedsl.MissingPackageError` without matplotlib.
        """
        from sparsedsl.models.layer_search.pareto_picture import draw

        figure = draw(self)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        data = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _PLAIN},
            "candidates": {name: candidate.as_json() for name, candidate in self.candidates.items()},
            "bound": [type(self.bound).__name__, asdict(self.bound)],
            "singles": {layer: {name: asdict(one) for name, one in row.items()} for layer, row in self.singles.items()},
            "tried": [asdict(one) for one in self.tried],
            "native": asdict(self.native),
            "measured": asdict(self.measured),
            "probe": None if self.probe is None else asdict(self.probe),
        }
        write_atomically(Path(path), json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchReport:
        """Read a report. Raises :class:`~sparsedsl.PatternError` for a file that :meth:`save` has not written."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PatternError(f"SearchReport.load({str(path)!r}): {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PatternError(
                f"SearchReport.load({str(path)!r}): this is no search report; wanted a file that report.save() wrote"
            )
        try:
            return cls._of(data)
        except (KeyError, TypeError, ValueError) as error:
            raise PatternError(
                f"SearchReport.load({str(path)!r}): the report is damaged: {type(error).__name__}: {error}"
            ) from None

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> SearchReport:
        """The report that JSON holds."""
        kind, words = data["bound"]
        probe = data["probe"]
        return cls(
            **{name: data[name] for name in _PLAIN if name not in ("assignment", "costs", "frontier")},
            assignment=_by_layer(data["assignment"]),
            costs=_by_layer(data["costs"]),
            frontier=tuple((float(cost), float(loss)) for cost, loss in data["frontier"]),
            candidates={name: Candidate.from_json(name, value) for name, value in data["candidates"].items()},
            bound=bound_from(kind, words),
            singles={
                layer: {name: Measured(**one) for name, one in row.items()} for layer, row in _by_layer(data["singles"]).items()
            },
            tried=tuple(
                Tried(_by_layer(one["assignment"]), one["cost"], Measured(**one["measured"]), one["holds"])
                for one in data["tried"]
            ),
            native=Measured(**data["native"]),
            measured=Measured(**data["measured"]),
            probe=None if probe is None else Probe(probe["distance"], Measured(**probe["native"]), Measured(**probe["chosen"])),
        )


# Fields that JSON holds as they are.
_PLAIN = (
    "model", "attention_layers", "assignment", "holds", "complete", "cost_name", "length", "costs", "frontier", "text", "seconds",
)  # fmt: skip


def _by_layer(data: Mapping[str, Any]) -> dict[int, Any]:
    return {int(layer): value for layer, value in data.items()}
