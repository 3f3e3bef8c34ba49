"""Pattention: a map whose weights are tokens, read by attention instead of multiplied as one matrix.

Source   Wang et al. 2024, "TokenFormer", arXiv:2410.23168, sections 3.2 and 3.3
Formula  a_j = k_j · x for each of N parameter tokens;  s_j = a_j / sqrt(Σ_i a_i² / N0 + eps);  y = Σ_j gelu(s_j) v_j
         N0 is N, or the N that it had before it grew. The paper's a_j sqrt(N) / |a|_2 is the same with eps = 0, where
         x = 0 gives 0 / 0. Here x = 0 gives y = 0, and the derivative ds/da is at most 1 / sqrt(eps).
Start    keys N(0, 0.02²), values N(0, (2 / (L sqrt(D)))²), as the authors' configurations have it; L blocks of width D.
         Keys of the tokens beyond N0 start at 0: a = 0, gelu(0) = 0, so that they add nothing, and with N0 kept change
         nothing. Their values do not start at 0, or else neither would have a gradient
Differs  norm and GELU in float32; a map into the stream starts at 0 where the model's init asks for zero outputs
Note     a positive factor on all keys changes nothing. Doubling the tokens, each value halved, changes nothing.
Cost     N (D_in + D_out) parameters, twice as many FLOPs a token; two (B, T, N) tensors for the backward pass
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Site, WritesStream, wide
from blagpt_pl.nn.init_from import Grows

KEY_STD = 0.02


class Pattention(nn.Module, Grows):
    """Attention from the stream to learned tokens, with a normalised GELU in the softmax's place.

    Args:
        site: where it stands; its depth and width set the start of the values.
        d_in: width of the input.
        d_out: width of the output.
        n_tokens: N, parameter tokens.
        eps: added to the mean square of the scores.
        grown_from: N0, how many tokens it had when its training began; none have been added by default.

    Raises:
        ValueError: no parameter token, none added, or an `eps` that leaves 0 / 0 at a zero input.
    """

    counted: Tensor | None

    def __init__(
        self, site: Site, d_in: int, d_out: int, n_tokens: int, eps: float = 1e-6, grown_from: int | None = None
    ) -> None:
        super().__init__()
        if n_tokens < 1:
            raise ValueError(f"layer {site.layer}: Pattention with n_tokens={n_tokens} (expected 1 or more)")
        if eps <= 0:
            raise ValueError(f"layer {site.layer}: Pattention with eps={eps} (expected above 0, such as 1e-6)")
        if grown_from is not None and not 1 <= grown_from < n_tokens:
            raise ValueError(
                f"layer {site.layer}: Pattention with grown_from={grown_from}, n_tokens={n_tokens} "
                "(expected fewer before it grew, 1 or more); fix: leave grown_from out if it has not grown"
            )
        self.eps = eps
        self.mean_over = n_tokens if grown_from is None else grown_from
        self.value_std = 2 / (site.n_layers * site.d_model**0.5)
        self.keys = nn.Parameter(torch.empty(n_tokens, d_in))
        self.values = nn.Parameter(torch.empty(d_out, n_tokens))  # out × in, like every matrix of the house
        nn.init.normal_(self.keys, std=KEY_STD)
        nn.init.normal_(self.values, std=self.value_std)
        if grown_from is None:
            self.norm_eps, self.norm_gain = eps, None
            self.register_buffer("counted", None)
        else:  # Σ a² / N0 + eps  =  (N / N0) (Σ a² / N + eps N0 / N)
            self.norm_eps, self.norm_gain = eps * grown_from / n_tokens, (grown_from / n_tokens) ** 0.5
            self.register_buffer("counted", torch.tensor(grown_from))  # so that a checkpoint says what it needs
            nn.init.zeros_(self.keys[grown_from:])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        scores = F.linear(x, self.keys)  # (..., N)
        normed = F.rms_norm(wide(scores), scores.shape[-1:], eps=self.norm_eps)
        if self.norm_gain is not None:
            normed = normed * self.norm_gain
        return F.linear(F.gelu(normed).to(scores.dtype), self.values)

    def grown(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tokens of one with as many or fewer, then this one's: keys 0, values as they started.

        Raises:
            ValueError: it has more tokens, or its mean is over another number of them.
        """
        d_out, n, d_in = *self.values.shape, self.keys.shape[1]
        n_old = len(old.get("keys", ()))
        if {name: old[name].shape for name in ("keys", "values") if name in old} != {
            "keys": (n_old, d_in),
            "values": (d_out, n_old),
        }:
            return old  # of another kind or width, which is for the caller to tell
        counted = int(old["counted"]) if "counted" in old else n_old
        if n_old > n:
            raise ValueError(f"{n_old} tokens there, {n} here (expected as many or more); fix: n_tokens: {n_old}")
        if counted != self.mean_over:
            fix = f"grown_from: {counted}" if counted < n else "leave grown_from out"
            raise ValueError(f"a mean over {counted} tokens there, over {self.mean_over} here; fix: {fix}")
        keys, values = torch.zeros_like(self.keys), self.values.detach().clone()
        keys[:n_old], values[:, :n_old] = old["keys"], old["values"]
        return {**old, "keys": keys, "values": values} | ({} if self.counted is None else {"counted": self.counted})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As any module, but a mean over another number of tokens is a misfit: it would be another function."""
        saved = state_dict.get(f"{prefix}counted")
        if self.counted is not None and saved is not None and not saved.is_meta and int(saved) != self.mean_over:
            error_msgs.append(f"{prefix}counted: grown_from is {int(saved)} there, {self.mean_over} here")
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class OutputPattention(Pattention, WritesStream):
    """A Pattention that writes into the residual stream."""

    def start_output(self, std: float) -> None:
        """Values at 0 where `std` is 0, else at their own start, whose scale is Pattention's and not `std`'s.

        Those of added tokens are not at 0: their keys are, so that they write nothing yet.
        """
        nn.init.normal_(self.values, std=self.value_std if std else 0.0)
        if self.counted is not None and not std:
            nn.init.normal_(self.values[:, self.mean_over :], std=self.value_std)
