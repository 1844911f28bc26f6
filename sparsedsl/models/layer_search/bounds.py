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

    What is compared are the losses of the same positions (paired). Their mean difference is noisy (some hundred positions of a small model:
    1 to 2 percent), and luck may hide what was lost. So the mean KL divergence, which is what the loss is expected to grow by and
    much less noisy, may be no larger than the logarithm of ``ratio`` either, unless ``with_kl`` is False. ``sigmas``: so many standard
    errors are added to the difference before it is compared.

    Raises :class:`~sparsedsl.PatternError` unless ``ratio`` is a number above 1 and ``sigmas`` one of at least 0.

    >>> import sparsedsl as sd
    >>> sd.models.Perplexity(1.01)
    Perplexity(ratio=1.01, sigmas=0.0, with_kl=True)
    """

    ratio: float
    sigmas: float = 0.0
    with_kl: bool = True

    def __post_init__(self) -> None:
        _check("Perplexity()", "ratio", self.ratio, above=1)
        _check_sigmas("Perplexity()", self.sigmas)

    @property
    def limit(self) -> float:
        """The most that :meth:`worst` may be, in nats a token."""
        return math.log(self.ratio)

    def worst(self, found: Measured) -> float:
        """What is bounded, in nats a token, with the standard errors that ``sigmas`` asks for."""
        grown = found.change + self.sigmas * found.change_error
        return max(grown, found.kl) if self.with_kl else grown

    def __str__(self) -> str:
        also = f", and KL at most {self.limit:.4f}" if self.with_kl else ""
        return f"perplexity at most {self.ratio:g} times the model's own{_sigma_words(self.sigmas)}{also}"


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

    def worst(self, found: Measured) -> float:
        """What is bounded, in nats a token, with the standard errors that ``sigmas`` asks for."""
        return found.kl + self.sigmas * found.kl_error

    def __str__(self) -> str:
        return f"KL to the model itself at most {self.nats:g} nats{_sigma_words(self.sigmas)}"


Bound = Perplexity | Kl
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Perplexity, Kl)}


def bound_from(kind: str, words: dict[str, Any]) -> Bound:
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
