"""What the HTTP front is told at its start."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one server. Whoever has `api_keys` may ask; management routes take the `management_key` alone."""

    model_name: str
    """The name under which the model is listed and asked for."""
    aliases: tuple[str, ...] = ()
    """Further names that mean the same model."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Without any, everybody may ask."""
    management_key: str | None = field(default=None, repr=False)
    """Without one, there are no management routes."""
    tls: tuple[Path, Path] | None = None
    """Files of the certificate (with its chain) and its key, in PEM; without them the server speaks plain HTTP."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may ask; by default none but our own."""
    chat_template: str | None = None
    """Jinja text, or "chatml", in place of the tokenizer's own."""
    parser: str | None = None
    """How the model spells tool calls and reasoning; by default what its chat template says."""
    log_prompts: bool = False
    local_names_only: bool = False
    """Refuse requests that were sent to another name than this machine's own: a page elsewhere may let its own name
    point here (DNS rebinding), and a browser would then let it ask."""

    body_bytes: int = 2_000_000
    """Of a request's body."""
    header_bytes: int = 16_384
    """Of all headers together."""
    header_s: float = 15.0
    """Seconds in which a request's first lines and headers must have come."""
    body_s: float = 30.0
    """Seconds in which a body must have come."""
    send_s: float = 60.0
    """Seconds for which a reader may take nothing before it is given up."""
    keep_alive_s: float = 15.0
    """Seconds of silence after which a stream sends a comment, so that nobody in between takes it for dead."""
    depth: int = 100
    """Brackets within brackets in a body's JSON."""
    most_prompts: int = 1024
    """Prompts of a request."""
    most_answers: int = 128
    """Answers to one prompt (n and best_of)."""
    most_sequences: int = 1024
    """Prompts times answers of a request."""
    most_tokens: int = 1_000_000
    """Tokens that one request may ask for: sequences times max_tokens."""
    deadline_s: float | None = None
    """Seconds after which a request is ended, unless it asks for fewer."""
