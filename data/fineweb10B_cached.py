"""Download FineWeb's shards beside this file: `python data/fineweb10B_cached.py [N]`, N training shards of 103."""

import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here.parent))  # so that it runs from anywhere, installed or not
    from blagpt_pl.data.fineweb import ALL_SHARDS, FineWeb10B
    from blagpt_pl.errors import UserError

    given = arguments[0] if arguments else str(ALL_SHARDS)
    if len(arguments) > 1 or not given.isdecimal():
        found = " ".join(arguments)
        print(f"error: N: {found!r} (expected one number of shards); fix: python {sys.argv[0]} [N]", file=sys.stderr)
        return 2
    try:
        FineWeb10B(str(here / "fineweb10B"), int(given)).fetch()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
