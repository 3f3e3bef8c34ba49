"""One function compiled as one graph, with a cache of its own.

Why      torch keeps what it has compiled by the function's code: models in one process would share (and exhaust) the limit of
         a function that all of them call. Where torch cannot keep them apart (before 2.13), they do share it
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec

import torch

APART = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}

USUAL = ("inductor", "aot_eager", "eager")
NEEDS = {
    "tvm": "tvm",
    "openxla": "torch_xla",
    "openxla_eval": "torch_xla",
    "onnxrt": "onnxruntime",
}  # registered all the same


def check_backend(name: str) -> None:
    """Refuse a backend that torch does not know, or whose package is not here.

    Raises:
        ValueError: such a backend.
    """
    fix = f"one of {', '.join(USUAL)}"
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(f"model.compile: {name!r} is no backend of torch.compile (expected {fix})")
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        raise ValueError(f"model.compile: {name!r} needs the package {NEEDS[name]}, which is not installed; fix: {fix}")


def compiled(function: Callable, backend: str | Callable) -> Callable:
    """The function, compiled for the shapes it is called with; a break in its graph is an error."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False, **APART)
