"""What a search may lose: :class:`Perplexity`, :class:`Kl`."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown

if TYPE_CHECKING:
    from sparsedsl.models.layer_search.judging import Measured

__all__ = ["Bound", "Kl", "Perplexity", "bound_from"]


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of the calibration text may grow to ``ratio`` times that of the model as it is.

    What is compared are the losses of the same positions (paired), whose mean difference has a standard error: with ``sigmas`` so
    many of them are added to the difference before it is compared, so that noise does not pass for quality. KL varies less from token to
    token: :class:`Kl` needs less text.

    Raises :class:`~sparsedsl.PatternError` unless ``ratio`` is a number above 1 and ``sigmas`` one of at least 0.

    >>> import sparsedsl as sd
    >>> sd.models.Perplexity(1.01)
    Perplexity(ratio=1.01, sigmas=0.0)
    """

    ratio: float
    sigmas: float = 0.0

    def __post_init__(self) -> None:
        _check("Perplexity()", "ratio", self.ratio, above=1)
        _check_sigmas("Perplexity()", self.sigmas)

    @property
    def limit(self) -> float:
        """The most that :meth:`worst` may be, in nats a token."""
        return math.log(self.ratio)

    def value(self, found: Measured) -> float:
        """What is bounded, in nats a token."""
        return found.change

    def worst(self, found: Measured) -> float:
        """The same with the standard errors that ``sigmas`` asks for."""
        return found.change + self.sigmas * found.change_error

    def __str__(self) -> str:
        return f"perplexity at most {self.ratio:g} times the model's own{_sigma_words(self.sigmas)}"


@dataclass(frozen=True)
class Kl:
    """The mean KL divergence from the model as it is, over the judged positions, may be ``nats``; ``sigmas`` as in :class:`Perplexity`.

    Raises :class:`~sparsedsl.PatternError` unless ``nats`` is a number above 0 and ``sigmas`` one of at least 0.

    >>> import sparsedsl as sd
    >>> sd.models.Kl(0.02, sigmas=1)
    Kl(nats=0.02, sigmas=1)
    """

    nats: float
    sigmas: float = 0.0

    def __post_init__(self) -> None:
        _check("Kl()", "nats", self.nats, above=0)
        _check_sigmas("Kl()", self.sigmas)

    @property
    def limit(self) -> float:
        """The most that :meth:`worst` may be, in nats a token."""
        return float(self.nats)

    def value(self, found: Measured) -> float:
        """What is bounded, in nats a token."""
        return found.kl

    def worst(self, found: Measured) -> float:
        """The same with the standard errors that ``sigmas`` asks for."""
        return found.kl + self.sigmas * found.kl_error

    def __str__(self) -> str:
        return f"KL to the model itself at most {self.nats:g} nats{_sigma_words(self.sigmas)}"


Bound = Perplexity | Kl
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Perplexity, Kl)}


def bound_from(kind: str, words: dict[str, float]) -> Bound:
    """The bound of a report: the name of its class and its fields."""
    return _KINDS[kind](**words)


def _check(call: str, name: str, value: Any, above: float) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not above < float(value) < math.inf:
        raise PatternError(f"{call}: {name} must be a number above {above}; got {shown(value)}")


def _check_sigmas(call: str, value: Any) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= float(value) < math.inf:
        raise PatternError(f"{call}: sigmas must be a number of at least 0; got {shown(value)}")


def _sigma_words(sigmas: float) -> str:
    return f", {sigmas:g} standard error{'s' * (sigmas != 1)} included" if sigmas else ""
