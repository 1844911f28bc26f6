"""From what single layers lose to an assignment that holds: true runs along the frontier, then swaps.

Divergences of single layers do not add up: several replaced layers lose more, or less, than the sum. So the knapsack says in which order
assignments are worth a run, and a run says which of them hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sparsedsl.models.layer_search.bounds import Bound
from sparsedsl.models.layer_search.candidates import NATIVE, Assignment, assignment_of
from sparsedsl.models.layer_search.costs import Costs
from sparsedsl.models.layer_search.judging import Measured
from sparsedsl.models.layer_search.knapsack import Frontier

__all__ = ["Choice", "Chooser", "options_of"]

Choice = dict[int, str]  # every searched layer -> candidate, or "native"
HOPELESS = 1.5  # a swap that is expected to lose more than so many times the limit is not run
LEAST = 0.25  # what is expected is never corrected to less than so much of itself: perplexity may fall by luck


@dataclass
class Chooser:
    """``losses``: layer -> option -> what it loses alone. ``run``: what an assignment loses in truth. ``most``: runs that may be made.

    ``tried``: what was run, in order. ``complete``: no run that should have been made was left out.
    """

    bound: Bound
    costs: Costs
    losses: Mapping[int, Mapping[str, float]]
    run: Callable[[Assignment], Measured]
    most: int
    tried: dict[Assignment, Measured] = field(default_factory=dict)
    complete: bool = True

    def chosen(self, front: Frontier, options: Sequence[Sequence[str]]) -> Choice:
        """The cheapest assignment that holds and that no swap of one layer makes cheaper. ``options``: of each layer, as in ``front``."""
        layers = list(self.costs)

        def choice(place: int) -> Choice:
            if place < 0:
                return dict.fromkeys(layers, NATIVE)
            return {layer: names[option] for layer, names, option in zip(layers, options, front.options(place), strict=True)}

        return self.swapped(choice(self.along(front, lambda place: assignment_of(choice(place)))))

    def cost(self, choice: Choice) -> float:
        """What all searched layers cost."""
        return sum(self.costs[layer][name] for layer, name in choice.items())

    def along(self, front: Frontier, assignment: Callable[[int], Assignment]) -> int:
        """The place on the frontier of an assignment that holds while the next one does not; -1 where not even the first does.

        The next to be run is the one whose expected loss, corrected by what the last run lost beside its own expectation, just meets the
        limit; at least one step is won each time.
        """
        holds, fails, correction = -1, len(front), 1.0
        while fails - holds > 1:
            guess = min(max(front.cheapest(self.bound.limit / correction), holds + 1), fails - 1)
            found = self._measured(assignment(guess))
            if found is None:
                break
            if self.holds(found):
                holds = guess
            else:
                fails = guess
            if front.losses[guess] > 0:
                correction = max(self.bound.worst(found) / front.losses[guess], LEAST)
        return holds

    def swapped(self, choice: Choice) -> Choice:
        """Change one layer at a time as long as that makes the whole cheaper and holds."""
        while True:
            for other in self._swaps(choice):
                found = self._measured(assignment_of(other))
                if found is None:
                    return choice
                if self.holds(found):
                    choice = other
                    break
            else:
                return choice

    def holds(self, found: Measured) -> bool:
        """Whether a run is within the bound."""
        return self.bound.worst(found) <= self.bound.limit

    def _swaps(self, choice: Choice) -> Iterator[Choice]:
        """Cheaper choices that differ in one layer, those that are expected to hold first, the cheapest of these first."""
        now, limit = self.cost(choice), self.bound.limit
        expected = sum(self.losses[layer][name] for layer, name in choice.items())
        found = self.tried.get(assignment_of(choice))
        here = self.bound.worst(found) if found is not None else 0.0
        correction = max(here / expected, LEAST) if expected > 0 else 1.0
        swaps = []
        for layer, own in choice.items():
            for name, loss in self.losses[layer].items():
                other = {**choice, layer: name}
                total = self.cost(other)
                lost = here + correction * (loss - self.losses[layer][own])
                if name != own and total < now and lost <= HOPELESS * limit:
                    swaps.append((lost > limit, total if lost <= limit else lost, layer, name, other))
        return (other for *_, other in sorted(swaps, key=lambda swap: swap[:4]))

    def _measured(self, assignment: Assignment) -> Measured | None:
        """A true run; None where it may not be made any more."""
        if assignment not in self.tried:
            if len(self.tried) >= self.most:
                self.complete = False
                return None
            self.tried[assignment] = self.run(assignment)
        return self.tried[assignment]


def options_of(costs: Costs) -> list[list[str]]:
    """The options of each layer: native, and the candidates that cost less."""
    return [[NATIVE, *(name for name, cost in row.items() if name != NATIVE and cost < row[NATIVE])] for row in costs.values()]
