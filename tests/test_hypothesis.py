"""Any geometry: hypothesis looks for the sizes nobody thought of."""

from __future__ import annotations

import grid
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_odd = st.sampled_from([1, 3, 5])
_side = st.one_of(st.integers(0, 9), st.integers(10, 40))
_dilation = st.one_of(st.integers(1, 12), st.tuples(st.integers(1, 40), st.integers(1, 40)))


@st.composite
def _cases(draw: st.DrawFn) -> grid.Case:
    channels = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    count = len(channels)
    return grid.Case(
        "",
        channels=tuple(channels),
        out_channels=draw(st.integers(1, 20)),
        size=(draw(st.integers(0, 3)), draw(_side), draw(_side)),
        kernel=(draw(_odd), draw(_odd)),
        dilations=tuple(draw(st.lists(_dilation, min_size=count, max_size=count))),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        psi=draw(st.sampled_from(["same", None])),
        bias=draw(st.booleans()),
        relu=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "slice", "slice_last"])),
        grad_layout=draw(st.sampled_from(["contiguous", "channels_last", "every_other"])),
    )


@pytest.mark.parametrize("backend", grid.BACKENDS)
@pytest.mark.filterwarnings("ignore:d3net_kernels runs on plain torch")
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(case=_cases(), seed=st.integers(0, 2**31))
def test_right(backend: str, case: grid.Case, seed: int) -> None:
    problem = case.problem(torch.Generator().manual_seed(seed))
    grid.assert_right(problem, grid.BACKENDS[backend](problem))
