"""Host memory that batches are read into, used again where that is safe.

What     pinned memory is slow to allocate (the driver locks its pages), and a copy from it to the device runs on after
         `to(device, non_blocking=True)` has returned. So a tensor comes back here together with an event that was
         recorded behind its copy, and is handed out again only when that event is over
Differs  from a ring that assumes "two steps later the copy is over": Lightning fetches a batch ahead of the one it
         moves, and the host may run ahead of the device, so no fixed distance is safe. What a consumer keeps, or moves
         without a word, never comes back, and is never written again: it costs an allocation, not a wrong batch.
         From torch's own cache of pinned memory, which also waits for events: the copies under way are bounded, hence
         so is the memory, and it is the same code, and tested, without a GPU
Cost     the batches that are read ahead or held by the consumer, and `in_flight` more: 2.1 MB each at 512 windows of 1025
"""

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor


class Event(Protocol):
    """What is asked of a `torch.cuda.Event`."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


def pageable(shape: tuple[int, ...]) -> Tensor:
    """An int32 tensor in ordinary memory. NumPy's, since its allocator more often returns pages that are mapped."""
    return torch.from_numpy(np.empty(shape, np.int32))


def pinned(shape: tuple[int, ...]) -> Tensor:
    """An int32 tensor in memory that the current CUDA device can read by itself."""
    return torch.empty(shape, dtype=torch.int32, pin_memory=True)


class HostBuffers:
    """Tensors of one shape. Threads may take them while another gives them back.

    Args:
        allocate: shape -> a new int32 tensor.
        shape: of every tensor.
        in_flight: as many copies may be under way before `take` waits for the oldest, instead of allocating.
    """

    def __init__(
        self, allocate: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], in_flight: int = 2
    ) -> None:
        self.allocate = allocate
        self.shape = shape
        self.in_flight = in_flight
        self._lock = Lock()  # a reading thread that ends may still take while the next one begins
        self._out: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # address: what a consumer still holds
        self._back: deque[tuple[Tensor, Event]] = deque()  # oldest first

    def take(self) -> Tensor:
        """A tensor that nobody else reads or will read; its contents are arbitrary."""
        with self._lock:
            again = self._back and (len(self._back) >= self.in_flight or self._back[0][1].query())
            tensor, copied = self._back.popleft() if again else (None, None)
        if copied is None:
            tensor = self.allocate(self.shape)
        else:
            copied.synchronize()
        self._out[tensor.data_ptr()] = tensor
        return tensor

    def give_back(self, tensor: Tensor, copied: Event) -> None:
        """The consumer lets go of `tensor`, whose last copy is over when `copied` is.

        A tensor that was not taken here, or was given back already, is left alone.
        """
        if self._out.get(tensor.data_ptr()) is tensor:
            del self._out[tensor.data_ptr()]
            self._back.append((tensor, copied))
