"""`maxstack generate MODEL PROMPT…`: continue prompts with a model; text, or one JSON object a line for scripts."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.kernels.quantized_matmul import KINDS
from maxstack.models.compiled_cache import use_compiled_cache
from maxstack.models.generate import prompt_ids
from maxstack.models.generation import Completion, Generator, SamplingParams
from maxstack.models.load import load

STANDARD_INPUT = "-"
SETTINGS = {field.name: field for field in dataclasses.fields(SamplingParams)}
NOT_HERE = ("prompt_logprobs",)
"""Of SamplingParams, for the engine alone."""


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    result = argparse.ArgumentParser(
        prog="maxstack generate",
        description="Continue prompts with a model. The text of one prompt streams to standard output.",
        epilog="A row's tokens depend on its prompt, settings and seed alone, not on the other prompts.",
    )
    result.add_argument("model", help="run folder, checkpoint, model folder, GGUF file or name")
    result.add_argument("prompt", nargs="*", help="texts to continue (default: the start of a document)")
    result.add_argument(
        "--from", dest="source", metavar="FILE",
        help='file of prompts, one a line, or JSON lines with "prompt" (.jsonl); "-" for standard input',
    )  # fmt: skip
    result.add_argument("--json", action="store_true", help="one JSON object a line for each prompt")
    result.add_argument(
        "--batch", type=int, default=8, help="prompts read side by side (default %(default)s)"
    )
    add_settings(result.add_argument_group("how tokens are chosen"))
    result.add_argument("--step", type=int, default=None, help="checkpoint step (default: the newest)")
    result.add_argument(
        "--weights",
        choices=KINDS,
        help="hold the weights of linear layers in few bits (default: as they are)",
    )
    result.add_argument("--averaged", action="store_true", help="use the moving average of the weights")
    return result


def add_settings(group: Any) -> None:
    """A flag for each setting."""
    helps = {
        "max_tokens": "new tokens at most", "min_tokens": "no end token before so many new tokens",
        "temperature": "0: the likeliest token",
        "top_k": "only the k likeliest tokens; 0 for all", "top_p": "only the likeliest tokens of this probability",
        "min_p": "only tokens at least this many times as likely as the likeliest",
        "repetition_penalty": "divides the logits of tokens in prompt and output; 1 for none",
        "presence_penalty": "taken from the logits of tokens in the output",
        "frequency_penalty": "taken from a token's logit for each time it is in the output",
        "seed": "the same seed gives the same text",
    }  # fmt: skip
    for name, text in helps.items():
        default: Any = SETTINGS[name].default
        group.add_argument(
            flag(name), type=type(default), default=default, help=f"{text} (default %(default)s)"
        )
    group.add_argument(
        "--stop", action="append", default=[], help="text that ends the answer; may be repeated"
    )
    group.add_argument(
        "--stop-token-id", dest="stop_token_ids", type=int, action="append", default=[],
        help="token that ends the answer; may be repeated",
    )  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    group.add_argument(
        "--logprobs", type=int, default=None, metavar="N",
        help="with --json: log-probabilities of the tokens and of the N likeliest ones (0 to 20)",
    )  # fmt: skip
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=AMOUNT", type=bias_of, help="may be repeated"
    )


def flag(name: str) -> str:
    """A setting's flag."""
    return "--" + name.replace("_", "-")


def bias_of(text: str) -> tuple[int, float]:
    """The value of one --logit-bias."""
    token, _, amount = text.partition("=")
    return int(token), float(amount)


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    params = SamplingParams(**{name: getattr(args, name) for name in SETTINGS if name not in NOT_HERE})
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}: it must be at least 1")
    prompts = read_prompts(args.prompt, args.source)
    use_compiled_cache()
    model, tokenizer = load(args.model, step=args.step, averaged=args.averaged, weights=args.weights)
    if tokenizer is None:
        raise UserError(f"{args.model}: no tokenizer beside the weights, so there is no way to read a prompt")
    generator = Generator(model, tokenizer)
    del model
    if len(prompts) == 1 and not args.json:
        stream_text(generator, tokenizer, prompts[0], params)
        return 0
    for prompt, completion in batches(generator, tokenizer, prompts, params, args.batch):
        line = as_json(prompt, completion, params) if args.json else f"{prompt}{completion.text}\n"
        print(line, flush=True)
    return 0


def read_prompts(given: Sequence[str], source: str | None) -> list[str]:
    """The prompts of the command line and of the file. Raises UserError for a file that has none or is not text."""
    prompts = list(given)
    if source is not None:
        name = "standard input" if source == STANDARD_INPUT else source
        prompts += list(lines_of(name, read_source(name, source), source.endswith(".jsonl")))
        if not prompts:
            raise UserError(f"{name} has no prompts: give one a line")
    return prompts or [""]


def read_source(name: str, source: str) -> str:
    """The text of a file or of standard input."""
    if source != STANDARD_INPUT and not Path(source).is_file():
        raise UserError(
            f"--from {source}: no such file; give a text file with a prompt a line, or - for standard input"
        )
    try:
        return sys.stdin.read() if source == STANDARD_INPUT else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: byte {error.start} cannot be read") from error


def lines_of(name: str, text: str, is_json: bool) -> Iterator[str]:
    """A prompt for each line that is not empty. Standard input is JSON lines where its first line is an object."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    is_json = is_json or (name == "standard input" and bool(lines) and lines[0][1].lstrip().startswith('{"'))
    for number, line in lines:
        if not is_json:
            yield line.removesuffix("\r")
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f'{name} line {number}: not a JSON object with "prompt"') from error
        if not isinstance(prompt, str):
            raise UserError(f'{name} line {number}: "prompt" is a {type(prompt).__name__}, not a text')
        yield prompt


def stream_text(generator: Generator, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> None:
    """Print a prompt and what follows, as it comes; then, on standard error, how fast it was."""
    events = generator.stream([prompt_ids(tokenizer, prompt)], params)
    start, count, first = time.perf_counter(), 0, None
    print(prompt, end="", flush=True)
    for event in events:
        print(event.text, end="", flush=True)
        count += len(event.token_ids)
        first = first or time.perf_counter()
    print(flush=True)
    end = time.perf_counter()
    waited, rate = (first or end) - start, (count - 1) / max(end - (first or end), 1e-9)
    speed = f", then {rate:.1f} tokens/s" if count > 1 else ""
    print(f"{count} tokens, the first after {waited:.1f} s{speed}", file=sys.stderr)


def batches(
    generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams, size: int
) -> Iterator[tuple[str, Completion]]:
    """Each prompt with its answer, in order, `size` at a time."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for own in ids:
        generator.check(own, params)  # all of them, before the first is answered
    for start in range(0, len(prompts), size):
        end = start + size
        yield from zip(prompts[start:end], generator.generate(ids[start:end], params), strict=True)


def as_json(prompt: str, completion: Completion, params: SamplingParams) -> str:
    """One line of the output."""
    found: dict[str, Any] = {
        "prompt": prompt, "text": completion.text, "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }  # fmt: skip
    if params.logprobs is not None:
        found["logprobs"] = [
            {"token_id": one.token_id, "logprob": one.logprob, "top": [list(pair) for pair in one.top]}
            for one in completion.logprobs
        ]
    return json.dumps(found, ensure_ascii=False)
