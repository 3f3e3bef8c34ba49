"""One function compiled as one graph, with a cache of its own.

Why      torch keeps what it has compiled by the function's code: models in one process would share (and exhaust) the limit of
         a function that all of them call. Where torch cannot keep them apart (before 2.13), they do share it
"""

import inspect
from collections.abc import Callable

import torch

APART = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def compiled(function: Callable, backend: str | Callable) -> Callable:
    """The function, compiled for the shapes it is called with; a break in its graph is an error."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False, **APART)
