"""`blagpt generate`: continue a text with a trained model."""

import argparse

from blagpt_pl.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    p = argparse.ArgumentParser(
        prog="blagpt generate", description="Continue a text with a trained model.", allow_abbrev=False
    )
    p.add_argument("checkpoint", help="a run's folder (its best checkpoint is taken) or a .ckpt file")
    p.add_argument("--prompt", default="", help="the text to continue; empty begins a document")
    p.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="tokens to add  (200)")
    p.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 for the likeliest token  (0.8)")
    p.add_argument("--top_k", type=int, default=None, metavar="K", help="keep the K likeliest tokens  (all)")
    p.add_argument(
        "--top_p", type=float, default=None, metavar="P", help="keep the smallest set with probability P  (all)"
    )
    p.add_argument("--samples", type=int, default=1, metavar="N", help="how many continuations  (1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the dice  (0)")
    p.add_argument("--device", default=None, help="cpu, cuda, ...  (cuda where there is one)")
    return p


def main(argv: list[str]) -> None:
    """Print the continuations, prompt included."""
    args = parser().parse_args(argv)
    import torch

    from blagpt_pl.lab.load import load
    from blagpt_pl.lab.quiet import quiet
    from blagpt_pl.sampling import check

    quiet()
    try:
        check(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    model, tokenizer, _ = load(args.checkpoint)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    start = tokenizer.encode(args.prompt) or [tokenizer.end_of_text]
    tokens = torch.tensor([start] * args.samples, device=device)
    dice = torch.Generator(device).manual_seed(args.seed)
    out = model.generate(tokens, args.max_new_tokens, args.temperature, args.top_k, args.top_p, dice)
    for i, row in enumerate(out.tolist()):
        if args.samples > 1:
            print(f"--- {i + 1} of {args.samples}")
        print(tokenizer.decode(row))
