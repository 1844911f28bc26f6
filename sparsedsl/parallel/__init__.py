"""Attention over more tokens than one device holds: who holds which of them, and what has to be sent for it. In the order of the stages:

1. *see*     (:mod:`.seen`):      patterns -> for each chunk of queries the granules of keys that it sees, from tile lists
2. *assign*  (:mod:`.assigning`): chunks -> ranks, by several ways; the cheapest one. What they see of each other is :mod:`.gathering`'s
3. *plan*    (:mod:`.planning`):  what each rank holds, gets and computes: a :class:`TokenPlan`
   or what that would cost on more devices than are here (:mod:`.simulating`)
4. *send*    (:mod:`.exchange`):  keys to those who see them, and their gradients back (:mod:`.sending`); for programs that choose, first
   what blocks are compared by, then what was chosen (:mod:`.stages`, :mod:`.choosing`); for recurrences states (:mod:`.scanning`). Ways
   that follow from who holds what are :mod:`.holding`'s
"""

from sparsedsl.lang.advice import answer_for
from sparsedsl.parallel.assigning import Rates
from sparsedsl.parallel.exchange import Exchange
from sparsedsl.parallel.planning import TokenPlan, plan
from sparsedsl.parallel.simulating import SimulatedStep, Simulation, simulate

__all__ = ["Exchange", "Rates", "SimulatedStep", "Simulation", "TokenPlan", "plan", "simulate"]
answer_for(globals(), __all__)
