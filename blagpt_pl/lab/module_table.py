"""A model as a tree of rows: each module's parameters and FLOPs; repeated modules that are alike are one row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn


@dataclass(frozen=True)
class Row:
    """A module, or several that are alike.

    Attributes:
        path: where it stands; `*` for the places of several.
        kind: its class, with the number of those that are alike.
        depth: how deep it stands.
        parameters: scalars of all of them; a tensor counts where it is met first.
        forward, backward: FLOPs of all of them on the counted tokens.
        tied: whether it holds a tensor that was counted before.
    """

    path: str
    kind: str
    depth: int
    parameters: int
    forward: int
    backward: int
    tied: bool


class Table:
    """Rows of a model.

    Args:
        model: on any device, meta too.
        forward, backward: FLOPs by the path of the module that did them, "" the model itself.
    """

    def __init__(self, model: nn.Module, forward: Mapping[str, int], backward: Mapping[str, int]) -> None:
        self.forward, self.backward = forward, backward
        self.own: dict[str, int] = {}
        self.shared: set[str] = set()
        owner: dict[int, str] = {}
        for path, module in model.named_modules():
            met = [(owner.setdefault(id(p), path), p.numel()) for p in module.parameters(recurse=False)]
            self.own[path] = sum(n for first, n in met if first == path)
            if any(first != path for first, _ in met):
                self.shared.add(path)
        self.model = model
        self._sums = cache(self._sum)
        self._look = cache(self._signature)

    def rows(self, depth: int) -> list[Row]:
        """All rows down to a depth, those without parameters and FLOPs left out."""
        return list(self._below(self.model, [""], 1, depth))

    def _below(self, module: nn.Module, places: list[str], level: int, depth: int) -> Iterator[Row]:
        for name, child, n in self._children(module, places[0]):
            paths = [_join(place, each) for place in places for each in ([name] if n is None else n)]
            sums = [self._sums(path) for path in paths]
            parameters, forward, backward = (sum(s[i] for s in sums) for i in range(3))
            tied = any(p in self.shared or any(s.startswith(p + ".") for s in self.shared) for p in paths[:1])
            if not (parameters or forward or backward or tied):
                continue
            path = ".".join("*" if _varies(paths, i) else word for i, word in enumerate(paths[0].split(".")))
            kind = type(child).__name__ if len(paths) == 1 else f"{len(paths)} × {type(child).__name__}"
            yield Row(path, kind, level, parameters, forward, backward, tied)
            if level < depth:
                yield from self._below(child, paths, level + 1, depth)

    def _children(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, list[str] | None]]:
        """Children, those of a list that are alike together; a list that holds nothing else is passed through."""
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                groups: list[tuple[nn.Module, list[str]]] = []
                for index, item in child.named_children():
                    here = _join(path, f"{name}.{index}")
                    if groups and self._look(_join(path, groups[-1][1][-1])) == self._look(here):
                        groups[-1][1].append(f"{name}.{index}")
                    else:
                        groups.append((item, [f"{name}.{index}"]))
                yield from ((names[0], item, names) for item, names in groups)
            else:
                yield name, child, None

    def _sum(self, path: str) -> tuple[int, int, int]:
        inside = [p for p in self.own if p == path or not path or p.startswith(path + ".")]
        return tuple(sum(of.get(p, 0) for p in inside) for of in (self.own, self.forward, self.backward))

    def _signature(self, path: str) -> tuple:
        module = self.model.get_submodule(path)
        shapes = tuple(tuple(p.shape) for p in module.parameters(recurse=False))
        own = (self.own[path], self.forward.get(path, 0), self.backward.get(path, 0))
        return (type(module), shapes, own, *(self._look(_join(path, name)) for name, _ in module.named_children()))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _varies(paths: list[str], i: int) -> bool:
    return len({path.split(".")[i] for path in paths}) > 1


def sizes(model: nn.Module, head: nn.Module) -> dict[str, int]:
    """Parameters: `total`, `embedding` (tables looked up), `active` (what one token meets: of a table that is only looked
    up, the one row that it reads; a table that the head multiplies by, whole), each shared tensor once.

    Args:
        model: the whole model.
        head: the part of it that maps features onto the vocabulary.
    """
    tables = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    in_head = {id(p) for p in head.parameters()}
    total = sum(p.numel() for p in model.parameters())
    only_looked_up = [p for key, p in tables.items() if key not in in_head]
    return {
        "total": total,
        "embedding": sum(p.numel() for p in tables.values()),
        "active": total - sum(p.numel() - p.shape[1] for p in only_looked_up),
    }
