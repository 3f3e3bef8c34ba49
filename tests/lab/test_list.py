"""`blagpt list` shows what there is: all of it, once, each with a line of its own, and without importing it."""

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import batch, tiny

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import catalogue, parts
from blagpt_pl.lab.catalogue import FIRST_LINE, KINDS, UNFIT, configurations, paper_of, torch_optimizers
from blagpt_pl.lab.list import GROUPS, ORDER, entries, kinds_of, main, table
from blagpt_pl.lab.rules import ALWAYS, HOUSE
from blagpt_pl.lm import LanguageModel
from blagpt_pl.losses import term
from blagpt_pl.nn import base
from blagpt_pl.optim.roles import groups_by_role

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
ALL = tuple(catalogue.parts())
# What is between a kind and its parts: it leaves open how to compute, and says so only when it is called.
OPEN = {"LogitTerm", "TrunkTerm", "NormaliserTerm", "GroupOptimizer"}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ---------------------------------------------------------------------- parts


def true_base(name: str) -> type:
    others = {"LanguageModel": LanguageModel, "Optimizer": torch.optim.Optimizer, "Callback": L.Callback}
    known = {cls.__name__: cls for cls in parts.known_classes()}
    return others.get(name) or known[name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_says_what_python_says(kind: str) -> None:
    """Read without importing, the parts of a kind are those that are found by importing."""
    cls = true_base(KINDS[kind][0])
    truth = {
        one.__name__
        for one in parts.known_classes()
        if issubclass(one, cls) and not inspect.isabstract(one) and one.__name__ not in OPEN
        and (one is not cls or cls.__name__ in catalogue.SELF) and (kind != "callback" or one.__name__ not in (*HOUSE, *ALWAYS))
    }  # fmt: skip
    assert {entry.name for entry in ALL if entry.kind == kind} == truth


def test_every_part_is_of_one_kind_and_has_a_line() -> None:
    assert len({entry.name for entry in ALL}) == len(ALL)
    for entry in ALL:
        assert entry.text, f"{entry.file}: {entry.name} has no docstring"
        assert len(entry.text) > 3
        assert (ROOT / entry.file).is_file()


ANY = ("BlockFactory", "PartFactory")  # the latter makes mixers of both kinds


def test_every_kind_that_has_a_socket_is_listed() -> None:
    """What a factory of nn.base makes, someone may want to choose."""
    factories = [v for m in (base, term) for k, v in vars(m).items() if k.endswith("Factory") and k not in ANY]
    made = {typing.get_args(factory)[1].__name__ for factory in factories}
    assert len(made) >= 8
    assert made <= {name for name, _ in KINDS.values()}


def test_papers() -> None:
    papers = {entry.name: entry.paper for entry in ALL}
    assert papers["RMSNorm"] == "Zhang & Sennrich 2019, arXiv:1910.07467", "a line of the module"
    assert papers["LayerNorm"] == "Ba et al. 2016, arXiv:1607.06450"
    assert papers["SDPA"] == "Vaswani et al. 2017, arXiv:1706.03762", "the module's source"
    assert papers["LearnedPositions"] == "Radford et al. 2019", "no arXiv id"
    assert papers["GPT2Init"] == "Radford et al. 2019", "the first that is named, not the first with an id"
    assert papers["LinearHead"] == papers["ByteTokenizer"] == "", "a sibling's paper is not its own"
    module = (
        "X.\n\nSource   Poe 2001, arXiv:0101.00001\nOwn   Roe & Doe 2002,\n         arXiv:0202.00002\nOther  no paper\n"
    )
    assert paper_of("Own", "", module) == "Roe & Doe 2002, arXiv:0202.00002"
    assert paper_of("Third", "", module) == "Poe 2001, arXiv:0101.00001"
    assert paper_of("Own", "As in Qwen, arXiv:0303.00003", module) == "arXiv:0303.00003"
    assert (
        paper_of("Own", 'Eve 2004 (E), "Title", arXiv:0404.00004; more, arXiv:0505.00005', "")
        == "Eve 2004, arXiv:0404.00004"
    )


def test_what_is_added_appears(tmp_path: Path) -> None:
    room = tmp_path / "house" / "nn" / "deep"
    room.mkdir(parents=True)
    (room / "mine.py").write_text(
        '"""Mine.\n\nSource   Me et al. 2026, arXiv:2601.00001\n"""\n'
        "import abc\nfrom blagpt_pl.nn import base\n\n"
        "class Frame(base.SequenceMixer, abc.ABC):\n    @abc.abstractmethod\n    def mix(self): ...\n"
        "    def forward(self, x, carry):\n        return self.mix()\n\n"
        'class Mine(Frame):\n    """Mixes.\n\n    At length.\n    """\n    def mix(self):\n        return 1\n\n'
        'class Open(base.Norm):\n    def forward(self, x):\n        """Says."""\n        raise NotImplementedError\n\n'
        'class Closed(Open):\n    """A norm\n    on two lines. And more."""\n    def forward(self, x):\n        return x\n\n'
        "class Tuned(Closed):\n    def __init__(self):\n        super().__init__()\n\n"
        "class _Hidden(Closed):\n    pass\n\nclass Helper:\n    def forward(self, x):\n        return x\n"
    )
    found = {entry.name: entry for entry in catalogue.parts(tmp_path / "house")}
    assert set(found) == {"Mine", "Closed", "Tuned"}
    assert (found["Mine"].kind, found["Mine"].text) == ("attention", "Mixes.")
    assert found["Mine"].file == "house/nn/deep/mine.py"
    assert (found["Closed"].kind, found["Closed"].text) == ("norm", "A norm on two lines.")
    assert found["Mine"].paper == "Me et al. 2026, arXiv:2601.00001"


def test_every_optimizer_that_is_shown_takes_a_step() -> None:
    names = {entry.name.removeprefix("torch.optim."): entry for entry in torch_optimizers()}
    truth = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert names.keys() == truth - {"Optimizer", *UNFIT}
    for name, entry in names.items():
        assert entry.text
        model = tiny()
        optimizer = getattr(torch.optim, name)(
            groups_by_role(model.named_parameters(), model.parameter_roles()), lr=0.01
        )
        before = [p.detach().clone() for p in model.parameters()]
        model.objective(*batch(model))[0].backward()
        optimizer.step()
        assert not all(map(torch.equal, before, model.parameters())), f"{name} changes nothing"


@pytest.mark.parametrize("name", UNFIT)
def test_every_optimizer_that_is_not_shown_does_not_fit(name: str) -> None:
    model = tiny()
    with pytest.raises((ValueError, RuntimeError)):
        optimizer = getattr(torch.optim, name)(groups_by_role(model.named_parameters(), model.parameter_roles()))
        model.objective(*batch(model))[0].backward()
        optimizer.step()


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_file_appears_with_a_line(file: Path) -> None:
    found = [e for e in configurations(ROOT / "configs") if e.file == str(file)]
    assert len(found) == 1
    assert found[0].text, f"{file}: the first line is to be a comment that says what it is"
    assert found[0].kind in ORDER


@pytest.mark.parametrize("file", [f for f in CONFIGS if f.parent.name == "techniques"], ids=lambda file: file.stem)
def test_the_first_line_of_a_technique(file: Path) -> None:
    first = file.read_text().partition("\n")[0]
    assert FIRST_LINE.fullmatch(first), f"{file}: expected `# Name: what it does. Authors year, arXiv:id`: {first}"


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("# X: does. Poe 2001", True), ("# X: does. Poe et al. 2001, arXiv:0101.00001", True), ("# X: i.e. that. A & B 2001 (C), arXiv:0101.00001", True),
        ("# X: does. Poe 2001, arXiv:010100001", False), ("# X does. Poe 2001", False), ("X: does. Poe 2001", False), ("# X: does", False),
        ("# X: does. Poe 2001, arXiv:0101.00001.", False),
    ],
)  # fmt: skip
def test_the_form_of_a_first_line(line: str, fits: bool) -> None:
    assert bool(FIRST_LINE.fullmatch(line)) == fits


