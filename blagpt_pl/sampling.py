"""Sampling from a language model, one token after the other.

Formula  p ∝ softmax(logits / temperature), kept to the `top_k` likeliest tokens and to the smallest set of tokens whose
         probability reaches `top_p` (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); temperature 0 is argmax
Cost     a token's own, where the model's parts remember the prefix (nn/states.py): of a recurrence a state, of attention keys
         and values. Else the whole prefix is computed anew for each token, which works for every architecture; so it is beyond the
         context, where what is remembered grows. A model whose memory does not grow goes on for ever, and forgets nothing at once
"""

import torch
from torch import Tensor

from blagpt_pl.nn.states import States


def check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse values that cannot be sampled with.

    Raises:
        ValueError: naming the argument.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens} (expected 0 or more)")
    if not temperature >= 0:
        raise ValueError(f"temperature: {temperature} (expected 0 for the likeliest token, or more)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k} (expected 1 or more)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} (expected more than 0 and at most 1)")


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """(B, V) logits -> (B, 1) tokens."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    p = logits.softmax(-1)
    if top_p is not None:
        ranked, order = p.sort(descending=True)  # (B, V)
        outside = ranked.cumsum(-1) - ranked >= top_p  # the tokens before it already suffice
        p = p.masked_fill(outside.scatter(-1, order, outside), 0.0)
    return torch.multinomial(p, 1, generator=generator)


def following(model: torch.nn.Module, tokens: Tensor, states: States | None) -> tuple[Tensor, States | None]:
    """(B, T) tokens -> (B, V) logits of the next one, and the states for the piece after these tokens; None once there are none.

    Args:
        model: as `sample` takes it.
        tokens: from the beginning.
        states: those after all but the last of the tokens, or new ones; None where the prefix is computed anew.
    """
    fits = tokens.shape[1] <= model.context
    if states is not None and (fits or not states.grows):
        for piece in tokens[:, states.start :].split(model.context, dim=1):
            logits = model.next_logits(piece, states)
            states = states.after(piece.shape[1])
            if states.grows and not fits:
                break
        else:
            return logits, states
    return model.next_logits(tokens[:, -model.context :]), None


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a batch of token sequences.

    Args:
        model: has `context`, `next_logits` and `can_continue`.
        tokens: (B, T) int64, T ≥ 1; only the last `context` tokens are read, all of them where the memory does not grow.
        max_new_tokens: how many to add.
        temperature: 0 for the likeliest token; larger is wilder.
        top_k: keep this many of the likeliest tokens.
        top_p: keep the smallest set of tokens with at least this probability.
        generator: source of randomness; torch's own by default.

    Returns:
        (B, T + max_new_tokens), the given tokens first.

    Raises:
        ValueError: an argument out of its range, or an empty prefix.
    """
    check(max_new_tokens, temperature, top_k, top_p)
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)} (expected (B, T) with T of at least 1)")
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # every length would be a graph of its own
            states = States() if model.can_continue() else None
            for _ in range(max_new_tokens):
                logits, states = following(model, tokens, states)
                tokens = torch.cat([tokens, choose(logits, temperature, top_k, top_p, generator)], dim=1)
    finally:
        model.train(training)
    return tokens
