"""Programs on tensors. ``call``: what a call gives, checked. ``runner``: a program node by node.

The dense meaning of nodes: ``dense_scores``, ``dense_choices``, ``reference``. The fast ways: ``listed_choices``, ``lowered``, and what
they ask for: ``candidates``, ``block_choices``, ``kernels``. ``state``: going on from an earlier call. ``compiled``: the callable.
"""
