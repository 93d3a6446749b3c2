"""Requests for a simulation: when they come, and how long prompts and answers are."""

import math
from dataclasses import dataclass
from functools import cache
from random import Random


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts, log-normal and cut off on both sides, with the stated mean after the cut."""

    mean: int | float
    sigma: int | float
    """Standard deviation of the logarithm; 0 makes all of them equal to the mean."""
    least: int = 1
    most: int = 1 << 30

    def __post_init__(self):
        if not 1 <= self.least <= self.mean <= self.most:
            raise ValueError(f"lengths: mean {self.mean} is not in {self.least} … {self.most}, or least < 1")

    def draw(self, random: Random) -> int:
        """One length."""
        if not self.sigma:
            return round(self.mean)
        mu = _mu(self)
        while True:
            value = round(random.lognormvariate(mu, self.sigma))
            if self.least <= value <= self.most:
                return value

    def mean_at(self, mu: float) -> float:
        """Mean after the cut, of a log-normal distribution whose logarithm has the mean `mu`."""
        a, b = ((math.log(limit) - mu) / self.sigma for limit in (self.least, self.most))
        weight = _normal(b) - _normal(a)
        if weight < 1e-12:  # all of it is on one side
            return self.least if a > 0 else self.most
        shifted = _normal(b - self.sigma) - _normal(a - self.sigma)
        return math.exp(mu + self.sigma**2 / 2) * shifted / weight


@cache
def _mu(lengths: Lengths) -> float:
    """Mean of the logarithm before the cut, by bisection: the mean after the cut rises with it."""
    low, high = math.log(lengths.least) - 10, math.log(lengths.most) + 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths.mean_at(middle) < lengths.mean else (low, middle)
    return low


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


# ShareGPT as vLLM's benchmark samples it: 1,000 requests had 229,711 tokens of prompt and 203,068 of answer
# (github.com/vllm-project/vllm/pull/18566, tokens of Llama 3.1). That benchmark leaves out prompts above 1,024 tokens,
# conversations above 2,048, and anything under 4. The spread is not published: a sigma of 1.1 is our assumption, and
# what depends on the tail of a prediction depends on it.
SHAREGPT_PROMPT = Lengths(mean=229.7, sigma=1.1, least=4, most=1024)
SHAREGPT_ANSWER = Lengths(mean=203.1, sigma=1.1, least=4, most=1024)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that arrive at random at a mean `rate`, or from `clients` that ask again when answered."""

    requests: int
    rate: int | float | None = None
    """Requests a second: a Poisson process."""
    clients: int | None = None
    prompt: Lengths = SHAREGPT_PROMPT
    answer: Lengths = SHAREGPT_ANSWER
    shared: int = 0
    """Tokens that every prompt begins with, besides its own: a system prompt."""
    max_tokens: int | None = None
    """What requests ask for; an answer that is shorter ends by a stop token. None asks for the answer's length."""
    seed: int = 0

    def __post_init__(self):
        if (self.rate is None) == (self.clients is None):
            raise ValueError("load: give one of rate and clients")
