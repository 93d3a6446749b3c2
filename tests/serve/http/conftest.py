"""One engine and one server for all tests that do not need their own."""

import pytest

from tests.serve.http.serving import client_of, served, tiny_engine


@pytest.fixture(scope="session")
def engine():
    engine = tiny_engine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def url(engine):
    with served(engine) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    """The unmodified client."""
    with client_of(url) as client:
        yield client
