"""What parts remember of a sequence between its pieces, so that a token more costs a token, not the whole prefix again.

How      a model is given a sequence piece by piece, and a `States` for each piece, which travels in the `Carry`. A part that moves
         information between positions takes what it left of the piece before, and leaves what the next piece will need. Parts do so
         in the order in which they are called, which is the same for every piece: no part needs a name, and one that is called
         several times keeps as many memories
Memory   a recurrence leaves its state, whatever came before; attention leaves keys and values, which grow with the tokens unless it has
         a window. Who leaves what grows says so
"""

from torch import Tensor

Remembered = tuple[Tensor, ...]


class States:
    """The memories of all parts of a model at one piece of a sequence.

    Attributes:
        start: tokens that came before this piece.
        grows: whether any memory grows with the tokens; known behind the first piece.

    Args:
        start: tokens that came before.
        past: what the parts left of the piece before, in the order of their calls; None at the first piece.
        grows: whether any of it grows.
    """

    def __init__(self, start: int = 0, past: list[Remembered] | None = None, grows: bool = False) -> None:
        self.start = start
        self.grows = grows
        self._past = None if past is None else iter(past)
        self._left: list[Remembered] = []

    def take(self) -> Remembered | None:
        """What the caller left of the piece before; None at the first piece. Called once, before `leave`."""
        return None if self._past is None else next(self._past)

    def leave(self, *tensors: Tensor, grows: bool = False) -> None:
        """Leave what the caller needs at the next piece.

        Args:
            tensors: as many and in the order as `take` will give them back; batch first.
            grows: whether they are larger, the more tokens came before.
        """
        self._left.append(tensors)
        self.grows |= grows

    def after(self, tokens: int) -> "States":
        """The states for the next piece, behind one of so many tokens."""
        return States(self.start + tokens, self._left, self.grows)
