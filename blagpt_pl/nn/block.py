"""The pre-norm transformer block: two branches, each joined to the residual stream.

Source   Xiong et al. 2020, arXiv:2002.04745
Formula  x ← x + drop(post(attention(norm(x)))),  x ← x + drop(post(mlp(norm(x)))); `post` only where asked for
         (Gemma Team 2024, "Gemma 2", arXiv:2408.00118, §2)
Note     a post-norm takes away the size of what it reads: behind a map that starts at zero, one optimizer step makes its
         output as large as its gain. So a branch that starts at zero with a post-norm has a gain of zero (`start_at_zero`)
Cost     that of its parts, and one norm a branch (two with post_norm)
"""

from torch import Tensor, nn

from blagpt_pl.nn.base import (
    Carry,
    ChannelMixerFactory,
    NormFactory,
    Part,
    PartFactory,
    SequenceMixerFactory,
    Site,
    built,
)
from blagpt_pl.nn.dropout import dropout as dropped


class Branch(nn.Module):
    """x + drop(post(part(norm(x)))).

    Args:
        norm: applied to the branch's input.
        part: what the branch computes.
        post: applied to the part's output, or None.
        drop: applied to the branch's output.
    """

    def __init__(self, norm: nn.Module, part: Part, post: nn.Module | None, drop: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.part = part
        self.post = nn.Identity() if post is None else post
        self.drop = drop
        self.ends_in_norm = post is not None

    def start_at_zero(self) -> None:
        """Start the post-norm's gain and shift at 0: nothing is written, whatever the maps before it hold.

        The gain learns at once, all before it as soon as the gain has moved; which takes that these maps are not 0, too.

        Raises:
            ValueError: the post-norm has no gain.
        """
        gain, shift = (getattr(self.post, name, None) for name in ("weight", "bias"))
        if gain is None:
            raise ValueError(
                f"block.post_norm: {type(self.post).__name__} has no gain to start at zero (model.init.zero_outputs: "
                "true); fix: a post-norm that learns a gain, such as RMSNorm, or model.init.zero_outputs: false"
            )
        nn.init.zeros_(gain)
        if shift is not None:
            nn.init.zeros_(shift)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return x + self.drop(self.post(self.part(self.norm(x), carry)))


def branch_of(
    site: Site, norm: NormFactory, socket: str, part: PartFactory, post_norm: NormFactory | None, dropout: float
) -> Branch:
    """A branch of a block; parts are built in the order in which they are applied to the stream.

    Args:
        site: where it stands.
        norm: of the branch's input.
        socket: where the part is set, for the error.
        part: what the branch computes.
        post_norm: of the branch's output, or None.
        dropout: probability of dropping an element of it.

    Raises:
        ValueError: a dropout that is no probability, or that drops everything.
    """
    post = None if post_norm is None else built("block.post_norm", post_norm, site.d_model)
    drop = dropped(f"layer {site.layer}: Block.dropout", dropout)
    return Branch(built("block.norm", norm, site.d_model), built(socket, part, site), post, drop)


class Block(nn.Module):
    """Attention, then MLP, each normed before and joined by addition.

    Args:
        site: where it stands.
        norm: normalisation of each branch's input.
        attention: the sequence mixer.
        mlp: the channel mixer.
        post_norm: normalisation of each branch's output; none by default.
        dropout: probability of dropping an element of a branch's output.

    Raises:
        ValueError: a dropout that is no probability, or that drops everything.
    """

    def __init__(
        self,
        site: Site,
        norm: NormFactory,
        attention: SequenceMixerFactory,
        mlp: ChannelMixerFactory,
        post_norm: NormFactory | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = branch_of(site, norm, "block.attention", attention, post_norm, dropout)
        self.mlp = branch_of(site, norm, "block.mlp", mlp, post_norm, dropout)

    def branches(self) -> tuple[Branch, ...]:
        """What joins the stream, in this order: the one that moves information between positions first."""
        return self.attention, self.mlp

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        for branch in self.branches():
            x = branch(x, carry)
        return x


class SoloBlock(Block):
    """One part, normed before and joined by addition: x ← x + drop(post(part(norm(x)))).

    Mamba's blocks are such (Gu & Dao 2023, arXiv:2312.00752, §3.4), and those of hybrids that give each mixer a layer.

    Args:
        site: where it stands.
        norm: normalisation of the part's input.
        part: a sequence mixer or a channel mixer.
        post_norm: normalisation of the part's output; none by default.
        dropout: probability of dropping an element of the part's output.

    Raises:
        ValueError: a dropout that is no probability, or that drops everything.
    """

    def __init__(
        self,
        site: Site,
        norm: NormFactory,
        part: PartFactory,
        post_norm: NormFactory | None = None,
        dropout: float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        self.branch = branch_of(site, norm, "block.part", part, post_norm, dropout)

    def branches(self) -> tuple[Branch, ...]:
        return (self.branch,)
