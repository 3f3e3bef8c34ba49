"""The `blagpt` command: looks at its first word and imports only what that command needs."""

import difflib
import os
import select
import sys
from collections.abc import Callable

from blagpt_pl import __version__
from blagpt_pl.errors import UserError

USAGE = """\
blagpt: a laboratory for language-model architectures

usage: blagpt <command> [--config FILE ...] [--key value ...]

commands
  fit        train a model; the same command after a crash resumes
  validate   measure a model on the validation tokens
  test       measure a model on the test tokens
  generate   continue a text with a trained model
  check      certify a model: causality, learning, resuming and the rest, in seconds
  describe   account for a model before training: parameters, FLOPs, memory, time
  bench      measure how long things take
  list       what there is to choose from: parts, overlays, configurations

  blagpt <command> --help      what a command takes
  blagpt --version

examples
  blagpt fit --config configs/quickstart.yaml
  blagpt fit --config configs/blagpt.yaml --config configs/trainer/ddp8.yaml
  blagpt generate logs/quickstart/0 --prompt "def main("
"""

TRAIN_HELP = """\
usage: blagpt {command} --config FILE [--config FILE ...] [--key value ...]

{what}

Layers are merged left to right; the last one to speak wins. A key may reach into any part:
  --config FILE                      a complete configuration, or a difference to the ones before it
  --model.d_model 512                a value
  --model.block.mlp MLP              another part: its class name, or a path such as my_ideas.RunningMean
  --model.block.attention.edits+=RoPE             append to a list; .+edits=RoPE prepends
  --model.block.attention.edits-=QKNorm           remove from a list
  --model.block.attention.edits[RoPE].theta 1e6   a value of the RoPE in a list

Most used
  --name NAME                        runs of this name stand in <logs>/<name>/0, 1, ...  (run)
  --data.batch_size N                global batch, in sequences
  --data.device_batch_size N         sequences a device holds at once; accumulation follows
  --trainer.max_steps N              optimizer steps
  --trainer.devices N                accelerators, or processes on a CPU
  --ckpt_path FILE                   {ckpt}
  --seed_everything N                seed of the initialisation and of dropout  (1337)

More
  --print_config                     the resolved configuration, and nothing else
  --help-all                         every option of the Trainer and the data (long)
  --model.help BlaGPT                the options of one class; also --model.optimizer.help torch.optim.AdamW
"""

TRAIN = {
    "fit": (
        "Train a model. The same command after a crash resumes where it stopped.",
        "go on from this file, in a new run",
    ),
    "validate": (
        "Measure a model on the validation tokens.",
        "the trained model; its own configuration is the base layer",
    ),
    "test": ("Measure a model on the test tokens.", "the trained model; its own configuration is the base layer"),
}


def _train(command: str, argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        what, ckpt = TRAIN[command]
        print(TRAIN_HELP.format(command=command, what=what, ckpt=ckpt), end="")
        return
    from blagpt_pl.lab.train import run

    run(command, ["--help" if word == "--help-all" else word for word in argv])


def _generate(command: str, argv: list[str]) -> None:
    from blagpt_pl.lab.generate import main

    main(argv)


def _bench(command: str, argv: list[str]) -> None:
    from blagpt_pl.lab.bench import main

    main(argv)


def _check(command: str, argv: list[str]) -> None:
    from blagpt_pl.lab.check import main

    main(argv)


def _describe(command: str, argv: list[str]) -> None:
    from blagpt_pl.lab.describe import main

    main(argv)


def _list(command: str, argv: list[str]) -> None:
    from blagpt_pl.lab.list import main

    main(argv)


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    **dict.fromkeys(TRAIN, _train),
    "generate": _generate,
    "check": _check,
    "describe": _describe,
    "bench": _bench,
    "list": _list,
}


def main() -> None:
    """Entry point of the console script; exits with the code of the error, if there is one.

    Where nobody reads on, as in `blagpt list | head -1`, it ends without a word and with 141, as SIGPIPE would have it.
    """
    try:
        try:
            _run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not (unread := [fd for fd in (1, 2) if _is_unread(fd)]):
            raise  # another pipe, which is no reader's to close
        for fd in unread:  # what is still to be written when Python ends goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        raise SystemExit(141) from None


def _is_unread(fd: int) -> bool:
    """Whether the reader of a pipe has left."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if argv[0] == "--version":
        print(f"blagpt {__version__}")
        return
    command = argv[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {command!r} is not a command (expected {', '.join(COMMANDS)}){hint}", file=sys.stderr)
        raise SystemExit(2)
    if "" not in sys.path:
        sys.path.insert(0, "")  # so that a part in the current folder is found
    try:
        COMMANDS[command](command, argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning leaves with 1 where training has not begun
            raise SystemExit(130) from None
        raise


if __name__ == "__main__":
    main()
