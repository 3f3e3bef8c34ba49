"""The nouns every part is written in: what a part is told, what travels beside the stream, and the kinds of part.

A *kind* is a base class; a socket's type is a *factory* of a kind: a callable that, given the runtime facts (`Site`,
`Heads` or a width), builds the part. A class whose first argument is that fact is itself a factory, so YAML needs only
the class's name. Each kind has its own base class, so that a bare name resolves only among the parts that fit.

Letters, the same everywhere: B batch, T tokens, D width of the stream, H query heads, G key/value heads, K width of a
head, F hidden width of an MLP, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blagpt_pl.nn.states import States


@dataclass(frozen=True)
class Site:
    """Where a part is built: the facts of the model that it may rely on.

    Attributes:
        d_model: D, width of the residual stream.
        n_layers: number of blocks in the model.
        layer: index of the block this part belongs to, from 0; the embedding and the head are told 0.
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
    """

    d_model: int
    n_layers: int
    layer: int
    vocab_size: int
    context: int


@dataclass(frozen=True)
class Heads:
    """The same inside attention.

    Attributes:
        site: where the attention stands.
        n: H, query heads.
        n_kv: G, key/value heads; query head h reads key/value head h // (H / G).
        dim: K, width of one head.
        v_dim: width of one head of values where it is not K; read it as `values`.
    """

    site: Site
    n: int
    n_kv: int
    dim: int
    v_dim: int | None = None

    @property
    def values(self) -> int:
        """Width of one head of values."""
        return self.dim if self.v_dim is None else self.v_dim


class Carry:
    """What travels beside the stream during one forward; created there, so nothing outlives a batch.

    Not a dataclass: FSDP2 copies those when they are given to a block, and with them the memo that later blocks read.

    Attributes:
        tokens: (B, T) int64, the input.
        x0: (B, T, D), the stream as it entered the first block.
        memo: tensors that one layer leaves for later ones, by name.
        states: what parts left of the piece of the sequence that came before, where it comes piece by piece; else None.
    """

    def __init__(
        self, tokens: Tensor, x0: Tensor, memo: dict[str, Tensor] | None = None, states: States | None = None
    ) -> None:
        self.tokens = tokens
        self.x0 = x0
        self.memo = {} if memo is None else memo
        self.states = states

    def but(self, x0: Tensor | None = None, memo: dict[str, Tensor] | None = None) -> "Carry":
        """Another one of the same batch, with another x0 or memo; the memo that is kept is shared."""
        return Carry(self.tokens, self.x0 if x0 is None else x0, self.memo if memo is None else memo, self.states)

    @property
    def start(self) -> int:
        """How many tokens came before these."""
        return 0 if self.states is None else self.states.start


class Continuing(nn.Module):
    """What may be given a sequence piece by piece.

    Attributes:
        continues: whether it goes on from what it left in `carry.states` at the piece before (nn/states.py). A subclass with
            another forward, or other projections, says so anew; else it is taken not to.
    """

    continues: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "continues" not in vars(cls) and {"forward", "project"} & vars(cls).keys():
            cls.continues = False


class Part(Continuing):
    """Anything a block joins to the stream: (x, carry) -> y, both (B, T, D)."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it computes: (B, T, D) -> (B, T, D)")


class SequenceMixer(Part):
    """A part that moves information between positions, never from a later one to an earlier one."""


class ChannelMixer(Part):
    """A part that treats every position alone, or reads the few before it that it says.

    Attributes:
        reads_before: how many. One that reads none has nothing to remember.
    """

    reads_before: ClassVar[int] = 0


