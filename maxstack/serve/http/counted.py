"""What is counted of a request: its tokens, and how its answers ended."""

import time
from typing import Any

from maxstack.serve.http.errors import ended
from maxstack.serve.http.operation import Seen


def finish_of(reason: str | None, seen: Seen) -> str:
    """A finish reason as OpenAI has it. Raises for an end that is a failure."""
    if reason not in ("stop", "length"):
        raise ended(reason)
    seen.finish_reasons.append(reason)
    return reason


def note_tokens(seen: Seen, tokens: int) -> None:
    """Count tokens that have come."""
    if tokens:
        seen.last_token = time.monotonic()
        seen.first_token = seen.first_token or seen.last_token
        seen.completion_tokens += tokens


def usage(prompt: int, seen: Seen) -> dict[str, Any]:
    """As OpenAI counts."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": seen.completion_tokens,
        "total_tokens": prompt + seen.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": seen.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": seen.reasoning_tokens},
    }
