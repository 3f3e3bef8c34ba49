"""A compiled graph as far as memory goes: a backend of torch.compile that keeps what Inductor would keep, and writes no code.

How   AOTAutograd cuts the graph in a forward and a backward half with Inductor's decompositions and its min-cut partitioner,
      which chooses what is saved. Both halves then run operation by operation, but only what a fused kernel writes to
      memory is seen by `Storages`: what leaves the graph, what a matrix product or another kernel of its own reads or
      writes, and the results of sums. Elementwise results in between stay in registers
Not   Inductor's order of kernels and its reuse of buffers: the peak inside a region is an estimate, what is saved is not
"""

from collections.abc import Callable, Sequence

import torch
import torch.fx
from torch import Tensor
from torch._functorch.partitioners import min_cut_rematerialization_partition

from blagpt_pl.lab.storages import Storages

MADE_IN_PLACE = {  # no kernel of their own, though torch does not tag them as elementwise; nor has a scatter into a constant
    "aten.arange", "aten.cat", "aten.clone", "aten.constant_pad_nd", "aten.embedding", "aten.empty", "aten.full",
    "aten.full_like", "aten.gather", "aten.index", "aten.ones_like", "aten.repeat", "aten.scalar_tensor", "aten.zeros_like",
    "prims.iota", "prims.convert_element_type",
}  # fmt: skip
SUMS = {
    "aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.any", "aten.all", "aten.prod", "aten.var_mean", "aten.var",
    "aten.argmax", "prims.xor_sum",
}  # fmt: skip


def kind(node: torch.fx.Node) -> str:
    """What a node is to a compiler: a `view`, `elementwise`, a `sum`, a `kernel` of its own, or `other` (inputs, outputs)."""
    if node.op != "call_function":
        return "other"
    if not isinstance(node.target, torch._ops.OpOverload):
        return "view"  # getitem
    name = str(node.target.overloadpacket)
    if node.target.is_view:
        return "view"
    if name in SUMS:
        return "sum"
    one_hot = name == "aten.scatter" and str(getattr(node.args[0], "target", "")).startswith("aten.full")
    if one_hot or name in MADE_IN_PLACE or torch.Tag.pointwise in node.target.tags:
        return "elementwise"
    return "kernel"


def written(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The nodes whose results a fused kernel writes to memory."""
    found = {node for node in graph.nodes if kind(node) in ("sum", "kernel")}
    for node in reversed(graph.nodes):  # a view is written if what it views is
        if node.op == "output" or kind(node) == "kernel" or (kind(node) == "view" and node in found):
            found |= set(node.all_input_nodes)
    return found


def last_uses(graph: torch.fx.Graph, written: set[torch.fx.Node]) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """After which node each one is let go: what is read through registers is held until their result is written."""
    last: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
        if node in written and node.op == "call_function":
            reading, seen = [*node.all_input_nodes], set()
            while reading:
                used = reading.pop()
                last[used] = node
                if used not in seen and used not in written and used.op == "call_function":
                    reading += used.all_input_nodes
                seen.add(used)
    let_go: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for used, user in last.items():
        let_go.setdefault(user, []).append(used)
    return let_go


class _Run(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, storages: Storages, written: set, let_go: dict) -> None:
        super().__init__(module)
        self.storages, self.written, self.user_to_last_uses = storages, written, let_go

    def run_node(self, n: torch.fx.Node) -> object:
        if n in self.written or n.op != "call_function":
            return super().run_node(n)
        with self.storages.blind():
            return super().run_node(n)


def backend(storages: Storages) -> Callable:
    """For `torch.compile(backend=...)`: compiled regions are followed by `storages`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import select_decomp_table

    def run(module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        nodes = written(module.graph)
        let_go = last_uses(module.graph, nodes)

        def boxed(args: list) -> object:
            return _Run(module, storages, nodes, let_go).boxed_run(args)

        boxed._boxed_call = True
        return boxed

    def partition(*args: object, **kwargs: object) -> object:
        return min_cut_rematerialization_partition(*args, **{**kwargs, "compiler": "inductor"})

    return aot_autograd(fw_compiler=run, bw_compiler=run, decompositions=select_decomp_table, partition_fn=partition)
