"""A file after the first is a difference: it changes something, is named once, and is no complete configuration."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.defaults import with_defaults
from blagpt_pl.lab.layers import from_arguments, is_complete
from blagpt_pl.lab.strict_yaml import load_mapping
from blagpt_pl.lab.trees import alike

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
EDITS = "model.block.attention.edits"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def layered(*names: str, flags: tuple[str, ...] = ()) -> dict:
    """Files and flags over each other; a bare name is that of a technique."""
    files = [name if "/" in name else f"configs/techniques/{name}.yaml" for name in names]
    return from_arguments([*(word for file in files for word in ("--config", file)), *flags]).tree


def refused(*names: str, flags: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        layered(*names, flags=flags)
    return str(error.value)


BLAGPT, GPT2 = "configs/blagpt.yaml", "configs/gpt2.yaml"
TOKENFORMER = "configs/models/tokenformer.yaml"

# ---------------------------------------------------------------------- nothing is changed


@pytest.mark.parametrize(
    "names",
    [
        (GPT2, "gelu"),  # says a ratio of 4, which is MLP's default
        (GPT2, "mha"),
        (GPT2, "no_zero_init"),
        (GPT2, "layernorm"),
        (BLAGPT, TOKENFORMER, "layernorm"),
        (BLAGPT, "gelu", "configs/again.yaml"),
    ],
)
def test_a_file_that_changes_nothing_is_refused(names: tuple, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    again.write_text((ROOT / "configs/techniques/gelu.yaml").read_text())
    files = [str(again) if name == "configs/again.yaml" else name for name in names]
    last = files[-1] if "/" in files[-1] else f"configs/techniques/{files[-1]}.yaml"
    why = "changes nothing here: all that it says is so already"
    assert refused(*files) == f"{last}: {why}; fix: leave it out"


def test_a_file_that_differs_in_part_is_one() -> None:
    layered(BLAGPT, TOKENFORMER, "post_norm")
    layered(GPT2, "qkv_bias")


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("p: RMSNorm", "p: RMSNorm", False),
        ("p: RMSNorm", "p: {class_path: RMSNorm}", False),
        ("p: RMSNorm", "p: {class_path: RMSNorm, init_args: {}}", False),
        ("p: RMSNorm", "p: {class_path: RMSNorm, init_args: null}", False),
        ("p: {class_path: RMSNorm, init_args: null}", "p: RMSNorm", False),
        ("p: {class_path: A, init_args: {x: RMSNorm, y: 1}}", "p.x: {class_path: RMSNorm, init_args: {}}", False),
        ("p: {class_path: blagpt_pl.nn.norm.RMSNorm, init_args: {eps: 1}}", "p: RMSNorm", False),
        ("p: RMSNorm", "p: {class_path: RMSNorm, init_args: {eps: 1}}", True),
        ("p: RMSNorm", "p: my.RMSNorm", True),
        ("p: {class_path: A, init_args: {x: 1}}", "p.init_args.x: 1", False),
        ("p: {class_path: A, init_args: {x: 1}}", "p.x: 1.0", False),
        ("p: {class_path: A, init_args: {x: 1}}", "p.x: true", True),
        ("p: {class_path: A, init_args: {x: 1}}", "p.y: null", True),
        ("l: [A, {class_path: B}]", "l: [{class_path: A}, B]", False),
        ("l: [A, B]", "l: [B, A]", True),
        ("l: [A, B]", "l+: []", False),
        ("l: [A, B]", "l+: A", True),
        ("a: {b: 1, c: 2}", "a: {c: 2}", False),
        ("a: {b: 1}", "a: {c: 2}", True),
    ],
)
def test_what_is_a_change(old: str, new: str, changes: bool, tmp_path: Path) -> None:
    for name, text in (("old", old), ("new", new)):
        (tmp_path / f"{name}.yaml").write_text(text)
    if changes:
        layered(f"{tmp_path}/old.yaml", f"{tmp_path}/new.yaml")
    else:
        assert "new.yaml: changes nothing here" in refused(f"{tmp_path}/old.yaml", f"{tmp_path}/new.yaml")


leaves = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["A", "b"])
nodes = st.recursive(
    leaves,
    lambda below: (
        st.lists(below, max_size=2)
        | st.dictionaries(st.sampled_from("xy"), below, max_size=2)
        | st.builds(
            lambda c, v: {"class_path": c, "init_args": v},
            st.sampled_from("PQ"),
            st.dictionaries(st.sampled_from("xy"), below),
        )
    ),
    max_leaves=6,
)


def normal(node: object) -> object:
    """A tree in its longest form, with the type of every value; written without the house's help."""
    if isinstance(node, list):
        return [normal(item) for item in node]
    if isinstance(node, str):
        return {"class_path": node, "init_args": {}}
    if isinstance(node, dict) and "class_path" in node:
        return {"class_path": node["class_path"], "init_args": normal(node.get("init_args") or {})}
    if isinstance(node, dict):
        return {key: normal(value) for key, value in node.items()}
    return isinstance(node, bool), node


