"""Fixtures of the tests that run whole federations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.federation import Federation
from tests.support.heart import shared_data


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """A running server without sites."""
    with Federation(tmp_path) as federation:
        yield federation.start_server()


@pytest.fixture(scope="session")
def heart_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data of the four hospitals."""
    return shared_data(tmp_path_factory)
