"""The most memory that a function has allocated at one time, beyond what was there before.

CUDA  the allocator's own peak
CPU   torch's profiler tells every allocation and release of torch's allocator, those of compiled code included; their
      running sum has a maximum. What a library allocates by itself (scratch space of a matrix product) is not seen
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 2**20


def peak_mib(run: Callable[[], object], device: "torch.device") -> float:
    """MiB that `run()` had allocated at most; what it returns is let go only after that."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read at the first profile: no line for each start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / MIB