@settings(max_examples=300, deadline=None)
@given(nodes, nodes)
def test_alike_is_sameness_of_the_normal_form(one: object, other: object) -> None:
    assert alike(one, other) == (normal(one) == normal(other))
    assert alike(one, copy.deepcopy(one))
    assert alike(one, normal_text(one))


def normal_text(node: object) -> object:
    """The same tree with every part that has no values written as its name."""
    if isinstance(node, list):
        return [normal_text(item) for item in node]
    if isinstance(node, dict):
        if "class_path" in node and not node.get("init_args"):
            return node["class_path"]
        return {key: normal_text(value) for key, value in node.items()}
    return node


def test_a_default_that_is_said_is_no_change() -> None:
    gelu = {"class_path": "GELU", "init_args": {"tanh": False}}
    assert with_defaults("GELU") == with_defaults({"class_path": "GELU"}) == gelu
    assert with_defaults([{"class_path": "GELU", "init_args": {"tanh": True}}]) == [
        {"class_path": "GELU", "init_args": {"tanh": True}}
    ]
    assert with_defaults({"x": "GELU", "y": 3}) == {"x": gelu, "y": 3}
    assert with_defaults("torch.optim.SGD")["init_args"]["momentum"] == 0
    for unknown in ("Xyzzy", "my_ideas.Part", "nowhere", "", "torch.float32", None, 3):
        assert with_defaults(unknown) == unknown


# ---------------------------------------------------------------------- complete


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_are_complete_or_differences(name: str) -> None:
    said = load_mapping((ROOT / name).read_text(), name)
    assert is_complete(said) == (Path(name).parent == Path("configs"))


def test_how_a_file_is_complete() -> None:
    assert is_complete({"model": "BlaGPT", "data.source": "PythonLibrary"})
    assert is_complete({"model.class_path": "BlaGPT", "data": {"source": {"class_path": "S"}}})
    assert not is_complete({"model": {"d_model": 3}, "data.source": "PythonLibrary"})
    assert not is_complete({"model": "BlaGPT", "data.context": 3})
    assert not is_complete({f"{EDITS}-": "RoPE", "data.source": "PythonLibrary"})
    assert not is_complete({"data": None, "model": "BlaGPT"})


@pytest.mark.parametrize(
    ("names", "last", "mixed"),
    [
        ((BLAGPT, GPT2), GPT2, BLAGPT),
        (("z_loss", BLAGPT), BLAGPT, "configs/techniques/z_loss.yaml"),
        ((BLAGPT, "z_loss", "configs/best.yaml"), "configs/best.yaml", BLAGPT),
        (("z_loss", "kv_shift", GPT2), GPT2, "configs/techniques/z_loss.yaml"),
    ],
)
def test_a_complete_configuration_comes_first_and_alone(names: tuple, last: str, mixed: str) -> None:
    assert refused(*names) == (
        f"{last}: is a complete configuration, which would be mixed with what {mixed} says; "
        "fix: name it first, and no other complete one"
    )


