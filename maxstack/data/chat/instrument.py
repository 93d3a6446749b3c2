"""What is added to a template's syntax tree before it is compiled: counting, and marks around what each message wrote.

Whitespace control is done when the text is cut into tokens, so nothing that is added to the tree changes the output.
"""

from contextvars import ContextVar
from typing import Any, cast

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from maxstack.data.chat.budget import budget
from maxstack.data.chat.marks import Marks

writing: ContextVar[Marks | None] = ContextVar("template_marks", default=None)
"""The marks of the rendering that is under way; None writes none."""


class Instrument(Extension):
    """The functions that an instrumented tree calls, and the tag `{% generation %}`."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """`{% generation %} … {% endgeneration %}`: what is inside, between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = _written("generation", nodes.Const(True)), _written("generation", nodes.Const(False))
        return nodes.Scope([first, *body, last]).set_lineno(line)

    def tick(self) -> None:
        """One more round."""
        budget().charge()

    def built(self, value: Any) -> Any:
        """A value, once its size is counted."""
        return budget().made(value)

    def joined(self, *parts: Any) -> str:
        """Texts next to each other, as `~` makes them."""
        texts = [str(budget().made(part)) for part in parts]
        budget().plan(sum(map(len, texts)))
        return "".join(texts)

    def turn(self, value: Any, loop: int) -> str:
        """A mark where a message begins to be written; nothing where the value is no message."""
        marks = writing.get()
        return "" if marks is None else marks.turn(value, loop)

    def turns_end(self, loop: int) -> str:
        """A mark where a loop has ended."""
        marks = writing.get()
        return "" if marks is None else marks.turns_end(loop)

    def generation(self, begins: bool) -> str:
        """A mark where the template says that the model's own text begins or ends."""
        marks = writing.get()
        return "" if marks is None else marks.generation(begins)


def _call(name: str, *values: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.ExtensionAttribute(Instrument.identifier, name), list(values), [], None, None)


def _written(name: str, *values: nodes.Expr) -> nodes.Output:
    return nodes.Output([_call(name, *values)])


class _Additions(NodeTransformer):
    def __init__(self):
        self._loops = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802
        self._loops += 1
        loop = nodes.Const(self._loops)
        self.generic_visit(node)
        first: list[nodes.Node] = [nodes.ExprStmt(_call("tick"))]
        if isinstance(node.target, nodes.Name):
            first.append(_written("turn", nodes.Name(node.target.name, "load"), loop))
        node.body = [*(one.set_lineno(node.lineno) for one in first), *node.body]
        return [node, _written("turns_end", loop).set_lineno(node.lineno)]

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(_call("tick")).set_lineno(node.lineno), *node.body]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes).set_lineno(node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        # A slice is a copy, and the only subscript that is not taken through the environment.
        self.generic_visit(node)
        return _built(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        # Comparing takes as long as what is compared is large.
        self.generic_visit(node)
        node.expr = _built(node.expr)
        for operand in node.ops:
            operand.expr = _built(operand.expr)
        return node

    def _container(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _built(node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Dict = visit_Tuple = _container  # noqa: N815


def _built(node: nodes.Expr) -> nodes.Expr:
    if isinstance(node, nodes.Const):
        return node
    call = _call("built", node)
    call.set_lineno(node.lineno)
    return call


def instrumented(tree: nodes.Template) -> nodes.Template:
    """The tree with counting and marks."""
    done = cast(nodes.Template, _Additions().visit(tree))
    return cast(nodes.Template, done.set_environment(tree.environment)) if tree.environment else done
