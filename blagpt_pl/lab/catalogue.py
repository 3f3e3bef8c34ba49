"""What there is to choose from, read from the source text without importing any of it, so that it cannot go stale.

A part belongs to the kind whose base class it derives from, followed by name over the house's own files. It is shown with
the first line of its docstring and the paper that its docstring names, else the paper that its module names for it. An
overlay or a configuration is shown with its first line, which is a comment.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
ROOMS = ("nn", "losses", "optim", "models", "data", "callbacks")
BASES = ("token_model.py",)  # what parts of the rooms derive from, and are not told of it by a room
KINDS = {  # kind: (base class, socket)
    "norm": ("Norm", "model.norm, model.block.norm, model.block.post_norm, model.embedding_norm"),
    "activation": ("Activation", "model.block.mlp.activation"),
    "mlp": ("ChannelMixer", "model.block.mlp, model.block.part of a SoloBlock"),
    "attention": ("SequenceMixer", "model.block.attention, model.block.part of a SoloBlock"),
    "edit": ("HeadEdit", "model.block.attention.edits, a list"),
    "core": ("Core", "model.block.attention.core"),
    "cross": ("Cross", "model.cross, and within pools and upsamplings"),
    "pool": ("Pool", "model.pool"),
    "upsample": ("Upsample", "model.upsample"),
    "positions": ("Positions", "model.positions"),
    "head": ("Head", "model.head"),
    "block": ("Block", "model.block"),
    "init": ("Init", "model.init"),
    "memory": ("MemoryPolicy", "model.memory"),
    "loss": ("LossTerm", "model.losses, a list"),
    "schedule": ("Schedule", "model.schedule"),
    "optimizer": ("Optimizer", "model.optimizer"),
    "model": ("LanguageModel", "model"),
    "source": ("Source", "data.source"),
    "tokenizer": ("Tokenizer", "data.source.tokenizer"),
    "callback": ("Callback", "trainer.callbacks, a list"),
}
SELF = ("Block",)  # base classes that are parts themselves
OVERLAYS = {
    "techniques": "technique",
    "models": "model",
    "optim": "optimizer",
    "data": "source",
    "memory": "memory",
    "trainer": "trainer",
}
UNFIT = ("LBFGS", "Muon", "SparseAdam")  # one group only; matrices only; sparse gradients only
FAMILY = ("Optimizer", "Adam")  # what torch's optimizers derive from
FIRST_LINE = re.compile(
    r"# (?P<name>[^:]+): (?P<what>.+)\. (?P<authors>(?:[^.]|et al\.)+ \d{4}(?: \([^)]*\))?)(?:, arXiv:(?P<arxiv>\d{4}\.\d{4,5}))?"
)
_ARXIV = re.compile(r"arXiv:\d{4}\.\d{4,5}")
_CITED = re.compile(
    r"(?P<who>[A-Z][^\W\d_]+(?:[ -][^\W\d_]+\.?| & [^\W\d_]+)* \d{4}\b)(?: \([^)]*\))?"
    r'(?:, "[^"]*")?(?:, (?P<arxiv>arXiv:\d{4}\.\d{4,5}))?'
)


@dataclass(frozen=True)
class Entry:
    """One thing to choose.

    Attributes:
        kind: what it is, one of `KINDS` or of a folder of overlays; `config` for a complete configuration.
        name: what to write in a configuration, or the file to name after `--config`.
        text: one line on what it is.
        paper: where it comes from: `Authors year, arXiv:ID`, one of the two, or nothing.
        file: where it is written.
    """

    kind: str
    name: str
    text: str
    paper: str
    file: str


@dataclass(frozen=True)
class _Class:
    node: ast.ClassDef
    file: Path
    module_doc: str

    @property
    def bases(self) -> list[str]:
        """Bare names of the bases, without type arguments."""
        names = [base.value if isinstance(base, ast.Subscript) else base for base in self.node.bases]
        return [
            n.attr if isinstance(n, ast.Attribute) else n.id for n in names if isinstance(n, ast.Attribute | ast.Name)
        ]

    @property
    def methods(self) -> Iterator[ast.FunctionDef]:
        return (n for n in self.node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _classes(root: Path) -> dict[str, _Class]:
    files = [file for room in ROOMS for file in sorted((root / room).rglob("*.py"))]
    files += [root / name for name in BASES if (root / name).is_file()]
    trees = {file: _parse(file) for file in files}
    return {
        node.name: _Class(node, file, ast.get_docstring(tree) or "")
        for file, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _line_up(name: str, classes: dict[str, _Class]) -> list[str]:
    """A class and all that it derives from, as far as the house knows, nearest first."""
    found: list[str] = []
    for base in (name, *(b for n in classes[name].bases for b in (_line_up(n, classes) if n in classes else [n]))):
        if base not in found:
            found.append(base)
    return found


def _is_abstract(node: ast.FunctionDef) -> bool:
    return any("abstract" in ast.unparse(d) for d in node.decorator_list)


def _only_raises(node: ast.FunctionDef) -> bool:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return len(body) == 1 and isinstance(body[0], ast.Raise)


def _asks(node: ast.FunctionDef) -> bool:
    """Whether a method is there for somebody else to write."""
    return _only_raises(node) and "NotImplementedError" in ast.unparse(node.body[-1])


def _is_part(name: str, base: str, classes: dict[str, _Class]) -> bool:
    """Whether a class can be used: nothing abstract is left, and something is done that its kind leaves open."""
    line = _line_up(name, classes)
    if name.startswith("_") or base not in line or (name == base and base not in SELF):
        return False
    if any(map(_asks, classes[name].methods)):
        return False
    first: dict[str, ast.FunctionDef] = {}
    for one in line:
        for method in classes[one].methods if one in classes else ():
            first.setdefault(method.name, method)
    below = line if base in SELF else [n for n in line if n in classes and base in _line_up(n, classes) and n != base]
    does = (m for n in below if n in classes for m in classes[n].methods)
    return not any(map(_is_abstract, first.values())) and any(
        not _only_raises(m) and m.name != "__init__" and not _is_abstract(m) for m in does
    )


def _paper(text: str) -> str:
    """The first paper that a text names: authors and year with the id that follows, or an id alone."""
    text = " ".join(text.split())
    cited, arxiv = _CITED.search(text), _ARXIV.search(text)
    if cited and (arxiv is None or cited.start() < arxiv.start()):
        return ", ".join(filter(None, (cited["who"], cited["arxiv"])))
    return arxiv[0] if arxiv else ""


def paper_of(name: str, doc: str, module_doc: str, is_alone: bool = True) -> str:
    """The paper of a class: its docstring's, else that of the module's line that begins with its name, else of `Source`.

    Where several parts share a `Source`, one without an arXiv id may be of one of them only, and is left out.
    """
    if _ARXIV.search(doc):
        return _paper(doc)
    for label in (name, "Source"):
        line = re.search(rf"^{label}  .*(?:\n .*)*", module_doc, re.MULTILINE)
        if line and (label == name or is_alone or _ARXIV.search(line[0])):
            return _paper(line[0].partition(label)[2])
    return ""


def _first_line(doc: str) -> str:
    """The first sentence of a docstring, or what stands of it before an empty line."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[^.][.])\s+(?=[A-Z`])", text)[0]