def test_without_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(catalogue, "HOUSE", tmp_path / "site-packages" / "house")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blagpt_pl.lab.list.configs_folder", lambda: catalogue.configs_folder(tmp_path / "x" / "house"))
    main(["technique"])
    assert "no folder configs here or beside the package" in capsys.readouterr().out
    main(["norm"])
    assert "configs" not in capsys.readouterr().out
    (tmp_path / "configs" / "techniques").mkdir(parents=True)
    (tmp_path / "configs" / "techniques" / "mine.yaml").write_text("# Mine: differs. Me 2026\na: 1\n")
    main(["technique"])
    assert re.search(r"^  mine +Mine: differs +Me 2026$", capsys.readouterr().out, re.MULTILINE), "the current folder's"


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("word", "kinds"),
    [
        *((kind, (kind,)) for kind in ORDER if kind not in GROUPS), *((f"{kind}s", (kind,)) for kind in KINDS if kind[-1] != "s" and kind not in GROUPS),
        ("losses", ("loss",)), ("attention", ("attention", "edit", "core")), ("data", ("source", "tokenizer")), ("Norms", ("norm",)),
        ("optim", ("optimizer",)), ("overlays", ("technique",)), ("terms", ("loss",)),
    ],
)  # fmt: skip
def test_words(word: str, kinds: tuple[str, ...]) -> None:
    assert kinds_of(word) == kinds


