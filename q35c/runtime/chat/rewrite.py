"""Rewrite the syntax tree of a template, so that work of any size is paid for.

Loops, comparisons, slices, texts put together and containers go through filters of `environment`. Every
body that can run more than once begins with a payment for its nodes.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from q35c.runtime.chat.budget import MAX_BITS, STEP, TooMuch

MAX_NODES = 20_000
MAX_NODE_DEPTH = 100
PREFIX = "paid "  # no template can write a name like this one, but it may pass it to `map`


class Payer(NodeTransformer):
    """Rewrite a syntax tree so that work of any size goes through the filters below."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Pay for every item, and in every pass for the nodes of the body."""
        cost = _cost(node.body)
        test_cost = 0 if node.test is None else _cost([node.test])
        self.generic_visit(node)
        node.iter = _call("loop", node.iter)
        node.body.insert(0, nodes.ExprStmt(_call("nodes", nodes.Const(cost)), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("nodes", nodes.Const(test_cost)), node.test)
        return node

    def _visit_body(self, node: Any) -> nodes.Node:
        cost = _cost([*node.body, *getattr(node, "defaults", ())])
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("nodes", nodes.Const(cost)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Pay for the operands."""
        self.generic_visit(node)
        pairs = [part for step in node.ops for part in (nodes.Const(step.op), step.expr)]
        return _call("compare", node.expr, *pairs)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Pay for the texts."""
        self.generic_visit(node)
        return _call("concatenate", nodes.List(node.nodes))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Pay for a slice, and for hashing a key."""
        self.generic_visit(node)
        key = node.arg
        if isinstance(key, nodes.Slice):
            parts = [part or nodes.Const(None) for part in (key.start, key.stop, key.step)]
            return _call("slice", node.node, *parts)
        return node if isinstance(key, nodes.Const) else _call("item", node.node, key)

    def visit_List(self, node: nodes.List | nodes.Tuple) -> nodes.Node:
        """Weigh what a list is made of, but for constants."""
        self.generic_visit(node)
        is_plain = all(isinstance(item, nodes.Const) for item in node.items)
        return node if is_plain or getattr(node, "ctx", "load") != "load" else _call("made", node)

    visit_Tuple = visit_List

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """Weigh what a mapping is made of."""
        self.generic_visit(node)
        return _call("made", node)

    def _visit_arguments(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        for name in ("dyn_args", "dyn_kwargs"):
            if getattr(node, name) is not None:
                setattr(node, name, _call("spread", getattr(node, name)))
        return node

    visit_Call = visit_Filter = visit_Test = _visit_arguments


def _call(name: str, value: Any, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, PREFIX + name, list(args), [], None, None, lineno=value.lineno or 1)


def _cost(body: list[Any]) -> int:
    """Return the cost of executing a body once, without the bodies in it that pay for themselves."""
    stack: list[Any] = [*body]
    cost = 0
    while stack:
        node = stack.pop()
        cost += STEP
        if isinstance(node, (nodes.TemplateData, nodes.Const)):
            text = node.data if isinstance(node, nodes.TemplateData) else node.value
            cost += 2 * text.__sizeof__() if isinstance(text, str) else 0
        elif isinstance(node, nodes.For):
            stack += [node.iter, *node.else_]
        elif isinstance(node, nodes.CallBlock):
            stack.append(node.call)
        elif not isinstance(node, (nodes.Macro, nodes.Block)):
            stack += node.iter_child_nodes()
    return cost


def check_tree(tree: nodes.Node) -> None:
    """Refuse a syntax tree that would take long to compile. Raises TooMuch."""
    stack: list[tuple[nodes.Node, int]] = [(tree, 0)]
    count = 0
    while stack:
        node, depth = stack.pop()
        count += 1
        if count > MAX_NODES:
            raise TooMuch(f"the template has more than {MAX_NODES} syntax nodes")
        if depth > MAX_NODE_DEPTH:
            raise TooMuch(f"the template nests syntax more than {MAX_NODE_DEPTH} deep")
        value = node.value if isinstance(node, nodes.Const) else None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TooMuch(f"the template holds an integer of more than {MAX_BITS} bits")
        stack += [(child, depth + 1) for child in node.iter_child_nodes()]
