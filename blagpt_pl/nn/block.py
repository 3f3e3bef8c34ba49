"""The pre-norm transformer block: two branches, each joined to the residual stream.

Source   Xiong et al. 2020, arXiv:2002.04745
Formula  x ← x + drop(post(attention(norm(x)))),  x ← x + drop(post(mlp(norm(x)))); `post` only where asked for
Cost     that of its parts, and one norm a branch (two with post_norm)
"""

from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, ChannelMixerFactory, NormFactory, Part, SequenceMixerFactory, Site, built


class Branch(nn.Module):
    """x + drop(post(part(norm(x)))).

    Args:
        norm: applied to the branch's input.
        part: what the branch computes.
        post: applied to the part's output, or None.
        dropout: probability of dropping an element of the branch's output.
    """

    def __init__(self, norm: nn.Module, part: Part, post: nn.Module | None, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.part = part
        self.post = nn.Identity() if post is None else post
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return x + self.drop(self.post(self.part(self.norm(x), carry)))


class Block(nn.Module):
    """Attention, then MLP, each normed before and joined by addition.

    Args:
        site: where it stands.
        norm: normalisation of each branch's input.
        attention: the sequence mixer.
        mlp: the channel mixer.
        post_norm: normalisation of each branch's output; none by default.
        dropout: probability of dropping an element of a branch's output.
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

        def branch(socket: str, factory: SequenceMixerFactory | ChannelMixerFactory) -> Branch:
            post = None if post_norm is None else post_norm(site.d_model)
            return Branch(built("block.norm", norm, site.d_model), built(socket, factory, site), post, dropout)

        self.attention = branch("block.attention", attention)
        self.mlp = branch("block.mlp", mlp)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.mlp(self.attention(x, carry), carry)
