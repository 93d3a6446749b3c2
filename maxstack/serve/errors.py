"""How a request ends badly through no fault of its own."""

from maxstack.config.errors import RunError


class RequestFailed(RunError):
    """This request failed; others go on."""


class NotFinite(RequestFailed):
    """The model's logits for this request were no finite numbers."""


class StepFailed(RequestFailed):
    """The device failed in a step that the request was part of, more often than it is tried again."""


class ConstraintFailed(RequestFailed):
    """The answer could not go on in the form that it was to have."""


class Unfinished(RequestFailed):
    """The request was ended before it had what it was for: by its deadline, or from outside."""

    def __init__(self, message: str, reason: str | None):
        super().__init__(message)
        self.reason = reason


class EngineDead(RequestFailed):
    """The engine has stopped: it was closed, or met a fault that it cannot go on after."""
