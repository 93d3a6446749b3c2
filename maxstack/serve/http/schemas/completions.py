"""The request of /v1/completions."""

from typing import Annotated, Any

from pydantic import Field

from maxstack.models.generation.params import MOST_LOGPROBS
from maxstack.serve.http.schemas.base import Text, TokenId
from maxstack.serve.http.schemas.chat import ResponseFormat
from maxstack.serve.http.schemas.sampling import Sampling

MOST_IDS = 1_000_000
MOST_PROMPTS = 2048
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_IDS, fail_fast=True)]
Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
)


class CompletionRequest(Sampling):
    """Text or tokens to be continued."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """The same of the prompt's tokens, in vLLM's form."""
    echo: bool | None = None
    suffix: Text | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None
    """Whether a text begins with the model's token for the start of a document: by default, as when it was trained."""
    parse_special: bool | None = None
    """Whether the names of special tokens in a text are those tokens: they are, as in other servers."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several of them, as a list."""
        return as_list(self.prompt)


def as_list(prompt: Prompt) -> list[str | list[int]]:
    """One prompt or several, as several."""
    if isinstance(prompt, str):
        return [prompt]
    given: list[Any] = list(prompt)
    return [given] if isinstance(given[0], int) else given
