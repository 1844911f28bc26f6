"""Packed documents, shared prefixes and trees against definitions that walk lists."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsedsl as sd

document_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def number(lengths):
    """``[2, 3] -> [0, 0, 1, 1, 1]``."""
    return [document for document, length in enumerate(lengths) for _ in range(length)]


def offsets(lengths):
    """``[2, 3] -> [0, 2, 5]``."""
    return [0, *itertools.accumulate(lengths)]


@given(document_lengths)
def test_documents_both_forms(assert_pairs, lengths):
    documents = [set(range(start, end)) for start, end in itertools.pairwise(offsets(lengths))]

    def allowed(q, kv):
        return any(q in tokens and kv in tokens for tokens in documents)

    doc, start = torch.tensor(number(lengths)), torch.tensor(offsets(lengths))
    assert_pairs(sd.patterns.documents(), allowed, len(doc), doc=doc)
    assert_pairs(sd.patterns.documents(offsets="start"), allowed, len(doc), doc=doc, start=start)


@given(document_lengths, st.integers(1, 5))
def test_packed(assert_pairs, lengths, window):
    doc = number(lengths)
    tables = {"doc": torch.tensor(doc)}
    assert_pairs(sd.patterns.packed(), lambda q, kv: kv <= q and doc[q] == doc[kv], len(doc), **tables)
    assert_pairs(
        sd.patterns.packed(window),
        lambda q, kv: q - window < kv <= q and doc[q] == doc[kv],
        len(doc),
        **tables,
    )


@given(st.lists(document_lengths, min_size=1, max_size=3))
def test_documents_of_each_batch_entry(assert_pairs, rows):
    size = max(map(sum, rows))
    numbers = [number(lengths) + [len(lengths)] * (size - sum(lengths)) for lengths in rows]
    mask = sd.patterns.documents("segment", batched=True)
    for b, doc in enumerate(numbers):
        assert_pairs(mask, lambda q, kv, doc=doc: doc[q] == doc[kv], size, b=b, segment=torch.tensor(numbers))


@given(document_lengths, st.data())
def test_document_prefix(assert_pairs, lengths, data):
    prefix = [data.draw(st.integers(0, length)) for length in lengths]
    doc, start = number(lengths), offsets(lengths)

    def allowed(q, kv):
        return doc[q] == doc[kv] and (kv <= q or kv - start[doc[q]] < prefix[doc[q]])

    tables = {"doc": torch.tensor(doc), "start": torch.tensor(start), "prefix": torch.tensor(prefix)}
    assert_pairs(sd.patterns.document_prefix(), allowed, len(doc), **tables)


@given(document_lengths)
def test_shared_prefix(assert_pairs, lengths):
    branch = number(lengths)
    prompt = set(range(lengths[0]))

    def allowed(q, kv):
        return kv <= q and (kv in prompt or branch[kv] == branch[q])

    assert_pairs(sd.patterns.shared_prefix(), allowed, len(branch), branch=torch.tensor(branch))


@given(st.lists(st.integers(0, 100), min_size=0, max_size=12))
def test_tree(assert_pairs, choices):
    """A random tree, renumbered in depth-first order; a token sees the chain of its parents."""
    parents = [None] + [choice % (i + 1) for i, choice in enumerate(choices)]
    order = []

    def visit(node):
        order.append(node)
        for child, parent in enumerate(parents):
            if parent == node:
                visit(child)

    visit(0)
    place = {node: i for i, node in enumerate(order)}

    def ancestors(node):
        return {place[node]} | (ancestors(parents[node]) if parents[node] is not None else set())

    sees = [ancestors(node) for node in order]
    end = [1 + max(q for q in range(len(order)) if kv in sees[q]) for kv in range(len(order))]
    assert_pairs(sd.patterns.tree(), lambda q, kv: kv in sees[q], len(order), subtree_end=torch.tensor(end))
