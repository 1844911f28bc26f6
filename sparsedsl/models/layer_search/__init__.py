"""Which layer gets which pattern: :func:`~sparsedsl.models.layer_search.searching.search`, an assignment of least cost within a bound.

The stages, and the module of each:

1. ``candidates``: what may stand in a layer, as text that can be kept; how it is put in, one function.
2. ``costs``, ``prefill_timing``: layer and candidate -> what it costs.
3. ``partial_forward``: hidden states of the model from any layer on, and its head by itself.
4. ``judging``: assignments -> KL to the model itself and loss, position by position, never all logits at once.
5. ``evaluations``: what was judged, kept in a file that a search goes on from.
6. ``knapsack``: costs and divergences of single layers -> the assignments that are worth a look.
7. ``choosing``: true runs of these, then swaps.
8. ``searching``: calls 1-7; ``search_report``: what comes out, ``pareto_picture``: the picture of it.
"""
