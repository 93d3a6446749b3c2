"""One engine and one server for all tests that do not need their own."""

import openai
import pytest

from tests.serve.http.serving import served, tiny_engine


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
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