def test_another_architecture_without_data_is_a_difference(tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("model: {class_path: Mine, init_args: {d_model: 3}}")
    assert layered(BLAGPT, f"{tmp_path}/over.yaml")["model"] == {"class_path": "Mine", "init_args": {"d_model": 3}}


# ---------------------------------------------------------------------- twice


def test_a_file_is_named_once(tmp_path: Path) -> None:
    kv_shift = "configs/techniques/kv_shift.yaml"
    for again in (kv_shift, f"./{kv_shift}", str(ROOT / kv_shift), "configs/models/../techniques/kv_shift.yaml"):
        assert refused(BLAGPT, kv_shift, again) == f"{again}: is named twice; fix: leave one of them out"
    (tmp_path / "link.yaml").symlink_to(ROOT / kv_shift)
    assert refused(BLAGPT, kv_shift, f"{tmp_path}/link.yaml").endswith("is named twice; fix: leave one of them out")
    assert "is named twice" in refused(BLAGPT, BLAGPT)


# ---------------------------------------------------------------------- flags have a subject


@pytest.mark.parametrize(
    ("names", "flags", "said"),
    [
        (("kv_shift",), (f"--{EDITS}=[RoPE]",),
         (f"--{EDITS}: assigns all of {EDITS}, which drops {EDITS}[KVShift] that configs/techniques/kv_shift.yaml set; "
         "fix: leave one of them out, or change the list by edits+= (append), .+edits= (prepend), edits-= (remove)")),
        (("kv_shift",), ("--model.block.attention", "LatentAttention"),
         (f"--model.block.attention: names another model.block.attention, which drops {EDITS}[KVShift] that "
         "configs/techniques/kv_shift.yaml set; fix: leave one of them out, or name configs/techniques/kv_shift.yaml later, "
         "if the new model.block.attention takes that")),
        ((), ("--model.block.mlp.activation=GELU", "--model.block.mlp", "MLP"),
         ("--model.block.mlp: names another model.block.mlp, which drops model.block.mlp.activation that "
         "--model.block.mlp.activation set; fix: leave one of them out, or name --model.block.mlp.activation later, "
         "if the new model.block.mlp takes that")),
        ((), (f"--{EDITS}[Nope].x=1",), f"--{EDITS}[Nope].x: no elements match [Nope] (the list holds QKNorm, RoPE)"),
        ((), (f"--{EDITS}-=Nope",), f"--{EDITS}-: no elements match Nope (the list holds QKNorm, RoPE)"),
        ((), ("--model.d_model.x", "1"), "--model.d_model.x: model.d_model holds 768, which has no 'x'"),
    ],
)  # fmt: skip
def test_what_a_flag_does_wrong_begins_with_the_flag(names: tuple, flags: tuple, said: str) -> None:
    assert refused(BLAGPT, *names, flags=flags) == said


# ---------------------------------------------------------------------- who removed it


@pytest.mark.parametrize(
    ("names", "flags", "said"),
    [
        ((BLAGPT, "nope", "rope_base"), (),
         (f"configs/techniques/rope_base.yaml: {EDITS}[RoPE].theta: no elements match [RoPE] (the list holds QKNorm); "
         "configs/techniques/nope.yaml removed it")),
        ((BLAGPT, "nope", "learned_positions"), (),
         (f"configs/techniques/learned_positions.yaml: {EDITS}-: no elements match RoPE (the list holds QKNorm); "
         "configs/techniques/nope.yaml removed it")),
        ((BLAGPT,), (f"--{EDITS}-=RoPE", f"--{EDITS}[RoPE].theta=1"),
         f"--{EDITS}[RoPE].theta: no elements match [RoPE] (the list holds QKNorm); --{EDITS}- removed it"),
        ((BLAGPT, "nope", "no_qk_norm"), (f"--{EDITS}[QKNorm].norm.eps=1",),
         (f"--{EDITS}[QKNorm].norm.eps: edits holds nothing, so there is no QKNorm in it; "
         "configs/techniques/no_qk_norm.yaml removed it")),
        ((GPT2, "rope_base"), (),
         f"configs/techniques/rope_base.yaml: {EDITS}[RoPE].theta: edits holds nothing, so there is no RoPE in it"),
        ((GPT2, "nope"), (), f"configs/techniques/nope.yaml: {EDITS}-: edits holds nothing, so there is no RoPE in it"),
    ],
)  # fmt: skip
def test_an_element_that_is_gone(names: tuple, flags: tuple, said: str) -> None:
    assert refused(*names, flags=flags) == said


def test_a_file_that_removes_and_then_selects(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({f"{EDITS}-": "RoPE", f"{EDITS}[RoPE].theta": 1}, sort_keys=False))
    assert refused(BLAGPT, f"{tmp_path}/x.yaml").endswith("(the list holds QKNorm); the same file removed it")
