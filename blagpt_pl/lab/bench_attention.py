"""`blagpt bench attention`: forward and backward of one core against the length of the sequence."""

import argparse
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.timing import Case

if TYPE_CHECKING:
    import torch

    from blagpt_pl.nn.base import Core, Heads

CORE_VALUES = {  # of the cores that need some: the overlay's
    "Dilated": {"segments": [64, 128, 256, 512, 1024], "dilations": [1, 2, 4, 8, 16]},
}
WIDTHS = {"B": 1, "H": 12, "G": 4, "K": 64}  # the baseline's heads, one sequence


def core_named(name: str, heads: "Heads") -> "Core":
    """The core of that name.

    Raises:
        ConfigError: no core has this name, or it cannot be built from the heads and `CORE_VALUES` alone.
    """
    from blagpt_pl.lab.parts import known_classes
    from blagpt_pl.nn.base import Core

    known = {cls.__name__: cls for cls in known_classes() if issubclass(cls, Core) and cls is not Core}
    if name not in known:
        raise ConfigError(f"--cores: {name!r} is not a core (expected of {', '.join(sorted(known))})")
    try:
        return known[name](heads, **CORE_VALUES.get(name, {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--cores: {name} cannot be built here: {error}") from None


def cases(args: argparse.Namespace, device: "torch.device") -> tuple[str, list[Case]]:
    """Forward and backward of a core, by core and length."""
    import torch

    from blagpt_pl.nn.base import Heads, Site

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    b, h, g, k = WIDTHS.values()

    def case(name: str, tokens: int) -> Case:
        core = core_named(name, Heads(Site(h * k, 12, 0, 50304, tokens), h, g, k))
        if args.compile is not None:
            core.compile(backend=args.compile, fullgraph=True, dynamic=False)
        dice = torch.Generator(device).manual_seed(0)
        q, key, v, toward = (
            torch.randn(b, n, tokens, k, generator=dice, device=device, dtype=dtype) for n in (h, g, g, h)
        )
        inputs = [x.requires_grad_() for x in (q, key, v)]
        return Case(name, tokens, lambda: torch.autograd.grad(core(*inputs), inputs, toward))

    sizes = ", ".join(f"{letter} {n}" for letter, n in WIDTHS.items())
    how = "eager" if args.compile is None else f"compiled by {args.compile}"
    what = f"attention: forward and backward of one core, {sizes}, {str(dtype).removeprefix('torch.')}, {how}"
    return what, [case(name, tokens) for name in args.cores for tokens in args.lengths]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench attention` alone takes."""
    p.add_argument("--cores", nargs="+", default=["SDPA", "Dilated"], metavar="NAME", help="(SDPA Dilated)")
    p.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[1024, 2048, 4096, 8192],
        metavar="T",
        help="tokens  (1024 2048 4096 8192)",
    )
    p.add_argument("--compile", default=None, metavar="BACKEND", help="compile each core: inductor, ...  (eager)")
