"""Generation: a model and settings in, tokens and text out."""

from maxstack.models.generation.generator import Generator, Session
from maxstack.models.generation.output import Completion, Event, TokenLogprobs
from maxstack.models.generation.params import SamplingParams
from maxstack.models.generation.text import TextStream

__all__ = ["Completion", "Event", "Generator", "SamplingParams", "Session", "TextStream", "TokenLogprobs"]