def parts(root: Path = HOUSE) -> Iterator[Entry]:
    """Every part that a package of the house's shape defines."""
    classes = _classes(root)
    hidden = _in_every_run(root)
    found = [
        (kind, name, classes[name])
        for kind, (base, _) in KINDS.items()
        for name in sorted(classes)
        if name not in hidden and _is_part(name, base, classes)
    ]
    for kind, name, cls in found:
        doc = ast.get_docstring(cls.node) or ""
        is_alone = sum(other.file == cls.file for _, _, other in found) == 1
        file = str(cls.file.relative_to(root.parent))
        yield Entry(kind, name, _first_line(doc), paper_of(name, doc, cls.module_doc, is_alone), file)


def _in_every_run(root: Path) -> set[str]:
    """The callbacks that a configuration may not name (`lab/rules.py`)."""
    rules = root / "lab" / "rules.py"
    named = {
        target.id: node.value
        for node in (_parse(rules).body if rules.is_file() else ())
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
    }
    return {name for key in ("HOUSE", "ALWAYS") if key in named for name in ast.literal_eval(named[key])}


def torch_optimizers() -> Iterator[Entry]:
    """torch's optimizers that take parameter groups of any shape, by full name, from the text of its files."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "optim"
    public = {one.value for one in ast.walk(_parse(folder / "__init__.py")) if isinstance(one, ast.Constant)}
    trees = [_parse(file) for file in sorted(folder.glob("*.py"))]
    docs = {name: doc for tree in trees for name, doc in _assigned_docs(tree)}
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.name in public]
    for node in sorted(nodes, key=lambda node: node.name.lower()):
        if node.name not in UNFIT and any(ast.unparse(base).endswith(FAMILY) for base in node.bases):
            doc = ast.get_docstring(node) or docs.get(node.name, "")
            yield Entry("optimizer", f"torch.optim.{node.name}", _first_line(doc), _paper(doc), "torch.optim")


def _assigned_docs(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Docstrings that are assigned: `Adam.__doc__ = ...` in a module, `__doc__ = ...` in a class."""
    below = [(node.name, one) for node in tree.body if isinstance(node, ast.ClassDef) for one in node.body]
    for owner, node in (*((None, one) for one in tree.body), *below):
        target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if target.endswith(".__doc__" if owner is None else "__doc__"):
            texts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            yield owner or target.removesuffix(".__doc__"), max(texts, key=lambda text: "mplements" in text, default="")


def configs_folder(house: Path = HOUSE) -> Path | None:
    """`configs` of the current folder, else of the checkout that the package lies in."""
    return next((f for f in (Path("configs"), house.parent / "configs") if f.is_dir()), None)


def configurations(folder: Path) -> Iterator[Entry]:
    """Complete configurations, and the overlays below them."""
    for file in sorted(folder.rglob("*.yaml")):
        below = file.relative_to(folder).parts[:-1]
        kind = OVERLAYS.get(below[0], below[0]) if below else "config"
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        match = FIRST_LINE.fullmatch(first)
        if match:
            paper = match["authors"] + (f", arXiv:{match['arxiv']}" if match["arxiv"] else "")
            yield Entry(kind, str(file), f"{match['name']}: {match['what']}", paper, str(file))
        else:
            yield Entry(
                kind, str(file), _first_line(first.removeprefix("#")) if first[:1] == "#" else "", "", str(file)
            )
