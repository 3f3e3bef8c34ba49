"""Following what is alive: every storage that a training step allocates, what it is for, and the peaks.

How   a dispatch mode sees each operation's results; a storage counts from the operation that made it until the last
      tensor on it is gone. The same for real tensors and for fake ones, which have sizes and no memory
Not   what a kernel takes and gives back inside one operation (workspaces), and what an allocator rounds up or cannot use
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = ("weights", "gradients", "optimizer", "casts", "activations", "logits", "temporaries")
CASTS = {"aten::_to_copy", "prims::convert_element_type"}


class Storages(TorchDispatchMode):
    """Bytes alive by category, and by moment what they were when their sum was largest.

    Attributes:
        label: category of what is allocated from now on.
        moment: name of what is going on.
        alive: bytes by category.
        peaks: moment -> bytes by category, when most was alive in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = "temporaries"
        self.moment = "before"
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._known: dict[int, tuple[weakref.ref, int, str]] = {}
        self._blind = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Not a mode that changes what is computed, so torch.compile may work under it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._blind:
            cast = func.name().split(".")[0] in CASTS and self._label_of(args[0]) == "weights"
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.see(leaf, "casts" if cast else self.label)
        return out

    @contextmanager
    def blind(self) -> Iterator[None]:
        """What is allocated here is not seen."""
        before, self._blind = self._blind, True
        try:
            yield
        finally:
            self._blind = before

    def see(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        n = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._gone(key)), n, label)
        self.alive[label] += n
        self._mark()

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """These tensors' storages belong to another category."""
        for tensor in tensors:
            self.see(tensor, label)
            key = id(tensor.untyped_storage())
            reference, n, old = self._known[key]
            self._known[key] = (reference, n, label)
            self.alive[old] -= n
            self.alive[label] += n

    def enter(self, moment: str, label: str) -> None:
        """From now on it is this moment, and what is allocated is of this category."""
        self.moment, self.label = moment, label
        self._mark()

    def _label_of(self, tensor: object) -> str | None:
        known = self._known.get(id(tensor.untyped_storage())) if isinstance(tensor, Tensor) else None
        return None if known is None else known[2]

    def _gone(self, key: int) -> None:
        _, n, label = self._known.pop(key)
        self.alive[label] -= n

    def _mark(self) -> None:
        peak = self.peaks.get(self.moment)
        if peak is None or self.alive.total() > peak.total():
            self.peaks[self.moment] = self.alive.copy()
