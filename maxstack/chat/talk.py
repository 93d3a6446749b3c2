"""A talk: inputs one by one, each a command or a question, until one leaves."""

from collections.abc import Callable, Generator
from contextlib import closing

from maxstack.chat import commands
from maxstack.chat.conversation import Conversation
from maxstack.chat.keyboard import CtrlC, Interrupts, Lines, question
from maxstack.chat.reasoning import Piece
from maxstack.chat.rendered import Decoder
from maxstack.chat.screen import Screen
from maxstack.config import RunError, UserError

Answer = Callable[[Callable[[], bool]], Generator[Piece]]


class Talk:
    """One person, or one pipe, and one conversation."""

    def __init__(
        self, conversation: Conversation, tokenizer: Decoder, screen: Screen, interrupts: Interrupts
    ):
        self.conversation, self.tokenizer, self.screen = conversation, tokenizer, screen
        self._interrupts = interrupts
        self.faults = 0
        """Inputs that came to nothing."""

    def on_terminal(self, keyboard: Lines) -> None:
        """Until /quit, Ctrl-D, or Ctrl-C twice at an empty prompt."""
        warned = False
        while True:
            try:
                text = question(keyboard)
            except EOFError:
                self.screen.out.print()
                return
            except CtrlC as pressed:
                self.screen.out.print()
                if warned and not pressed.line:
                    return
                if not pressed.line:
                    self.screen.note("press Ctrl-C again, or Ctrl-D, to leave; /help lists the commands")
                warned = not pressed.line
                continue
            warned = False
            try:
                if not self.take(text):
                    return
            except CtrlC:
                self.screen.note("stopped")

    def through_pipe(self, pipe: Lines) -> None:
        """Until the pipe ends, or /quit. Raises KeyboardInterrupt at Ctrl-C, also when it has stopped an answer."""
        while True:
            try:
                text = question(pipe)
            except EOFError:
                return
            if not self.take(text):
                return
            if self._interrupts.asked:
                raise KeyboardInterrupt

    def take(self, text: str) -> bool:
        """Do what one input says; False to leave. A fault is shown, and counted."""
        try:
            return self._taken(text)
        except BrokenPipeError:  # nobody reads any more
            raise
        except (UserError, RunError, OSError, MemoryError, RuntimeError) as error:
            # By name: the type is a RuntimeError, which any bug may be.
            if type(error) is RuntimeError or isinstance(error, NotImplementedError | RecursionError):
                raise
            self.faults += 1
            self.screen.fault(str(error) or type(error).__name__)
            return True

    def _taken(self, text: str) -> bool:
        if not text.strip():
            return True
        if text.startswith("/") and not text.startswith("//"):
            word, _, rest = text.partition(" ")
            command = commands.find(word.strip())
            if command.run is None:
                return False
            command.run(self, rest.strip())
        else:
            self.ask(text[1:] if text.startswith("//") else text)
        return True

    def one(self, text: str) -> None:
        """Answer one question. Raises what goes wrong with it, and KeyboardInterrupt at Ctrl-C."""
        self.ask(text)
        if self._interrupts.asked:
            raise KeyboardInterrupt

    def ask(self, text: str) -> None:
        """Show the answer to a question, whatever it begins with."""
        self._show(lambda stopped: self.conversation.ask(text, stopped))

    def again(self) -> None:
        """Show another answer in place of the last."""
        self._show(self.conversation.again)

    def _show(self, answer: Answer) -> None:
        """An answer as it comes, then what it took. CtrlC passes through, once that is done."""
        before, begun = self.conversation.figures, False
        try:
            with self._interrupts.answering(), closing(answer(lambda: self._interrupts.asked)) as pieces:
                for piece in pieces:
                    begun = True
                    self._interrupts.coming()
                    self.screen.piece(piece)
        finally:
            if begun:
                self.screen.end()
            figures = self.conversation.figures
            if figures is not None and figures is not before:
                self.screen.figures(figures)
