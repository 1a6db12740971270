"""Fixtures of all tests of runs."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_pictures(unrendered: None) -> None:
    """Leave out the rendering of pictures, at which no test here looks."""
