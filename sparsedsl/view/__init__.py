"""The playground: a local page that shows a pattern and answers to sliders. ``python -m sparsedsl view file.py:name`` opens it.

A model that knows nothing of pages, and a thin page over it:

1. :mod:`~sparsedsl.view.subject`: what is looked at, and the parameters that it is made with.
2. :mod:`~sparsedsl.view.setting`: what the controls say: lengths, offset, head, tiles, parameters.
3. :mod:`~sparsedsl.view.scene`: one pattern at one setting: cells of a window, why a pair is allowed, the whole as levels.
   :mod:`~sparsedsl.view.facts`: cost, proofs, cache, source. :mod:`~sparsedsl.view.random_call`: what a program chooses.
4. :mod:`~sparsedsl.view.server`: answers to the page; :mod:`~sparsedsl.view.page`: the page, also as one file that needs no server.
"""
