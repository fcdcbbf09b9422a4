import logging

import pytest
import torch
from torch import nn

from uoe_peft import precision


@pytest.fixture
def measured(monkeypatch):
    """A machine that needs 40 times as long in bfloat16, and twice in float64."""
    times = {torch.float32: 1e-5, torch.bfloat16: 4e-4, torch.float64: 2e-5, torch.float16: 1e-5}
    monkeypatch.setattr(precision, "_seconds", times.__getitem__)
    precision.slowdown.cache_clear()
    precision._say.cache_clear()
    yield times
    precision.slowdown.cache_clear()
    precision._say.cache_clear()


def test_slow_is_what_takes_many_float32_products(measured):
    assert precision.slowdown(torch.bfloat16) == pytest.approx(40)
    assert [d for d in measured if precision.is_slow(d)] == [torch.bfloat16]
    assert not precision.is_slow(torch.bfloat16, "cuda")
    assert precision.fast_dtype(torch.bfloat16) == torch.float32
    assert precision.fast_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert precision.fast_dtype(torch.float16) == torch.float16


def test_a_type_is_measured_once(measured):
    precision.slowdown(torch.bfloat16)
    measured.clear()
    assert precision.slowdown(torch.bfloat16) == pytest.approx(40)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_types_that_nothing_is_computed_in_are_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        precision.slowdown(dtype)


def test_the_type_is_that_of_most_weights_or_of_autocast(measured):
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3).bfloat16(), nn.LayerNorm(3))
    assert precision.slow_compute_dtype(model) is None
    assert precision.slow_compute_dtype(model.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert precision.slow_compute_dtype(model) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert precision.slow_compute_dtype(model.float()) == torch.bfloat16
    assert precision.slow_compute_dtype(nn.LayerNorm(3)) is None
    assert precision.slow_compute_dtype(nn.Linear(4, 3).to(torch.float8_e4m3fn)) is None
    assert precision.slow_compute_dtype(nn.Linear(4, 3, device="meta", dtype=torch.bfloat16)) is None


def test_it_is_said_once(measured, caplog):
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        for _ in range(2):
            precision.say_if_slow(nn.Linear(4, 3).bfloat16())
            precision.say_if_slow(nn.Linear(4, 3))
    assert caplog.text.count("computes in bfloat16, in which matrix products take 40 times as long") == 1


def test_a_real_measurement_takes_little_time_and_finds_float64_no_more_than_slow():
    assert 0 < precision._seconds(torch.float32) < 0.1
    assert precision._seconds(torch.float64) > 0
