from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl import testing as kit
from sparsedsl.testing.lists import assert_lists_sound

blocks = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 32])


@given(data=st.data())
@settings(max_examples=300)
def test_lists(data):
    p = data.draw(kit.patterns(scores=False))
    c = data.draw(kit.shapes(max_len=40))
    t = data.draw(kit.tables_for(p.mask, c))
    bs = (data.draw(blocks), data.draw(blocks))
    assert_lists_sound(p, c.q_len, c.kv_len, bs, batch=c.batch, heads=c.heads, q_offset=c.q_offset, **t)