class HeadEdit(Continuing):
    """An edit of the projected heads: q (B, H, T, K), k and v (B, G, T, K), same shapes out."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must return edited (q, k, v)")


class Core(Continuing):
    """How queries read: q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K), causally.

    Some attentions have values of another width than keys; what is returned then has the values' width.
    One that says `continues` also takes fewer queries than keys, which then are the last ones.

    Attributes:
        reach: how many keys a query reads, its own included; all if None.
    """

    reach: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must return (B, H, T, K)")

    def kept(self, x: Tensor) -> Tensor:
        """Of all keys or values so far (B, G, S, .) those that a later query may read."""
        return x if self.reach is None else x[:, :, max(0, x.shape[2] - self.reach + 1) :]

    def flops_per_token(self, context: int) -> int:
        """Multiplications and additions of one forward, a token, at this many tokens of context."""
        raise NotImplementedError(f"{type(self).__name__} must count its FLOPs")


class Norm(nn.Module):
    """A normalisation over the last dimension; built from its width.

    As in torch, the gain that it learns is `weight`, the shift is `bias`; None where it learns none.
    """


class Activation(nn.Module):
    """An elementwise nonlinearity."""


class Positions(Continuing):
    """What is added to the token embeddings to tell where they stand: (B, T) tokens -> (T, D)."""


class LinearMap(NamedTuple):
    """logits = cap(W h + b), the soft cap and the bias where there are any.

    Attributes:
        weight: W, (V, D).
        bias: b, (V,).
        cap: c of the soft cap.
    """

    weight: Tensor
    bias: Tensor | None
    cap: float | None


class Head(nn.Module):
    """From features to logits: (..., D) -> (..., V). Built from its `Site` and the embedding table.

    A head that is a linear map says so in `as_linear`, and the loss writes out its gradients. A subclass whose
    `forward` is another, its own or one mixed in, and which has no `as_linear` beside it, is none.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        forward, linear = (next(c for c in order if name in vars(c)) for name in ("forward", "as_linear"))
        if order.index(forward) < order.index(linear):
            cls.as_linear = Head.as_linear

    def as_linear(self) -> LinearMap | None:
        """The linear map that it is, or None."""
        return None

    def forward(self, features: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must return logits (..., V)")


class Init:
    """How the parameters of a whole model start; called once, when the model is built."""

    def __call__(self, model: nn.Module, site: Site) -> None:
        raise NotImplementedError(f"{type(self).__name__} must initialise the model's parameters in place")


class WritesStream:
    """What maps into the residual stream; an `Init` treats these by their kind, not by their name."""

    def start_output(self, std: float) -> None:
        """Start the map at N(0, std²), or its own equivalent of it; at 0 where std is 0, so that its output is zero."""
        raise NotImplementedError(f"{type(self).__name__} must say how a map into the stream starts")


class OutputLinear(nn.Linear, WritesStream):
    """A linear map that writes into the residual stream."""

    def start_output(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StackedLinear(nn.Linear):
    """Linear maps of one input in one matrix, one below the other; optimizers of matrices take them apart.

    Args:
        d_in: width of the input.
        rows: width of each map's output.
        bias: whether they have one.
        heads: for each map, how many of its rows are one head and act as one, as those of queries and keys do; 1 where
            every row acts alone. All do by default.
    """

    def __init__(self, d_in: int, rows: Sequence[int], bias: bool, heads: Sequence[int] | None = None) -> None:
        super().__init__(d_in, sum(rows), bias)
        self.rows = tuple(rows)
        self.heads = (1,) * len(rows) if heads is None else tuple(heads)
        assert len(self.heads) == len(rows) and all(n % k == 0 for n, k in zip(rows, self.heads, strict=True))


PartFactory = Callable[[Site], Part]
NormFactory = Callable[[int], Norm]
ActivationFactory = Callable[[], Activation]
SequenceMixerFactory = Callable[[Site], SequenceMixer]
ChannelMixerFactory = Callable[[Site], ChannelMixer]
HeadEditFactory = Callable[[Heads], HeadEdit]
CoreFactory = Callable[[Heads], Core]
PositionsFactory = Callable[[Site], Positions]
HeadFactory = Callable[[Site, nn.Embedding], Head]


def built(socket: str, factory: Callable | None, *facts: object) -> nn.Module:
    """Build the part of a required socket.

    Raises:
        ValueError: the socket was left empty, or holds something that is not a module.
    """
    if factory is None:
        raise ValueError(f"{socket}: empty (expected the name of a part, or class_path and init_args)")
    part = factory(*facts)
    if not isinstance(part, nn.Module):
        raise ValueError(f"{socket}: {type(part).__name__} is not a torch.nn.Module")  # noqa: TRY004
    return part


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is float64: where sums, angles and softmaxes are made."""
    return x if x.dtype == torch.float64 else x.float()


def count(parameters: object) -> int:
    """Number of scalars in distinct tensors: a shared tensor counts once."""
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def continues(model: nn.Module) -> bool:
    """Whether all parts of a model that move information between positions go on from what they left."""
    moving = (m for m in model.modules() if isinstance(m, SequenceMixer | HeadEdit | Core | Positions))
    shifting = (m for m in model.modules() if isinstance(m, ChannelMixer) and m.reads_before)
    return all(part.continues for part in (*moving, *shifting))
