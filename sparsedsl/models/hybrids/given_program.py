"""A program over queries, keys and values as a layer: no parameters, and a cache of its own."""

from __future__ import annotations

from sparsedsl.models.donor import Donor
from sparsedsl.models.layer import Layer
from sparsedsl.program.graph import Program
from sparsedsl.program.program_text import read_program

__all__ = ["Given"]


class Given(Layer):
    """A program that was given as it is; it runs on rotated queries and keys.

    Args:
        program: its text form.
    """

    def __init__(self, donor: Donor, program: str) -> None:
        super().__init__(donor, read_program(program))

    @classmethod
    def of(cls, donor: Donor, program: Program) -> Given:
        """Of a program whose tables may have tensors bound to them."""
        layer = cls(donor, program.text)
        layer.program = program
        return layer

    @property
    def words(self) -> str:
        """As patterns are shown: the kind of its result."""
        return self.program.labels[self.program.root]
