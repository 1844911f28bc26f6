from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.testing.matching import assert_matches_reference


@given(data=st.data())
@settings(max_examples=150)
def test_reference(data):
    p = data.draw(kit.patterns())
    c = data.draw(kit.shapes(max_len=40))
    t = data.draw(kit.tables_for(p, c))
    q, k, v = data.draw(kit.inputs(c))
    assert_matches_reference(sd.compile(p, backend="reference"), q, k, v, q_offset=c.q_offset, **t)
