"""Means over the steps since the last log, kept on the device: nothing waits for a number until it is due."""

from torch import Tensor


class Window:
    """Running sums by name and the number of steps they cover."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum; several values of one step (its micro-batches) add up."""
        value = value.detach()
        self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def means(self) -> dict[str, Tensor]:
        """The mean of every sum over the steps; the window is empty afterwards."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means
