"""Test the vector mathematics against float64, in units in the last place, on every instruction set."""

import numpy as np
import pytest

from mopo_fast.backends import cpu

RNG = np.random.default_rng(0)
COUNT = 300_003
UNIFORM = ((RNG.integers(0, 2**23, COUNT) + 0.5) * 2.0**-23).astype(np.float32)
EDGES = np.array([2.0**-24, 1 - 2.0**-24], dtype=np.float32)


def evaluate(isa, function, x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.full_like(x, np.nan)
    extension = cpu.extension()
    extension.math(isa, getattr(extension.MathFunction, function), x.ctypes.data, y.ctypes.data, len(x))
    return y


def around(scale):
    x = RNG.normal(0.0, scale, COUNT)
    return np.concatenate([x, x * 1e-4]).astype(np.float32)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(
    ("function", "x", "exact", "bound"),
    [
        ("exp", RNG.uniform(-87.3, 88.7, COUNT), np.exp, 2),
        ("exp", RNG.uniform(-0.5, 0.5, COUNT), np.exp, 2),
        ("log", np.concatenate([UNIFORM, EDGES]), np.log, 2),
        ("tanh", around(2.0), np.tanh, 3),
        ("silu", around(4.0), lambda x: x / (1.0 + np.exp(-x)), 4),
        ("reciprocal", np.exp(RNG.uniform(-86.0, 86.0, COUNT)), lambda x: 1.0 / x, 2),
        ("sqrt", np.exp(RNG.uniform(-87.0, 88.0, COUNT)), np.sqrt, 2),
    ],
    ids=["exp", "exp-small", "log", "tanh", "silu", "reciprocal", "sqrt"],
)
def test_units_in_the_last_place(isa, function, x, exact, bound):
    x = x.astype(np.float32)
    truth = exact(x.astype(np.float64))
    unit = np.spacing(np.abs(truth).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(evaluate(isa, function, x) - truth) / unit) <= bound


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2.0**-13), ("bfloat16x3", 2.0**-17)])
def test_silu_of_factors(isa, precision, bound):
    """Factors are rounded to bfloat16 with errors up to 2^-8, or to a sum of two with errors up to 2^-16."""
    function = f"silu_{precision}"
    x = np.concatenate([around(4.0), RNG.uniform(-86.0, 100.0, COUNT)]).astype(np.float32)
    truth = x / (1.0 + np.exp(-x.astype(np.float64)))
    assert np.max(np.abs(evaluate(isa, function, x) / truth - 1.0)) <= bound
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -200.0, -3e38], dtype=np.float32)
    expected = np.array([np.nan, np.inf, np.nan, 0.0, 0.0, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(evaluate(isa, function, special), expected)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("function", "exact"), [("sin_turns", np.sin), ("cos_turns", np.cos)])
def test_turns(isa, function, exact):
    x = np.concatenate([UNIFORM, EDGES])
    truth = exact(2.0 * np.pi * x.astype(np.float64))
    assert np.max(np.abs(evaluate(isa, function, x) - truth)) <= 2 * 2.0**-23


@pytest.mark.parametrize("isa", cpu.isas())
def test_special_values(isa):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, 200.0, -200.0], dtype=np.float32)
    np.testing.assert_array_equal(evaluate(isa, "exp", x), [np.nan, np.inf, 0.0, 1.0, np.inf, 0.0])
    np.testing.assert_array_equal(evaluate(isa, "tanh", x), [np.nan, 1.0, -1.0, 0.0, 1.0, -1.0])
    np.testing.assert_array_equal(evaluate(isa, "silu", x), [np.nan, np.inf, np.nan, 0.0, 200.0, 0.0])
    root = evaluate(isa, "sqrt", np.array([0.0, np.inf, np.nan], dtype=np.float32))
    assert root[0] == 0.0 and root[1] > 1e19 and np.isnan(root[2])
