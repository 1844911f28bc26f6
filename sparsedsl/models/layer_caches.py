"""What the caches of a model's layers hold while tokens go by, as a report."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.models.layers import layer_words
from sparsedsl.plain_values import Reported
from sparsedsl.quantities import bytes_text

__all__ = ["CacheReport", "LayerCache"]


@dataclass(frozen=True)
class LayerCache(Reported):
    """``layers`` whose caches hold alike. ``holds``: which keys, in words; ``most_tokens``: so many at most; ``token_bytes``: of the keys
    and values of one token in one layer; ``bytes``: of one layer, the whole batch."""

    layers: tuple[int, ...]
    holds: str
    most_tokens: int
    token_bytes: int
    bytes: int


@dataclass(frozen=True)
class CacheReport(Reported):
    """What the caches of a model hold while ``length`` tokens go by; ``print`` it. ``bytes``: of all layers and the whole ``batch``;
    ``whole_bytes``: if every layer held every key."""

    length: int
    batch: int
    layers: tuple[LayerCache, ...]
    bytes: int
    whole_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{layer_words(list(one.layers))}: {one.holds}; {bytes_text(one.token_bytes)} a token, {bytes_text(one.bytes)} for "
            f"{self.length:,} tokens"
            for one in self.layers
        ]
        return "\n".join([*lines, f"all layers: {bytes_text(self.bytes)}, where {bytes_text(self.whole_bytes)} hold every key"])
