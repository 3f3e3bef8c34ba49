"""Pattention: a map whose weights are tokens, read by attention instead of multiplied as one matrix.

Source   Wang et al. 2024, "TokenFormer", arXiv:2410.23168, section 3.2
Formula  a_j = k_j · x for each of N parameter tokens;  s_j = a_j / sqrt(mean_i a_i² + eps);  y = Σ_j gelu(s_j) v_j
         The paper's a_j sqrt(N) / |a|_2 is the same with eps = 0, where x = 0 gives 0 / 0. Here x = 0 gives y = 0, and
         the derivative ds/da is at most 1 / sqrt(eps).
Start    keys N(0, 0.02²), values N(0, (2 / (L sqrt(D)))²), as the authors' configurations have it; L blocks of width D
Differs  norm and GELU in float32; a map into the stream starts at 0 where the model's init asks for zero outputs
Note     a positive factor on all keys changes nothing. Doubling the tokens, each value halved, changes nothing. A new token
         with a zero key and any value adds nothing, but N grows and every s with it, by sqrt((N + 1) / N): so the growth
         of section 3.3 is exact only with the old N kept under the square root.
Cost     N (D_in + D_out) parameters, twice as many FLOPs a token; two (B, T, N) tensors for the backward pass
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Site, WritesStream, wide

KEY_STD = 0.02


class Pattention(nn.Module):
    """Attention from the stream to learned tokens, with a normalised GELU in the softmax's place.

    Args:
        site: where it stands; its depth and width set the start of the values.
        d_in: width of the input.
        d_out: width of the output.
        n_tokens: N, parameter tokens.
        eps: added to the mean square of the N scores.

    Raises:
        ValueError: no parameter token, or an `eps` that leaves 0 / 0 at a zero input.
    """

    def __init__(self, site: Site, d_in: int, d_out: int, n_tokens: int, eps: float = 1e-6) -> None:
        super().__init__()
        if n_tokens < 1:
            raise ValueError(f"layer {site.layer}: Pattention with n_tokens={n_tokens} (expected 1 or more)")
        if eps <= 0:
            raise ValueError(f"layer {site.layer}: Pattention with eps={eps} (expected above 0, such as 1e-6)")
        self.eps = eps
        self.value_std = 2 / (site.n_layers * site.d_model**0.5)
        self.keys = nn.Parameter(torch.empty(n_tokens, d_in))
        self.values = nn.Parameter(torch.empty(d_out, n_tokens))  # out × in, like every matrix of the house
        nn.init.normal_(self.keys, std=KEY_STD)
        nn.init.normal_(self.values, std=self.value_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        scores = F.linear(x, self.keys)  # (..., N)
        weights = F.gelu(F.rms_norm(wide(scores), scores.shape[-1:], eps=self.eps))
        return F.linear(weights.to(scores.dtype), self.values)


class OutputPattention(Pattention, WritesStream):
    """A Pattention that writes into the residual stream."""

    def start_output(self, std: float) -> None:
        """Values at 0 where `std` is 0, else at their own start, whose scale is Pattention's and not `std`'s."""
        nn.init.normal_(self.values, std=self.value_std if std else 0.0)