@pytest.mark.parametrize(("word", "near"), [("nrom", "norm"), ("techniqe", "technique"), ("optimiser", "optimizer")])
def test_an_unknown_kind(word: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{word}: is no kind .*expected norm, activation.*; did you mean {near}"):
        kinds_of(word)


def test_narrowing(capsys: pytest.CaptureFixture) -> None:
    main(["attention", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {one["kind"] for one in found} == {"attention", "edit", "core"}
    assert {"Attention", "RoPE", "SDPA"} <= {one["name"] for one in found}
    sdpa = next(one for one in found if one["name"] == "SDPA")
    assert sdpa["socket"] == "model.block.attention.core"
    assert set(sdpa) == {"kind", "name", "text", "paper", "file", "socket"}


@pytest.mark.parametrize("width", [80, 100, 140])
def test_it_fits_and_is_aligned(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    main([])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    titles = [line.split()[0] for line in out.splitlines() if line and line[0] != " "]
    assert titles == [kind for kind in ORDER if kind in titles], "in order, each once"
    assert all(entry.name in out for entry in ALL)
    norm = out.partition("\n\n")[0].splitlines()[1:]
    assert len({line.rindex("arXiv:" if width < 120 else "  ") for line in norm}) == 1
    assert ("Zhang & Sennrich" in out) == (width >= 120)
    assert "torch.optim.AdamW" not in out
    assert "blagpt list optimizer" in out


def test_what_is_cut_says_so() -> None:
    entry = catalogue.Entry("norm", "N", "word " * 40, "", "f.py")
    (line,) = table([entry], 60)
    assert line.endswith("word...")
    assert len(line) <= 60


def test_it_imports_none_of_it() -> None:
    script = """
import sys
from blagpt_pl import cli
sys.argv = ["blagpt", "list"]
cli.main()
sys.argv = ["blagpt", "list", "optimizer"]
cli.main()
print("heavy", sorted({"torch", "lightning", "jsonargparse", "numpy", "heavyball"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("heavy []\n")
    assert "torch.optim.AdamW" in done.stdout


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(kind in out for kind in (*ORDER, *GROUPS))
    assert max(map(len, out.splitlines())) <= 120


def test_all_is_listed_once() -> None:
    found = entries(ORDER)
    assert len({(entry.kind, entry.name) for entry in found}) == len(found)
    assert {e.name for e in ALL} <= {e.name for e in found}
