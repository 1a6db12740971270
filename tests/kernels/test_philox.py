"""Test Philox against published vectors in Python and C++, and the numbers made from its words."""

import itertools
import math
from collections import Counter

import pytest
import torch

from mopo_fast.backends import cpu
from mopo_fast.backends.philox import (
    CRITIC_STREAM,
    MEMBER_STREAM,
    NOISE_STREAM,
    philox4x32,
    random_choice,
    random_normals,
    random_subset,
    random_words,
)

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_python(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_cpp(counter, key, expected):
    assert tuple(cpu.extension().philox4x32(list(counter), key[0] | key[1] << 32)) == expected


def test_words_depend_on_every_part_of_the_counter():
    rows = torch.tensor([0, 1, 2**32, 2**40 + 3])
    words = random_words(rows, 0, NOISE_STREAM, 6, seed=7)
    assert words.shape == (4, 6) and words.unique().numel() == 24
    assert ((words >= 0) & (words < 2**32)).all()
    for other in (
        random_words(rows, 1, NOISE_STREAM, 6, seed=7),
        random_words(rows, 0, MEMBER_STREAM, 6, seed=7),
        random_words(rows, 0, NOISE_STREAM, 6, seed=7 + 2**32),
    ):
        assert not (other == words).any()


def test_words_do_not_depend_on_the_batch_or_the_count():
    rows = torch.arange(100)
    whole = random_words(rows, 3, NOISE_STREAM, 18, seed=5)
    assert torch.equal(whole[40:60, :5], random_words(rows[40:60], 3, NOISE_STREAM, 5, seed=5))


def test_normals_are_standard_normal():
    z = random_normals(torch.arange(200_000), 0, NOISE_STREAM, 4, seed=1, dtype=torch.float64)
    count = z.shape[0]
    assert z.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (z.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / count)
    assert (z.pow(4).mean(0) - 3).abs().max() < 5 * math.sqrt(96 / count)
    correlation = z.T @ z / count - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 * math.sqrt(2 / count)
    # Kolmogorov-Smirnov test at a level of about 1e-6.
    ordered = z.flatten().sort().values
    cdf = torch.special.ndtr(ordered)
    grid = torch.arange(1, z.numel() + 1, dtype=torch.float64) / z.numel()
    assert (cdf - grid).abs().max() < 2.7 / math.sqrt(z.numel())


def test_choice_is_uniform():
    counts = random_choice(torch.arange(70_000), 0, MEMBER_STREAM, 7, seed=2).bincount(minlength=7)
    assert counts.shape == (7,)
    chi_square = float(((counts - 10_000).square() / 10_000).sum())
    assert chi_square < 40.0  # six degrees of freedom: p about 5e-7


@pytest.mark.parametrize(("count", "choices"), [(1, 1), (1, 7), (2, 5), (3, 6), (9, 10), (10, 10)])
def test_subset_is_uniform(count, choices):
    steps = torch.arange(20_000)
    drawn = random_subset(steps, CRITIC_STREAM, count, choices, seed=2)
    assert drawn.shape == (20_000, count) and drawn.min() >= 0 and drawn.max() < choices
    assert (drawn.diff(dim=1) > 0).all()
    subsets = list(itertools.combinations(range(choices), count))
    found = Counter(map(tuple, drawn.tolist()))
    expected = len(steps) / len(subsets)
    chi_square = sum((found[subset] - expected) ** 2 / expected for subset in subsets)
    freedom = len(subsets) - 1
    assert chi_square <= freedom + 6 * math.sqrt(2 * freedom)
    # A draw belongs to its step and its seed alone.
    assert torch.equal(random_subset(steps[50:60], CRITIC_STREAM, count, choices, seed=2), drawn[50:60])
    if count < choices:
        assert not torch.equal(random_subset(steps, CRITIC_STREAM, count, choices, seed=3), drawn)
