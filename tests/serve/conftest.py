"""What tests of the server share."""

from tests.models.generation.conftest import compilations

__all__ = ["compilations"]
