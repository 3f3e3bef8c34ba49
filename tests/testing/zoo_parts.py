"""The zoo's parts: sound ones with one bug planted, each with the place where such a bug has been seen (`zoo.ZOO`)."""

import torch
from helpers import gated
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE, angles, rotate
from blagpt_pl.nn.base import Activation, Carry, ChannelMixer, Heads, Norm, OutputLinear, SequenceMixer, Site
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.head import TiedHead
from blagpt_pl.nn.mlp import GatedMLP

Heard = tuple[Tensor, Tensor, Tensor]  # q (B, H, T, K), k and v (B, G, T, K)


# ---------------------------------------------------------------------- who sees the future


class Masked(SDPA):
    """Attention under a mask of its own; here, the sound one."""

    def sees(self, length: int) -> Tensor:
        """(T, T) bool: whether query t sees key s."""
        return torch.ones(length, length, dtype=torch.bool).tril()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.sees(q.shape[2]), enable_gqa=True)


class OffByOne(Masked):
    """`tril(1)`: each token sees the next one, which is what it is to predict."""

    def sees(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool).tril(1)


class MaskLostUnderDropout(SDPA):
    """The path that drops attention weights forgets the mask (keras#23038); evaluation takes the other path."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.training and self.dropout:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, enable_gqa=True)
        return super().forward(q, k, v)


class WithinChunks(Masked):
    """Causal between chunks, not within one: BlaGPT's FTP encoder (a leak of 0.51), patches that are not shifted."""

    def __init__(self, heads: Heads, chunk: int = 8) -> None:
        super().__init__(heads)
        self.chunk = chunk

    def sees(self, length: int) -> Tensor:
        chunk = torch.arange(length) // self.chunk
        return chunk[:, None] >= chunk


class AcrossAnEdge(Masked):
    """Only the last token of a chunk of 8 sees one token too far: an inclusive end in place of an exclusive one."""

    def sees(self, length: int) -> Tensor:
        t = torch.arange(length)
        return t[:, None] + (t[:, None] % 8 == 7) >= t


class SecondChunk(WithinChunks):
    """The same from the second chunk on; the first, of 32, is sound: nothing shows at 23 tokens."""

    def sees(self, length: int) -> Tensor:
        first = (torch.arange(length) < self.chunk)[:, None]
        return torch.where(first, Masked.sees(self, length), super().sees(length))


class OnMultiples(OffByOne):
    """A fast path for lengths that are multiples of 16, which training takes and prime lengths do not."""

    def sees(self, length: int) -> Tensor:
        return super().sees(length) if length % 16 == 0 else Masked.sees(self, length)


class MaskLostInHalf(Masked):
    """The fused path, which bfloat16 takes, forgets the mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype == torch.bfloat16:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return super().forward(q, k, v)


class SoftmaxOverQueries(SDPA):
    """softmax over the wrong dimension of the scores, after a sound mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.mT).masked_fill(~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -1e9)
        return scores.softmax(-2).tril() @ v


class Wraps(KVShift):
    """The past by `roll`: the first token gets the last one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> Heard:
        return q, *((t + 0.5 * t.roll(1, dims=2)) for t in (k, v))


class Convolution(SequenceMixer):
    """A convolution over time, padded on both sides ("same"), not on the left."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.conv = nn.Conv1d(site.d_model, site.d_model, 3, padding=1)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.conv(x.mT).mT


class Unshifted(SequenceMixer):
    """Groups of 3 are pooled and repeated, and not shifted by two tokens first (Hourglass, maths.md §6, 7)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.out = OutputLinear(site.d_model, site.d_model, bias=False)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        t = x.shape[1]
        pooled = F.pad(x, (0, 0, 0, -t % 3)).unflatten(1, (-1, 3)).mean(2)  # (B, T / 3, D)
        return self.out(pooled.cumsum(1).repeat_interleave(3, 1)[:, :t])


class ExpertChoice(GatedMLP):
    """The mlp reads the half of a sequence that scores highest: whether a token is chosen hangs on later ones.

    Seen in mixture-of-depths and expert-choice routing; no gradient shows it.
    """

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        score = x[..., 0]  # (B, T)
        return super().forward(x, carry) * (score >= score.median(1, keepdim=True).values)[..., None]


class OverTime(Norm):
    """The root mean square is taken over the tokens, too: renormalised over the sequence (dilated attention, §6, 9)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-2:])


class OverTheBatch(OverTime):
    """The root mean square is taken over the sequences of a batch, token by token (BlaGPT's weights by the batch's maximum)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean((0, 2), keepdim=True) + 1e-6).rsqrt()


class RunningStatistics(OverTime):
    """A batch norm, whose running statistics move in evaluation, too."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("seen", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().square().mean((0, 1))
        return self.weight * x * (self.seen + 1e-6).rsqrt()


# ---------------------------------------------------------------------- who does not see the past


class ShortWindow(Masked):
    """A window of 8 where the whole past was claimed."""

    def sees(self, length: int) -> Tensor:
        return super().sees(length).triu(-7)


class EdgeForgotten(Masked):
    """The last key of each chunk of 8 is read by its own query alone."""

    def sees(self, length: int) -> Tensor:
        t = torch.arange(length)
        return super().sees(length) & ((t % 8 != 7) | (t[:, None] == t))


