"""Requests made from the OpenAPI schema, such as fit it and such as do not: no 500, no hang, nothing left behind."""

import json

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode

from tests.serve.http.serving import settle

POSTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
)  # fmt: skip
FEW, MANY = 5, 170
"""Cases a route and mode: 60 in the usual run, 2,040 in the long one."""


# schemathesis draws by chance of its own here and there.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_dict(requests.get(f"{url}/openapi.json", timeout=20).json())


def within_reach(body):
    """So that positive cases are answered: this model, a few tokens, time enough."""
    if isinstance(body, dict):
        body |= {"model": "tiny"}
        body.pop("timeout_s", None)
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], 4)
    return body


def hold_against(url: str, schema, path: str, mode: GenerationMode, cases: int) -> set[int]:
    """Send so many; the statuses that came."""
    statuses: set[int] = set()
    strategy = schema[path]["POST"].as_strategy(generation_mode=mode)
    settings = hypothesis.settings(
        max_examples=cases, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    @settings
    @hypothesis.given(case=strategy)
    def hold(case):
        if mode == GenerationMode.POSITIVE and len(str(case.body)) % 2:
            case.body = within_reach(case.body)
        answer = case.call(base_url=url, timeout=30)
        statuses.add(answer.status_code)
        assert answer.status_code < 500 or answer.status_code == 504, answer.text
        if answer.status_code >= 400:
            assert {*json.loads(answer.text)["error"]} == {"message", "type", "param", "code"}

    hold()
    return statuses


@pytest.mark.parametrize("path", POSTS)
def test_a_few_requests_of_either_kind_are_answered(url, engine, schema, path):
    statuses = hold_against(url, schema, path, GenerationMode.POSITIVE, FEW)
    statuses |= hold_against(url, schema, path, GenerationMode.NEGATIVE, FEW)
    assert 400 in statuses
    assert engine.dead is None
    settle(engine)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
def test_very_many_are(url, engine, schema, path):
    assert 200 in hold_against(url, schema, path, GenerationMode.POSITIVE, MANY)
    hold_against(url, schema, path, GenerationMode.NEGATIVE, MANY)
    assert engine.dead is None
    settle(engine)
