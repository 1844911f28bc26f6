"""The search as a whole."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.analysis.proofs import REFUTED, causality
from sparsedsl.errors import CallWarning, PatternError, ShapeError, UnsupportedError
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.pattern import Pattern
from sparsedsl.models.binding import BINDING
from sparsedsl.models.converted import CONVERTED
from sparsedsl.models.donor import Donor, donor_of
from sparsedsl.models.layer_search.bounds import Bound, Kl, Perplexity
from sparsedsl.models.layer_search.candidates import NATIVE, Assignment, Candidate, assignment_of, candidates_from, put_in
from sparsedsl.models.layer_search.choosing import Choice, Chooser, options_of
from sparsedsl.models.layer_search.costs import COSTS, Costs, LayerShape, analysis_of, cost_table, layer_shapes
from sparsedsl.models.layer_search.evaluations import Evaluations, fingerprint
from sparsedsl.models.layer_search.judging import Judge, Measured, positions_of
from sparsedsl.models.layer_search.knapsack import Frontier, frontier, in_units
from sparsedsl.models.layer_search.prefill_timing import prefill_times
from sparsedsl.models.layer_search.progress import Progress
from sparsedsl.models.layer_search.search_report import Probe, SearchReport, Tried
from sparsedsl.models.layers import attention_layers, is_told_causal, text_config
from sparsedsl.models.native import native_pattern
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import is_for_prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["probe_rows", "search"]

Tensor = torch.Tensor
PROBE_ROWS, PROBE_POSITIONS = 2, 128
SHOWN = 500  # points of the frontier that a report keeps


def search(
    model: PreTrainedModel,
    candidates: Mapping[str, Any],
    tokens: Tensor,
    *,
    bound: Bound,
    cost: str | Callable[[int, Any], float] = "flops",
    layers: Sequence[int] | None = None,
    length: int | None = None,
    warm_up: int | None = None,
    positions: int | None = None,
    evaluations: int = 200,
    probe: bool = True,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    backend: str = "auto",
) -> SearchReport:
    """Which layer gets which pattern: an assignment of least cost that keeps the model within a bound on a calibration text.

    1. Every candidate is put into every layer alone, where it costs less than the layer's own attention, and judged by the mean KL
       divergence from the model as it is. Layers below the replaced one are not computed again.
    2. A multiple-choice knapsack, exact for whole costs (others are rounded to 100,000 steps), gives for each cost the assignment that
       loses least, as far as divergences add up.
    3. They do not, so assignments are run: along the knapsack's frontier until one holds and the next one does not, then with one layer
       changed, until no such swap is cheaper and holds. (A swap that is expected to lose more than 1.5 times the limit is not run.)
    4. The result is asked for tokens that it read long ago, since perplexity does not see retrieval.

    No sampler such as Optuna's follows: the frontier and swaps end after some tens of runs, each of which such a sampler would need too.

    Args:
        model: a transformers model for causal language modelling, in eval mode, without patterns; see :func:`sparsedsl.models.apply`.
        candidates: name -> mask, pattern or program, as ``apply`` takes them; or a class of hybrid layers, alone or in
            ``functools.partial``, as ``convert`` takes them, judged with new parameters as they begin (``init="calibrated"``).
        tokens: token ids ``(N, S)``, N texts of S tokens. What a pattern does not see within S tokens is not judged: rows should be several
            windows long, and of the kinds of text that matter.
        bound: :class:`~sparsedsl.models.Perplexity` or :class:`~sparsedsl.models.Kl`.
        cost: ``"flops"`` (:func:`sparsedsl.analyse`; of a program an upper bound), ``"cache_bytes"`` (keys and values that the layer's
            cache holds at most, by :func:`sparsedsl.cache_bound`; of a program all), ``"prefill_time"`` (seconds, measured here on the
            given text), or a function of layer index and pattern. Costs of the searched layers are added up.
        layers: indices of the layers that are searched; default all with attention.
        length: tokens that costs are counted for; default S.
        warm_up: the first so many positions of each row are not judged, as short texts tell windows from nothing; default ``S // 4``.
        positions: judged positions a row, drawn at random (always the same ones); default all after the warm-up.
        evaluations: whole assignments that may be run in step 3.
        probe: ask for repeated random tokens at the end.
        progress: show a bar, or lines where there is no terminal.
        resume: a JSON file that every evaluation is added to at once, and that a search which was broken off goes on from.
        backend: as in :func:`sparsedsl.compile`.

    Returns:
        :class:`~sparsedsl.models.SearchReport`. Where nothing holds but the model as it is, every layer is ``"native"``.

    Raises:
        PatternError: an argument that is not as said; a model with patterns, or in training mode; a file that something else was kept in.
        ShapeError: tokens that are no ``(N, S)`` token ids of the model's vocabulary.
        UnsupportedError: a candidate that sees later tokens, and so what it is asked for; a layer that patterns cannot reach.

    >>> import sparsedsl as sd
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    >>> model, text = LlamaForCausalLM(LlamaConfig(**tiny)).eval(), torch.randint(32, (2, 96))
    >>> local = {"near": sd.patterns.sliding_window(8), "far": sd.patterns.sliding_window(48)}
    >>> report = sd.models.search(model, local, text, bound=sd.models.Kl(1.0), cost="cache_bytes", progress=False)
    >>> report.assignment
    {0: 'near', 1: 'near', 2: 'near'}
    >>> int(report.native_cost), int(report.cost)
    (36864, 2688)
    """
    began = time.perf_counter()
    _check_arguments(bound, evaluations, model)
    given, modules = candidates_from(candidates), _searched(model, layers)
    native = _native(model, modules)
    ids = _token_ids(model, tokens)
    length = ids.shape[1] if length is None else _whole("length", length, 1)
    warm_up = ids.shape[1] // 4 if warm_up is None else _whole("warm_up", warm_up, 0, ids.shape[1] - 2)
    most = None if positions is None else _whole("positions", positions, 1)
    shapes = layer_shapes(model, modules, ids[:1, :2])
    donors = _donors(model, modules, native, given)
    _check_causal(given, ids.shape[1], shapes, donors)
    for layer in modules:
        for candidate in given.values():
            put_in(
                model, {layer: candidate}, backend=backend
            ).restore()  # what cannot stand there is said before anything is computed

    shown_progress, at = Progress(bool(progress)), positions_of(ids, warm_up, most, seed=0)
    judge = Judge(model, modules, given, ids, at, backend)
    costs = _costs(cost, length, shapes, native, given, donors, model, judge, ids, modules, backend, shown_progress)
    options = options_of(costs)
    kept = Evaluations(judge, fingerprint(model, ids, at, given), resume)

    singles = [((layer, name),) for layer, names in zip(modules, options, strict=True) for name in names if name != NATIVE]
    asked: list[Assignment] = [(), *singles]
    with shown_progress.stage("single layers", kept.missing(asked)):
        donor, *alone = kept.measured(asked, shown_progress.step)
    found: dict[int, dict[str, Measured]] = {layer: {} for layer in modules}
    for ((layer, name),), one in zip(singles, alone, strict=True):
        found[layer][name] = one
    losses = {layer: {NATIVE: 0.0, **{name: one.kl for name, one in row.items()}} for layer, row in found.items()}

    def run(assignment: Assignment) -> Measured:
        with shown_progress.stage(f"assignment {len(chooser.tried) + 1}", kept.missing([assignment])):
            return kept.measured([assignment], shown_progress.step)[0]

    chooser = Chooser(bound, costs, losses, run, evaluations)
    units = in_units([[costs[layer][name] for name in names] for layer, names in zip(modules, options, strict=True)])
    front = frontier(units, [[losses[layer][name] for name in names] for layer, names in zip(modules, options, strict=True)])
    choice = chooser.chosen(front, options)
    measured = kept.measured([assignment_of(choice)], shown_progress.step)[0]
    return SearchReport(
        model=type(model).__name__, attention_layers=len(attention_layers(model)), candidates=given, assignment=choice, bound=bound,
        holds=chooser.holds(measured), complete=chooser.complete, cost_name=cost if isinstance(cost, str) else "cost", length=length,
        costs=costs, singles=found, tried=_tried(chooser), frontier=_points(front, options, chooser), native=donor, measured=measured,
        probe=_probed(judge, modules, choice, shown_progress) if probe else None,
        text={"rows": ids.shape[0], "tokens": ids.shape[1], "warm_up": warm_up, "positions": sum(map(len, at))},
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _tried(chooser: Chooser) -> tuple[Tried, ...]:
    """The runs of whole assignments, with native layers named."""
    all_native = dict.fromkeys(chooser.costs, NATIVE)
    choices = [({**all_native, **dict(assignment)}, one) for assignment, one in chooser.tried.items()]
    return tuple(Tried(choice, chooser.cost(choice), one, chooser.holds(one)) for choice, one in choices)


def _points(front: Frontier, options: Sequence[Sequence[str]], chooser: Chooser) -> tuple[tuple[float, float], ...]:
    """Cost and expected loss along the frontier; evenly chosen places where there are many."""
    step = max(1, -(-len(front) // SHOWN))
    found = []
    for place in sorted({*range(0, len(front), step), len(front) - 1}):
        picked = zip(chooser.costs, options, front.options(place), strict=True)
        found.append((chooser.cost({layer: names[option] for layer, names, option in picked}), front.losses[place]))
    return tuple(found)


def probe_rows(ids: Tensor) -> tuple[Tensor, int]:
    """Rows of the first token of a text and random tokens of it that come twice; how far apart the copies are."""
    generator = torch.Generator().manual_seed(0)
    words, distance = ids.unique().cpu(), (ids.shape[1] - 1) // 2
    span = words[torch.randint(len(words), (PROBE_ROWS, distance), generator=generator)]
    return torch.cat([ids[:1, :1].cpu().expand(PROBE_ROWS, 1), span, span], dim=1).to(ids.device), distance


def _probed(judge: Judge, layers: Mapping[int, Any], choice: Choice, progress: Progress) -> Probe:
    """Judged is the second copy, but for its first token, which nobody can know."""
    rows, distance = probe_rows(judge.rows)
    at = positions_of(rows, distance + 1, PROBE_POSITIONS, seed=0)
    asking = Judge(judge.model, layers, judge.candidates, rows, at, judge.backend)
    assignments: list[Assignment] = [(), assignment_of(choice)]
    with progress.stage("retrieval", PROBE_ROWS):
        found = []
        for number in range(PROBE_ROWS):
            found.append(list(asking.row(number, assignments)))
            progress.step()
    return Probe(distance, *(Measured.of(several) for several in zip(*found, strict=True)))


def _costs(
    cost: Any, length: int, shapes: Mapping[int, LayerShape], native: Mapping[int, Pattern], given: Mapping[str, Candidate],
    donors: Mapping[int, Donor], model: PreTrainedModel, judge: Judge, ids: Tensor, modules: Mapping[int, Any], backend: str,
    progress: Progress,
) -> Costs:  # fmt: skip
    if not callable(cost):
        check_word("search(): cost (if it is no function)", cost, COSTS)
    if cost != "prefill_time":
        return cost_table(cost, length, shapes, native, given, donors)
    text = ids.reshape(1, -1)
    text = text.repeat(1, -(-length // text.shape[1]))[:, :length]
    return prefill_times(model, judge.body, text, modules, given, backend, progress)


# ---- what callers give ------------------------------------------------------------------------------------------------------------


def _check_arguments(bound: Any, evaluations: Any, model: Any) -> None:
    if not isinstance(bound, (Perplexity, Kl)):
        raise PatternError(f"search(): bound must be sd.models.Perplexity(1.01), say, or sd.models.Kl(0.02); got {shown(bound)}")
    _whole("evaluations", evaluations, 1)
    text_config(model)
    if model.training:
        raise PatternError("search(): the model is in training mode, where dropout changes every run; call model.eval()")


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise PatternError(f"search(): {name} must be a whole number, {wanted}; got {shown(value)}")
    return value


def _searched(model: PreTrainedModel, layers: Sequence[int] | None) -> dict[int, Any]:
    """Layer index -> attention module, of the layers that are searched."""
    found = attention_layers(model)
    if any(hasattr(module, BINDING) or hasattr(module, CONVERTED) for module in found.values()):
        raise PatternError(
            "search(): the model has patterns or converted layers; call restore() on what models.apply or models.convert returned, and "
            "search the model itself"
        )
    if layers is None:
        return found
    wrong = (
        [layer for layer in layers if layer not in found] if isinstance(layers, (list, tuple, range, set, frozenset)) else None
    )
    if wrong or wrong is None or not layers:
        raise PatternError(f"search(): layers must be some of {list(found)}, the model's attention layers; got {shown(layers)}")
    return {layer: found[layer] for layer in sorted(layers)}


def _native(model: PreTrainedModel, modules: Mapping[int, Any]) -> dict[int, Pattern]:
    """Layer index -> its own pattern, which must be causal: what is judged is the next token."""
    config, told = text_config(model), is_told_causal(model, text_config(model))
    found = {layer: native_pattern(module, layer, config, told) for layer, module in modules.items()}
    for layer, pattern in found.items():
        if causality(pattern.mask) == REFUTED:
            raise UnsupportedError(
                f"search(): layer {layer} of {type(model).__name__} sees later tokens by itself; what is judged is how a model goes on, "
                "token by token, so give one that does not"
            )
    return found


def _token_ids(model: PreTrainedModel, tokens: Any) -> Tensor:
    """Token ids (N, S) on the model's device."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.ndim != 2
        or tokens.is_floating_point()
        or tokens.shape[0] < 1
        or tokens.shape[1] < 8
    ):
        raise ShapeError(f"search(): tokens must be token ids (N, S), N texts of at least 8 tokens each; got {shown(tokens)}")
    words = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < words:
        raise ShapeError(f"search(): tokens must lie in 0 to {words - 1}; got {int(tokens.min())} to {int(tokens.max())}")
    return tokens.long().to(model.get_input_embeddings().weight.device)


