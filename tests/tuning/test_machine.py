"""The rates of a machine as data: there and back, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sparsedsl.tuning.machine import BUILT_IN, ROWS, Machine

RATE = st.floats(min_value=1e-6, max_value=1e9)
RATES = st.lists(RATE, min_size=len(ROWS), max_size=len(ROWS)).map(tuple)
MACHINES = st.builds(
    Machine, st.text(), st.text(), RATES | st.just((0.0,) * len(ROWS)), RATES, RATES, RATE, RATE, RATE, RATE, RATE
)


@given(MACHINES)
@settings(max_examples=50)
def test_a_machine_comes_back(machine):
    again = Machine.from_json(json.loads(json.dumps(machine.to_json())))
    assert again == machine and hash(again) == hash(machine) and again.fingerprint() == machine.fingerprint()


FIVE = [1.0] * (len(ROWS) - 1)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "got NoneType, wanted the fields"),
        ([1], "got list, wanted the fields"),
        ({}, "got [], wanted the fields"),
        (BUILT_IN.to_json() | {"l3_bytes": 1}, "wanted the fields"),
        ({name: value for name, value in BUILT_IN.to_json().items() if name != "call_us"}, "wanted the fields"),
        (BUILT_IN.to_json() | {"name": 3}, "name: got 3, wanted text"),
        (BUILT_IN.to_json() | {"call_us": "3"}, "call_us: got '3', wanted a number above 0"),
        (BUILT_IN.to_json() | {"call_us": True}, "call_us: got True, wanted a number above 0"),
        (BUILT_IN.to_json() | {"call_us": 0.0}, "call_us: got 0.0, wanted a number above 0"),
        (BUILT_IN.to_json() | {"call_us": math.nan}, "call_us: got nan, wanted a number above 0"),
        (BUILT_IN.to_json() | {"flash_gflops": math.inf}, "flash_gflops: got inf, wanted a number above 0"),
        (BUILT_IN.to_json() | {"flash_gflops": [1.0] * 6}, "flash_gflops: got [1.0, "),
        (BUILT_IN.to_json() | {"matmul_gflops": 1.0}, "matmul_gflops: got 1.0, wanted 6 numbers"),
        (BUILT_IN.to_json() | {"matmul_gflops": FIVE}, "wanted 6 numbers"),
        (BUILT_IN.to_json() | {"matmul_gflops": [0.0] * 6}, "wanted numbers above 0"),
        (BUILT_IN.to_json() | {"linear_gflops": [*FIVE, 0.0]}, "wanted numbers above 0, or 0.0 throughout"),
        (BUILT_IN.to_json() | {"linear_gflops": [*FIVE, None]}, "wanted numbers above 0, or 0.0 throughout"),
    ],
)
def test_other_data_is_refused(data, problem):
    with pytest.raises(ValueError) as caught:
        Machine.from_json(data)
    assert problem in str(caught.value)


def test_a_whole_number_of_any_size_is_a_number():
    assert Machine.from_json(BUILT_IN.to_json() | {"flash_gflops": 170}) == BUILT_IN
    with pytest.raises(ValueError, match="flash_gflops"):
        Machine.from_json(BUILT_IN.to_json() | {"flash_gflops": 10**400})


def test_the_fingerprint_is_of_the_rates_alone():
    assert replace(BUILT_IN, name="x", source="y").fingerprint() == BUILT_IN.fingerprint()
    values = BUILT_IN.to_json()
    for name in values.keys() - {"name", "source"}:
        doubled = [2 * rate for rate in values[name]] if isinstance(values[name], list) else 2 * values[name]
        assert Machine.from_json(values | {name: doubled}).fingerprint() != BUILT_IN.fingerprint(), name


def test_without_linear():
    assert BUILT_IN.has_linear and not BUILT_IN.without_linear().has_linear
    assert replace(BUILT_IN.without_linear(), linear_gflops=BUILT_IN.linear_gflops) == BUILT_IN
