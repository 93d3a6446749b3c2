"""`maxstack chat MODEL`: talk with a model in the terminal, or through a pipe."""

import argparse
import sys
from collections.abc import Sequence
from io import TextIOBase
from pathlib import Path
from typing import cast

from maxstack.chat.commands import COMMANDS
from maxstack.chat.conversation import Conversation
from maxstack.chat.ends import ends_of
from maxstack.chat.keyboard import Interrupts, Keyboard, Pipe, history_file
from maxstack.chat.saved import load as load_saved
from maxstack.chat.screen import Screen
from maxstack.chat.settings import Settings
from maxstack.chat.talk import Talk
from maxstack.config import UserError
from maxstack.data.chat import ChatRenderer, renderer_for
from maxstack.data.tokenizer import Tokenizer
from maxstack.kernels.quantized_matmul import KINDS
from maxstack.models.compiled_cache import use_compiled_cache
from maxstack.models.generation import Generator
from maxstack.models.load import load

DONE, FAILED = 0, 1
CHATML = "chatml"
LARGEST_TEMPLATE = 4 * 2**20
"""Bytes of a template's file that are read at most."""


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    result = argparse.ArgumentParser(
        prog="maxstack chat",
        description="Talk with a model. On a terminal, /help lists the commands; through a pipe, each line is a "
        "question or a command, answers go to standard output and everything else to standard error.",
    )
    add = result.add_argument
    add("model", help="run folder, model folder, GGUF file, hf:owner/name, or a packaged model")
    add(
        "-m",
        "--message",
        action="append",
        help="ask this, print the answer and leave; again for the next question",
    )
    add("--system", metavar="TEXT", help="the system message")
    add(
        "--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="a setting, as /set does: temperature, top_p, top_k, min_p, max_tokens, seed, …",
    )  # fmt: skip
    add(
        "--template",
        metavar="FILE",
        help="a chat template to use instead of the model's: a jinja file, or chatml",
    )
    add("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    add("--dtype", choices=("bfloat16", "float32"), help="compute type (default: what suits the machine)")
    add(
        "--weights",
        choices=KINDS,
        help="hold the weights of linear layers in few bits (default: as they are)",
    )
    add("--step", type=int, help="checkpoint step of a run (default: the newest)")
    add("--averaged", action="store_true", help="the moving average of a run's weights")
    add("--no-history", action="store_true", help=f"do not remember inputs in {history_file()}")
    add("--quiet", action="store_true", help="no figures after an answer")
    add("--reasoning", action="store_true", help="write the model's thoughts to a pipe too")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    settings = Settings()
    for name, value in args.set:
        settings = settings.changed(name, value)
    screen, interrupts = Screen(figures=not args.quiet, reasoning=args.reasoning), Interrupts()
    terminal = not args.message and sys.stdin.isatty() and screen.out.is_terminal
    if screen.err.is_terminal:
        with screen.err.status(f"reading {args.model} …"):
            talk = opened(args, settings, screen, interrupts)
    else:
        talk = opened(args, settings, screen, interrupts)
    with interrupts.handled():
        return on_terminal(talk, args) if terminal else through_pipe(talk, args.message)


def on_terminal(talk: Talk, args: argparse.Namespace) -> int:
    """Talk until one leaves."""
    talk.screen.note(
        f"{args.model}, {talk.conversation.context:,} tokens of context · /help lists the commands"
    )
    with Keyboard(None if args.no_history else history_file(), COMMANDS) as keyboard:
        talk.on_terminal(keyboard)
    return DONE


def through_pipe(talk: Talk, messages: Sequence[str] | None) -> int:
    """Answer the messages, or each line of standard input; FAILED if one of these came to nothing."""
    if messages:
        for message in messages:
            talk.one(message)
        return DONE
    talk.through_pipe(Pipe(cast(TextIOBase, sys.stdin)))
    return FAILED if talk.faults else DONE


def opened(args: argparse.Namespace, settings: Settings, screen: Screen, interrupts: Interrupts) -> Talk:
    """The model, ready to talk."""
    use_compiled_cache()
    model, tokenizer = load(
        args.model, step=args.step, averaged=args.averaged, dtype=args.dtype, weights=args.weights
    )
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer beside it, so there is no way to read a question")
    renderer = renderer_of(args, tokenizer)
    ends = ends_of(renderer, tokenizer)
    conversation = Conversation(
        Generator(model, tokenizer, end_ids=ends.ids), renderer, context=model.config.max_length,
        model=args.model, settings=settings, stops=ends.texts,
    )  # fmt: skip
    if args.load:
        load_saved(conversation, Path(args.load).expanduser())
    if args.system is not None:
        conversation.set_system(args.system)
    return Talk(conversation, tokenizer, screen, interrupts)


def renderer_of(args: argparse.Namespace, tokenizer: Tokenizer) -> ChatRenderer:
    """The renderer by the model's template, or by the one that --template names."""
    if args.template not in (None, CHATML):
        return renderer_for(tokenizer, template_in(Path(args.template).expanduser()))
    if args.template is None and not tokenizer.chat_template:
        raise UserError(
            f"{args.model} has no chat template, as base models have none: give one with --template FILE (jinja) or "
            f"--template {CHATML}; `maxstack generate` continues text without one"
        )
    return renderer_for(tokenizer, args.template)


def template_in(file: Path) -> str:
    """The text of a template's file."""
    try:
        if not file.is_file():
            raise UserError(f"--template {file} is no file: give a jinja file, or {CHATML}")
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise UserError(
                f"--template {file} has more than {LARGEST_TEMPLATE:,} bytes, the longest that is read"
            )
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--template {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--template {file} is not UTF-8 text: {error}") from error