def _donors(
    model: PreTrainedModel, modules: Mapping[int, Any], native: Mapping[int, Pattern], given: Mapping[str, Candidate]
) -> dict[int, Donor]:
    """Layer index -> the facts that hybrid layers are made by, where there are any among the candidates."""
    if not any(candidate.kind == "layer" for candidate in given.values()):
        return {}
    count = len(attention_layers(model))
    return {layer: donor_of(module, layer, count, native[layer]) for layer, module in modules.items()}


def _check_causal(
    given: Mapping[str, Candidate], length: int, shapes: Mapping[int, LayerShape], donors: Mapping[int, Donor]
) -> None:
    """Refuse candidates that see later tokens: they would know what they are asked for."""
    first = next(iter(shapes))
    for name, candidate in given.items():
        runs = candidate.runs(donors.get(first))
        if isinstance(runs.value, Program) and is_for_prefill(runs.value):
            raise UnsupportedError(
                f"search(): candidate {name!r} chooses by later queries, so that the loss within a text is that of a model which has seen "
                "the answers; judge it by what follows a prompt (examples/gemma_sparse_prefill.py), or leave it out"
            )
        causal = analysis_of(runs, length, shapes[first]).causal
        if causal.status == "REFUTED":
            raise UnsupportedError(
                f"search(): candidate {name!r} sees later tokens ({causal.witness or causal.reason}), and so what it is asked for; "
                "make it causal: mask & (sd.kv_idx <= sd.q_idx)"
            )
        if causal.status == "UNKNOWN":
            warnings.warn(
                f"search(): whether candidate {name!r} sees later tokens is not known ({causal.reason}); if it does, what is measured is "
                "too good", CallWarning, stacklevel=4,
            )  # fmt: skip
