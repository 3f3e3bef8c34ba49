"""`blagpt check`: certify the configured model at a tiny size on the CPU (`testing/certificate.py` holds the promises)."""

import argparse
import json
import math
import time

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.leading_files import leading_files


def parser() -> argparse.ArgumentParser:
    """What the command takes, besides the layers of a configuration."""
    p = argparse.ArgumentParser(
        prog="blagpt check",
        usage="blagpt check [FILE[+FILE ...]] [--config FILE ...] [--key value ...] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Certify the configured model: build it at a tiny size on the CPU, examine its promises, print a table.\n"
        "Configurations and keys are those of `blagpt fit`. Exits with 1 where a promise is broken.",
    )
    p.add_argument("--full-size", action="store_true", help="keep the configured sizes (minutes, and much memory)")
    p.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="PROMISE",
        help="examine these alone; a name of two words in quotes",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights, tokens and noise  (0)")
    p.add_argument(
        "--init-tolerance", type=float, default=0.15, metavar="X", help="nats the first loss may lie from ln V  (0.15)"
    )
    p.add_argument("--list", action="store_true", help="say what each promise is, and stop")
    p.add_argument("--json", action="store_true", help="print the certificate as JSON instead of a table")
    return p


def main(argv: list[str]) -> None:
    """Print the certificate; leave with 1 where a promise is broken."""
    named, rest = leading_files(argv)
    args, words = parser().parse_known_args(rest)
    if len(named) > 1:
        raise ConfigError(
            f"{named[1][0]}: a second model (expected one); fix: overlays are joined by + or named by --config"
        )
    words = [*(named[0][1] if named else ()), *words]
    from blagpt_pl.callbacks.record import code_version
    from blagpt_pl.lab import examine
    from blagpt_pl.lab.quiet import quiet

    quiet()
    if args.list:
        print("\n".join(examine.claims()))
        return
    for name in args.only or ():
        if name not in examine.PROMISES:
            raise ConfigError(
                f"--only: {name!r} is no promise (expected {', '.join(map(repr, examine.PROMISES))}; a name of two words in quotes)"
            )
    if not 0 < args.init_tolerance < math.inf:
        raise ConfigError(f"--init-tolerance: {args.init_tolerance} (expected nats, above 0)")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed: {args.seed} (expected a whole number from 0 to {2**32 - 1})")
    start = time.perf_counter()
    header, verdicts = examine.examination(words, args.full_size, args.only, args.seed, args.init_tolerance)
    if args.json:
        found = list(verdicts)
        kept = not examine.broken(found)
        certificate = {**header, "code": code_version(), "kept": kept, "promises": list(map(examine.as_json, found))}
        print(json.dumps(certificate, indent=1, ensure_ascii=False))
    else:
        print(f"{header['model']}: {header['parameters']:,} parameters, {header['size']}\n", flush=True)
        found = [examine.show(verdict) for verdict in verdicts]
        print(f"\n{examine.summary(found, time.perf_counter() - start)}")
    if examine.broken(found):
        raise SystemExit(1)
