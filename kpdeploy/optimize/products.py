"""Plain products go through linear_activation too: on a GPU the op knows which library multiplies a shape fastest."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from kpdeploy.optimize.graph import argument, aten, calls, insert, sweep


def through_op(module: GraphModule) -> None:
    """Let each linear of a module be a linear_activation without an activation, in place."""
    for node in calls(module.graph, aten.linear.default):
        args = (node.args[0], node.args[1], argument(node, "bias"), "none")
        node.replace_all_uses_with(insert(node, torch.ops.kpdeploy.linear_activation.default, args, node))
    sweep(module)