# ---------------------------------------------------------------------- where a token stands


class FromTheEnd(LearnedPositions):
    """Positions counted from the end: those of a token depend on how many follow."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).flip(0)


class KeysFromTheEnd(RoPE):
    """RoPE's offset: keys are counted as if a cache of T tokens stood before them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> Heard:
        angle = angles(2 * q.shape[2], q.shape[3], self.theta, q.device)
        return rotate(q, angle[: q.shape[2]]), rotate(k, angle[q.shape[2] :]), v


# ---------------------------------------------------------------------- what outlives a batch


class MaskOfTheFirstCall(Masked):
    """The mask is built at the first call, at its length; a longer batch finds it too short, and ends up without."""

    mask: Tensor | None = None

    def sees(self, length: int) -> Tensor:
        if self.mask is None:
            self.mask = super().sees(length)
        more = max(0, length - len(self.mask))
        return F.pad(self.mask, (0, more, 0, more), value=True)[:length, :length]


class BiasOfTheFirstCall(Masked):
    """A table of distances is made at the first call and stretched to the others."""

    table: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(q.shape[2]) / q.shape[2]
        far = self.table[torch.arange(k.shape[2]) % len(self.table)]
        return super().forward(q, k * (1 + far[:, None]), v)


class DropsInEvaluation(ChannelMixer):
    """`F.dropout(x, p)`, whose `training` is True unless said otherwise."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.mlp = gated(site)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return F.dropout(self.mlp(x, carry), 0.1)


# ---------------------------------------------------------------------- what does not learn


class SilentHead(SDPA):
    """The output of head 1 is masked to zero."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q, k, v) * (torch.arange(q.shape[1]) != 1)[:, None, None]


class BorrowedQueries(SDPA):
    """Head 1 reads with the queries of head 0; its own are projected and never used."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q[:, [0, 0, *range(2, q.shape[1])]], k, v)


class CutValues(SDPA):
    """No gradient reaches the values: a `detach` that was left behind."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q, k, v.detach())


class CutShort(GatedMLP):
    """Reads the embeddings, too, but sends no gradient back to them."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x + carry.x0.detach(), carry)


class Tripled(torch.autograd.Function):
    """The identity, whose backward is three times too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 3 * grad


class WrongBackward(GatedMLP):
    """A kernel of its own, whose backward was never compared with anything."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return Tripled.apply(super().forward(x, carry))


class Frozen(ChannelMixer):
    """A weight that was frozen for an experiment and left so."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.mlp = gated(site)
        self.mlp.gate_up.weight.requires_grad_(False)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.mlp(x, carry)


class InAList(Frozen):
    """A plain list of modules: in no optimizer and in no checkpoint."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.requires_grad_(True)
        self.more = [nn.Linear(site.d_model, site.d_model)]

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry) + self.more[0].to(x.dtype)(x)


class NotANumber(Activation):
    """The distance of each token from the first, whose gradient at zero is no number."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) + 1e-3 * (x - x[:, :1]).square().sum(-1, keepdim=True).sqrt()


# ---------------------------------------------------------------------- which tensors it has


class CountedTwice(TiedHead):
    """Tied by memory, not by identity: two parameters, two entries of the optimizer (two moments, two updates)."""

    def __init__(self, site: Site, embedding: nn.Embedding) -> None:
        super().__init__(site, embedding)
        self.weight = nn.Parameter(embedding.weight.data)


class UntiedByLoading(TiedHead):
    """A loaded weight takes the place of the tied one."""

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: object) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.weight = nn.Parameter(state[prefix + "weight"].clone())


class UntiedByCopying(TiedHead):
    """A copy of it has a weight of its own."""

    def __deepcopy__(self, memo: dict) -> "UntiedByCopying":
        other = nn.Module.__new__(type(self))
        nn.Module.__init__(other)
        other.weight = nn.Parameter(self.weight.detach().clone())
        other.cap = self.cap
        return other


# ---------------------------------------------------------------------- compiled, in bfloat16


class AsksTheData(GatedMLP):
    """`.item()` in a forward: a region that is not one graph."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry) * (1.0 if x.sum().item() > 0 else 2.0)


class AnotherWhenCompiled(GatedMLP):
    """The path that is taken when compiled has a bug."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry) * (1.01 if torch.compiler.is_compiling() else 1.0)


class SoftmaxInHalf(Masked):
    """A softmax by hand in float16, whose exponential is infinite from 11.1 on."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + 12
        power = (scores if scores.dtype == torch.float32 else scores.half()).exp() * self.sees(q.shape[2])
        return (power / power.sum(-1, keepdim=True)).to(v.dtype) @ v


# ---------------------------------------------------------------------- in a run


class OwnGenerator(ChannelMixer):
    """Dropout from a generator of its own, whose state is in no checkpoint: after a resume it begins anew."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.mlp = gated(site)
        self.drawn = 0

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        y = self.mlp(x, carry)
        if not self.training:
            return y
        self.drawn += 1
        return y * (torch.rand(y.shape, generator=torch.Generator().manual_seed(self.drawn)) > 0.1) / 0.9
