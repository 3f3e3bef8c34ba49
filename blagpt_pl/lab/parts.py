"""Imports every part of the house, so that a bare class name in a configuration finds it."""

import functools
import importlib
import inspect
import pkgutil
import sys

import blagpt_pl.callbacks
import blagpt_pl.data
import blagpt_pl.losses
import blagpt_pl.models
import blagpt_pl.nn
import blagpt_pl.optim

ROOMS = (blagpt_pl.nn, blagpt_pl.losses, blagpt_pl.optim, blagpt_pl.models, blagpt_pl.data, blagpt_pl.callbacks)


def import_all() -> list[str]:
    """Import all modules of the rooms that hold parts; returns their names."""
    names = [m.name for room in ROOMS for m in pkgutil.walk_packages(room.__path__, room.__name__ + ".")]
    for name in names:
        importlib.import_module(name)
    return names


@functools.cache
def known_classes() -> frozenset[type]:
    """Every class that a part of the house defines."""
    modules = [sys.modules[name] for name in import_all()]
    return frozenset(
        cls
        for module in modules
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
    )
