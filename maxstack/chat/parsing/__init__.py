"""What a model says, taken apart while it comes: thoughts, text, calls of tools.

parser = parser_for(tokenizer.chat_template, vocabulary=tokenizer.added_tokens, tools=tools)
pieces = parser.feed(text)  # as often as text comes
pieces += parser.end()

Of an answer that is there as a whole the same is asked once. No jax in here.
"""

from maxstack.chat.parsing.parser import Parser, parser_for
from maxstack.chat.parsing.pieces import CallArguments, CallStart, Piece, Reasoning, Text, joined
from maxstack.chat.parsing.styles import STYLES, Style, style_for

__all__ = [
    "STYLES",
    "CallArguments",
    "CallStart",
    "Parser",
    "Piece",
    "Reasoning",
    "Style",
    "Text",
    "joined",
    "parser_for",
    "style_for",
]
