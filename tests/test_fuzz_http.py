"""A quick form of tests/fuzz_http.py, which ``make fuzz`` runs by the thousand."""

import pytest

from tests.fuzz_http import server, test_what_comes_over_a_socket

__all__ = ["server", "test_what_comes_over_a_socket"]


@pytest.fixture
def cases() -> int:
    return 20
