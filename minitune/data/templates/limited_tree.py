"""The tree of a chat template with filters that count its work (limited_jinja.py).

Filters stand around the items of loops, the values that are set, lists that are written, and sums
of more than `MANY_OPERANDS` operands.
"""

from collections.abc import Callable

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from minitune.data.templates.limited_jinja import (
    LimitedEnvironment,
    limited_added,
    limited_iterated,
    limited_joined,
    limited_measured,
)

MANY_OPERANDS = 32


def limited_tree(tree: nodes.Template, environment: LimitedEnvironment) -> nodes.Template:
    """Return a parsed template in which the filters above stand for parts of the language.

    Raises: ValueError if it sets the escaping of HTML, which no text for a model needs.
    """
    if next(tree.find_all(nodes.EvalContextModifier), None):
        raise ValueError("it sets autoescape, and a text for a model is not HTML; remove that")
    environment.weights = {None: _weight(tree)}
    for macro in tree.find_all(nodes.Macro):
        weight = max(_weight(macro), environment.weights.get(macro.name, 0))
        environment.weights[macro.name] = weight
    return _Limiter().visit(tree)


def _weight(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node))


class _Limiter(NodeTransformer):
    """A visitor that puts filters around loops, kept values, literals and long sums."""

    _is_long_sum: bool | None = None  # of the sum that is visited, None outside of sums

    def visit_For(self, node: nodes.For) -> nodes.For:
        weight = nodes.Const(_weight(node))
        self.generic_visit(node)
        node.iter = _filter(limited_iterated, node.iter, weight)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = _kept(node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.With:
        self.generic_visit(node)
        node.values = list(map(_kept, node.values))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.defaults = list(map(_kept, node.defaults))
        return node

    visit_CallBlock = visit_Macro

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(map(_is_constant, node.items)) else _filter(limited_measured, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return node if node.ctx != "load" else self.visit_List(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        parts = (part for pair in node.items for part in (pair.key, pair.value))
        return node if all(map(_is_constant, parts)) else _filter(limited_measured, node)

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        return _filter(limited_added, node.left, node.right) if self._is_long(node) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return _filter(limited_joined, *node.nodes) if self._is_long(node) else node

    def _is_long(self, node: nodes.Expr) -> bool:
        """Return True if the outermost sum around a node has many operands; visit the node."""
        outer = self._is_long_sum
        if outer is None:
            names = sum(1 for _ in node.find_all(nodes.Name))
            self._is_long_sum = names > MANY_OPERANDS
        self.generic_visit(node)
        is_long, self._is_long_sum = self._is_long_sum, outer
        return is_long


def _filter(function: Callable, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, function.__name__, list(args), [], None, None, lineno=node.lineno)


def _kept(node: nodes.Expr) -> nodes.Expr:
    """Return an expression that is measured, unless its value exists or is short."""
    exists = nodes.Const | nodes.Name | nodes.Getattr | nodes.Getitem | nodes.Test | nodes.Compare
    return node if isinstance(node, exists | nodes.Not) else _filter(limited_measured, node)


def _is_constant(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const)
