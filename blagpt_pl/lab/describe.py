"""`blagpt describe`: account for a configuration before it is trained, or compare the accounts of several."""

import argparse
import json

from blagpt_pl.lab.leading_files import leading_files

DEPTH = 3  # modules deep


def parser() -> argparse.ArgumentParser:
    """What the command takes, besides the layers of a configuration."""
    p = argparse.ArgumentParser(
        prog="blagpt describe",
        usage="blagpt describe [FILE[+FILE ...] ...] [--config FILE ...] [--key value ...] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Account for a configuration before it is trained: parameters, FLOPs, memory, time. No weight is allocated.",
        epilog="examples\n"
        "  blagpt describe --config configs/blagpt.yaml --config configs/techniques/mla.yaml\n"
        "  blagpt describe configs/blagpt.yaml configs/gpt2.yaml --gpu H100\n"
        "  blagpt describe configs/blagpt.yaml configs/blagpt.yaml+configs/techniques/mla.yaml\n"
        "Each word before the options is a column: a configuration, with its overlays after a +. --config and --key\n"
        "are those of `blagpt fit`, and hold for every column.",
    )
    p.add_argument("--gpu", default="H200", metavar="NAME", help="what memory and time are told for  (H200)")
    p.add_argument("--depth", type=int, default=DEPTH, metavar="N", help=f"how deep modules are listed  ({DEPTH})")
    p.add_argument("--json", action="store_true", help="print everything as JSON, the modules too")
    return p


def main(argv: list[str]) -> None:
    """Print the account, or the accounts beside each other."""
    named, rest = leading_files(argv)
    args, words = parser().parse_known_args(rest)
    from blagpt_pl.devices import device_named
    from blagpt_pl.errors import ConfigError
    from blagpt_pl.lab.account import Account
    from blagpt_pl.lab.describe_table import as_json, beside, short, single
    from blagpt_pl.lab.model_of import layers_for
    from blagpt_pl.lab.quiet import quiet
    from blagpt_pl.lab.schedule_plot import data, line, plot, rates_of

    quiet()
    if args.depth < 1:
        raise ConfigError(f"--depth: {args.depth} (expected 1 or more)")
    if twice := [name for i, (name, _) in enumerate(named) if name in {n for n, _ in named[:i]}]:
        raise ConfigError(f"{twice[0]}: named twice")
    device = device_named(args.gpu, "--gpu")
    accounts = {name: Account(layers_for([*layers, *words]), device) for name, layers in named or [("", [])]}
    rates = {name: rates_of(one) for name, one in accounts.items()}
    if args.json:
        found = [as_json(name, one, args.depth) | {"schedule": data(rates[name])} for name, one in accounts.items()]
        print(json.dumps(found, indent=1))
    elif len(accounts) == 1:
        ((name, one),) = accounts.items()
        for text in single(one, args.depth):
            print(text, flush=True)
        print("\n".join(plot(rates[name])))
    else:
        print("\n".join([*beside(accounts), "", *(line(short(name), one) for name, one in rates.items())]))
