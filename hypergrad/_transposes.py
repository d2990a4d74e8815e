"""Transposed products of batched matrices, computed the right way round by torch's default compiler.

The gradient of a linear layer with weights of its own for each task is (X^T D)^T in the graphs that autograd makes of
batched products. The compiler computes X^T D and then copies it transposed, entry by entry: of an MLP's step that was
more than half. (X^T D)^T is D^T X, whose factors a batched product reads transposed for nothing.
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default)
_SWAP = [0, 2, 1]


class TransposedProducts(CustomGraphPass):
    """Replaces (A B)^T by B^T A^T in a compiler's graph, where nothing else reads A B; the same sums of products."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite `graph`."""
        for node in list(graph.nodes):
            if _swaps(node):
                product = _read_alone(node)
                if product is not None and not any(user.op == "output" for user in node.users):
                    _turn(graph, node, product)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        """Return what tells compiled code made with this file from other."""
        return get_hash_for_files((__file__,))


def _turn(graph: Graph, node: Node, product: Node) -> None:
    left, right = product.args
    with graph.inserting_before(node):
        turned = graph.call_function(_aten.bmm.default, (_transposed(graph, right), _transposed(graph, left)))
    turned.meta["val"] = node.meta["val"].contiguous()
    node.replace_all_uses_with(turned)


def _transposed(graph: Graph, factor: object) -> Node:
    """Return the transpose of a factor, which is there already where the factor is one."""
    assert isinstance(factor, Node)
    source = _seen_through(factor)
    if _swaps(source):
        (known, _) = source.args
        assert isinstance(known, Node)
        return known
    transposed = graph.call_function(_aten.permute.default, (factor, _SWAP))
    transposed.meta["val"] = factor.meta["val"].permute(_SWAP)
    return transposed


def _read_alone(node: Node) -> Node | None:
    """Return the product that `node` transposes, None if there is none or something else reads it too."""
    (source, _) = node.args
    assert isinstance(source, Node)
    while len(source.users) == 1 and _keeps_shape(source):
        source = source.args[0]
        assert isinstance(source, Node)
    return source if len(source.users) == 1 and _calls(source, _aten.bmm.default) else None


def _seen_through(node: Node) -> Node:
    """Return what `node` is a view of with the same shape and strides; itself where it is none."""
    while _keeps_shape(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _keeps_shape(node: Node) -> bool:
    if not any(_calls(node, target) for target in _RESHAPES):
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.shape == after.shape and before.stride() == after.stride())


def _swaps(node: Node) -> bool:
    """Return whether `node` transposes each of a batch of matrices."""
    return _calls(node, _aten.permute.default) and node.args[1] == _SWAP


def _calls(node: Node, target: object) -> bool:
    return node.op == "call_function" and node.target is target
