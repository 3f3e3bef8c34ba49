"""Layers merge left to right; the last one to speak wins, and a part that is replaced takes its values with it."""

import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers, flag_value, from_arguments
from blagpt_pl.lab.places import same_class
from blagpt_pl.lab.trees import merge, put

A = {"class_path": "A", "init_args": {"x": 1, "y": {"class_path": "B", "init_args": {"z": 2}}}}


def over(old: object, **keys: object) -> object:
    """`old` in a tree under `p`, with keys put over it."""
    tree = {"p": copy.deepcopy(old)}
    for key, value in keys.items():
        put(tree, key, value)
    return tree["p"]


def changed(old: object, key: str, value: object) -> object:
    return over(old, **{key: value})


# ---------------------------------------------------------------------- properties

leaves = st.integers(0, 9) | st.none() | st.booleans() | st.lists(st.integers(0, 3), max_size=2)


def layers_over(below: st.SearchStrategy) -> st.SearchStrategy:
    """Layers of one shape: `a` is a value, `b` a mapping, `c` a part of class P, and none of them need be there."""
    part = st.builds(lambda init: {"class_path": "P", "init_args": init}, below)
    return st.fixed_dictionaries({}, optional={"a": leaves, "b": below, "c": part})


trees = st.recursive(st.just({}), layers_over, max_leaves=5)


@settings(max_examples=200, deadline=None)
@given(trees, trees, trees)
def test_merging_is_associative_where_no_class_changes(a: dict, b: dict, c: dict) -> None:
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


def test_a_class_that_comes_back_comes_back_empty() -> None:
    assert merge(merge(A, "C"), {"class_path": "A"}) == {"class_path": "A"}


@settings(max_examples=100, deadline=None)
@given(trees, trees)
def test_merging_changes_neither_and_shares_nothing(a: dict, b: dict) -> None:
    before = copy.deepcopy((a, b))
    result = merge(a, b)
    assert (a, b) == before
    for key in list(result):
        put(result, f"{key}+" if isinstance(result[key], list) else key, 1)
    assert (a, b) == before


@settings(max_examples=100, deadline=None)
@given(trees, trees)
def test_the_same_layer_twice_is_the_layer_once(a: dict, b: dict) -> None:
    once = merge(a, b)
    assert merge(once, b) == once


@settings(max_examples=100, deadline=None)
@given(trees, trees)
def test_what_the_last_layer_says_is_so(a: dict, b: dict) -> None:
    def holds(said: object, result: object) -> bool:
        if isinstance(said, dict):
            return isinstance(result, dict) and all(k in result and holds(v, result[k]) for k, v in said.items())
        return said == result

    assert holds(b, merge(a, b))


# ---------------------------------------------------------------------- parts


def test_another_class_drops_all_values() -> None:
    assert merge(A, "C") == "C"
    assert merge(A, {"class_path": "C"}) == {"class_path": "C"}
    assert merge(A, {"class_path": "C", "init_args": {"x": 5}}) == {"class_path": "C", "init_args": {"x": 5}}
    assert changed(A, "p.class_path", "C") == {"class_path": "C"}
    assert changed(A, "p.y.class_path", "C")["init_args"]["y"] == {"class_path": "C"}


def test_the_same_class_keeps_its_values() -> None:
    assert merge(A, "A") == A
    assert merge(A, {"class_path": "A"}) == A
    assert merge(A, {"class_path": "A", "init_args": None}) == A
    assert merge(A, {"class_path": "A", "init_args": {"x": 5}})["init_args"] == {**A["init_args"], "x": 5}
    assert (
        merge(A, {"init_args": {"x": 5}})
        == merge(A, {"x": 5})
        == changed(A, "p.x", 5)
        == changed(A, "p.init_args.x", 5)
    )
    assert changed(A, "p.class_path", "A") == A


def test_bare_then_class_path_then_bare() -> None:
    assert merge("A", {"class_path": "A", "init_args": {"x": 1}}) == {"class_path": "A", "init_args": {"x": 1}}
    assert merge("A", {"class_path": "C", "init_args": {"x": 1}}) == {"class_path": "C", "init_args": {"x": 1}}
    assert merge("A", {"x": 1}) == {"class_path": "A", "init_args": {"x": 1}}
    assert merge("A", "C") == "C"


def test_an_explicit_init_args_merges() -> None:
    assert changed(A, "p.init_args", {"x": 7})["init_args"] == {**A["init_args"], "x": 7}
    assert changed(A, "p", {"init_args": {"y.z": 7}})["init_args"]["y"]["init_args"] == {"z": 7}


def test_values_beside_class_path_are_values() -> None:
    assert merge(A, {"class_path": "A", "x": 7}) == changed(A, "p.x", 7)
    assert merge(None, {"x": 7, "class_path": "A"}) == {"class_path": "A", "init_args": {"x": 7}}
    assert merge(A, {"init_args": {"x": 7}, "w": 8})["init_args"]["w"] == 8, "nothing is dropped"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("AdamW", "torch.optim.AdamW", True), ("torch.optim.AdamW", "AdamW", True), ("A", "A", True), ("m.A", "m.A", True),
        ("blagpt_pl.nn.norm.RMSNorm", "RMSNorm", True), ("lightning.pytorch.loggers.CSVLogger", "CSVLogger", True),
        ("my_ideas.RMSNorm", "RMSNorm", False), ("heavyball.AdamW", "AdamW", False), ("torch.optm.AdamW", "torch.optim.AdamW", False),
        ("a.A", "b.A", False), ("A", "B", False), ("torch.optim.AdamW", "W", False), ("torch.optim.AdamW", "optim.AdamW", False),
        (None, "A", False), (3, "A", False), ([1], "A", False),
    ],
)  # fmt: skip
def test_names_of_one_class(one: object, other: object, same: bool) -> None:
    assert same_class(one, other) is same
    assert same_class(other, one) is same


def test_the_fuller_name_of_a_class_stays() -> None:
    old = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1}}
    assert merge(old, "AdamW") == old
    assert merge({"class_path": "AdamW", "init_args": {"lr": 1}}, "torch.optim.AdamW") == old
    assert merge(old, "torch.optm.AdamW") == "torch.optm.AdamW", "a misspelt module is not the same class"
    assert merge("blagpt_pl.x", "x") == "x", "plain text is replaced"


# ---------------------------------------------------------------------- dotted keys, lists, selectors

EDITS = {
    "class_path": "Attention",
    "init_args": {"edits": [{"class_path": "QKNorm", "init_args": {"norm": "RMSNorm"}}, "RoPE"]},
}


def test_dotted_keys_reach_through_init_args() -> None:
    assert changed(A, "p.y.z", 3)["init_args"]["y"] == {"class_path": "B", "init_args": {"z": 3}}
    assert changed(None, "p.q.r", 3) == {"q": {"r": 3}}
    assert changed({"class_path": "A"}, "p.y", 3) == {"class_path": "A", "init_args": {"y": 3}}
    assert changed({"class_path": "A", "init_args": None}, "p.y", 3) == {"class_path": "A", "init_args": {"y": 3}}
    assert merge({}, {"p.class_path": "A", "p.x": 1}) == {"p": {"class_path": "A", "init_args": {"x": 1}}}


def test_append() -> None:
    assert changed(EDITS, "p.edits+", "KVShift")["init_args"]["edits"][2:] == ["KVShift"]
    assert changed(EDITS, "p.edits+", ["K", {"class_path": "L", "x": 1}])["init_args"]["edits"][2:] == [
        "K", {"class_path": "L", "init_args": {"x": 1}},
    ]  # fmt: skip
    assert merge(EDITS, {"edits+": "K"}) == changed(EDITS, "p.edits+", "K")
    assert merge(EDITS, {"class_path": "Attention", "init_args": {"edits+": "K"}}) == changed(EDITS, "p.edits+", "K")
    assert changed(None, "p.losses+", "Z") == {"losses": ["Z"]}


def test_prepend() -> None:
    assert changed(EDITS, "p.+edits", "K")["init_args"]["edits"] == ["K", *EDITS["init_args"]["edits"]]
    assert changed(EDITS, "p.+edits", ["K", {"class_path": "L", "x": 1}])["init_args"]["edits"][:2] == [
        "K", {"class_path": "L", "init_args": {"x": 1}},
    ]  # fmt: skip
    assert merge(EDITS, {"+edits": "K"}) == changed(EDITS, "p.+edits", "K")
    assert merge(EDITS, {"class_path": "Attention", "init_args": {"+edits": "K"}}) == changed(EDITS, "p.+edits", "K")
    assert changed(None, "p.+losses", "Z") == {"losses": ["Z"]}
    assert changed({"l": [[1], [2]]}, "p.+l[1]", 0) == {"l": [[1], [0, 2]]}


def test_remove() -> None:
    qk_norm, rope = EDITS["init_args"]["edits"]
    for name in ("RoPE", 1, ["RoPE"], "1"):
        assert changed(EDITS, "p.edits-", name)["init_args"]["edits"] == [qk_norm]
    assert changed(EDITS, "p.edits-", "QKNorm")["init_args"]["edits"] == [rope]
    assert changed(EDITS, "p.edits-", [0, "RoPE"])["init_args"]["edits"] == [], (
        "indices are those of the list as it was"
    )
    assert changed(EDITS, "p.edits-", [])["init_args"]["edits"] == [qk_norm, rope]
    assert merge(EDITS, {"edits-": "RoPE"}) == changed(EDITS, "p.edits-", "RoPE")
    assert changed(["m.A", "n.A"], "p-", "m.A") == ["n.A"]
    assert changed(["A", "A", "A"], "p-", [0, 2]) == ["A"]


elements = st.lists(st.sampled_from("ABCDEF").map(lambda c: "P" + c), unique=True, max_size=6)


@settings(max_examples=100, deadline=None)
@given(elements, elements, elements)
def test_what_is_added_can_be_removed(old: list[str], front: list[str], back: list[str]) -> None:
    named = [f"{name}{i}" for i, names in enumerate((front, old, back)) for name in names]
    front, old, back = ([f"{name}{i}" for name in names] for i, names in enumerate((front, old, back)))
    tree = {"l": old}
    put(tree, "+l", front)
    put(tree, "l+", back)
    assert tree["l"] == named
    put(tree, "l-", [*back, *front])
    assert tree["l"] == old


def test_select() -> None:
    rope = {"class_path": "RoPE", "init_args": {"theta": 5}}
    for key in ("p.edits[RoPE].theta", "p.edits[1].theta", "p.edits[1].init_args.theta"):
        assert changed(EDITS, key, 5)["init_args"]["edits"][1] == rope
    assert changed(EDITS, "p.edits[RoPE]", {"theta": 5})["init_args"]["edits"][1] == rope
    assert changed(EDITS, "p.edits[QKNorm].norm.eps", 5)["init_args"]["edits"][0]["init_args"] == {
        "norm": {"class_path": "RMSNorm", "init_args": {"eps": 5}}
    }
    assert changed(EDITS, "p.edits[QKNorm]", "K")["init_args"]["edits"][0] == "K"
    assert changed(["m.A", "n.A"], "p[n.A].x", 1)[1] == {"class_path": "n.A", "init_args": {"x": 1}}
    assert changed([[1, 2], [3, 4]], "p[1][0]", 9) == [[1, 2], [9, 4]]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("p.edits[Nope].x", 1, "no elements match .*QKNorm, RoPE"),
        ("p.edits[7]", 1, "no elements match"),
        ("p.n[RoPE]", 1, "n is not a list"),
        ("p.none[0]", 1, r"^p.none\[0\]: none holds nothing, so there is no 0 in it$"),
        ("p.n.x", 1, "p.n holds 3, which has no 'x'"),
        ("p.n+", 1, "holds 3, not a list"),
        ("p.edits+", None, "nothing to be appended"),
        ("p.edits++", 1, "cannot be read as a path"),
        ("p.+edits+", 1, "cannot be read as a path"),
        ("p.+edits-", 1, "cannot be read as a path"),
        ("p.edits--", 1, "cannot be read as a path"),
        ("+p.edits", 1, "cannot be read as a path"),
        ("p.+", 1, "cannot be read as a path"),
        ("p.+n", 1, "holds 3, not a list, so nothing can be prepended"),
        ("p.+edits", None, "nothing to be prepended"),
        ("p.n-", "RoPE", "holds 3, not a list, so nothing can be removed"),
        ("p.edits-", None, "nothing to be removed"),
        ("p.edits-", "Nope", r"^p.edits-: no elements match Nope \(the list holds QKNorm, RoPE\)$"),
        ("p.edits-", 2, r"no elements match 2 \(the list holds QKNorm, RoPE\)"),
        ("p.none-", "RoPE", "^p.none-: none holds nothing, so there is no RoPE in it$"),
        ("p.edits-", ["RoPE", 1], "1 is removed already"),
        ("p.edits-", {"class_path": "RoPE"}, "expected the class of an element, its index"),
        ("p.edits-", True, "expected the class of an element, its index"),
        ("p..x", 1, "cannot be read as a path"),
        ("", 1, "cannot be read as a path"),
        ("p.a b", 1, "cannot be read as a path"),
        ("p.edits[RoPE", 1, "cannot be read as a path"),
        ("p.edits.x", 1, "which has no 'x'"),
    ],
)
def test_keys_that_lead_nowhere(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(merge(EDITS, {"n": 3}), key, value)


def test_one_of_two_of_a_class_needs_an_index() -> None:
    with pytest.raises(ConfigError, match=r"2 elements match \[A\].*fix: an index, such as \[0\]"):
        changed(["A", "A"], "p[A].x", 1)
    with pytest.raises(ConfigError, match=r"p-: 2 elements match A \(the list holds A, A\); fix: an index, such as 0$"):
        changed(["A", "A"], "p-", "A")


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-1", -1), ("-1.5", -1.5), ("1e-3", 1e-3), ("1e3", 1e3), ("-.5", -0.5), ("1_000", 1000), ("true", True),
        ("null", None), ("~", None), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ("[]", []), ("a: b", "a: b"), ("a #b", "a #b"),
        ("say: ", "say: "), ("key:", "key:"), ("", ""), ("-", "-"), ("--", "--"), ("...", "..."), ("---", "---"), ("- x", "- x"),
        ("*x", "*x"), ("&x", "&x"), ("!x", "!x"), ("%x", "%x"), ("@x", "@x"), ("? x", "? x"), ("'3'", "3"), ('"a: b"', "a: b"),
        ("'", "'"), ("my_ideas.RunningMean", "my_ideas.RunningMean"), ("data/x.bin", "data/x.bin"), ("10:30", "10:30"),
        ("a\tb: c", "a\tb: c"), ("x\ny: z", "x\ny: z"), ("bf16-mixed", "bf16-mixed"), ("=", "="), ("é", "é"),
    ],
)  # fmt: skip
def test_value_of_a_flag(text: str, value: object) -> None:
    got = flag_value(text, "a.b")
    assert got == value
    assert type(got) is type(value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12).filter(lambda s: s[:1] not in ("[", "{")))
def test_any_text_is_a_value(text: str) -> None:
    assert flag_value(text, "a") is None or isinstance(flag_value(text, "a"), str | int | float | bool)


def test_names_are_text() -> None:
    assert from_arguments(["--name", "2024", "--logs", "1e3"]).tree == {"name": "2024", "logs": "1e3"}
    assert from_arguments(["--ckpt_path", "null"]).tree == {"ckpt_path": None}


def test_flags() -> None:
    argv = ["--a.b=1", "--a.c", "-2", "--a.l+=x", "--a.l+", "y", "--a.t=p=q", "--a.e=", "--a.b", "3"]
    assert from_arguments(argv).tree == {"a": {"b": 3, "c": -2, "l": ["x", "y"], "t": "p=q", "e": ""}}
    argv = ["--a.l+=[x, y]", "--a.+l", "w", "--a.+l=[u, v]", "--a.l-", "y", "--a.l-=0"]
    assert from_arguments(argv).tree == {"a": {"l": ["v", "w", "x"]}}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--a.b"], "--a.b: has no value"), (["--a.b", "--c", "1"], "--a.b: has no value"), (["x"], "'x': belongs to no flag"),
        (["--a", "1", "2"], "'2': belongs to no flag"), (["-a", "1"], "'-a': belongs to no flag"), (["-cx"], "belongs to no flag"),
        (["--config"], "--config: has no value"), (["--a", "[1, 2"], "--a:1:"), (["--a={b: 1, b: 2}"], "written twice"),
        (["--=1"], "cannot be read as a path"),
    ],
)  # fmt: skip
def test_flags_that_are_wrong(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_arguments(argv)


def test_flags_that_are_passed_on() -> None:
    layers = from_arguments(
        ["--print_config", "--model.help", "BlaGPT", "--a", "1", "--x.help", "--b=2", "--help"], ["print_config"]
    )
    assert layers.rest == ["--print_config", "--model.help", "BlaGPT", "--x.help", "--help"]
    assert layers.tree == {"a": 1, "b": 2}


# ---------------------------------------------------------------------- files


def files(folder: Path, *texts: str) -> list[str]:
    argv = []
    for i, text in enumerate(texts):
        (folder / f"{i}.yaml").write_text(text)
        argv += ["--config", str(folder / f"{i}.yaml")]
    return argv


def test_the_same_append_in_two_files_appends_both(tmp_path: Path) -> None:
    argv = files(tmp_path, "m: {class_path: A, init_args: {edits: [Q]}}", "m.edits+: R", "m.edits+: [S, T]")
    assert from_arguments(argv).tree["m"]["init_args"]["edits"] == ["Q", "R", "S", "T"]


def test_files_and_flags_in_order(tmp_path: Path) -> None:
    first, second = files(tmp_path, "a: 1\nb: 1", "a: 2")[1::2]
    assert from_arguments(["-c", first, "--a=3", f"--config={second}", "--b", "4"]).tree == {"a": 2, "b": 4}
    assert from_arguments(["--a=3", "--config", first]).tree == {"a": 1, "b": 1}


def test_prepend_append_and_remove_in_one_file(tmp_path: Path) -> None:
    over = "m.+edits: [A, B]\nm.edits-: R\nm.edits+: Z"
    argv = files(tmp_path, "m: {class_path: A, init_args: {edits: [Q, R]}}", over)
    assert from_arguments(argv).tree["m"]["init_args"]["edits"] == ["A", "B", "Q", "Z"]
    with pytest.raises(ConfigError, match=r"0\.yaml:2:1: key 'm\.\+l' is written twice"):
        from_arguments(files(tmp_path, "m.+l: A\nm.+l: B"))
    with pytest.raises(ConfigError, match=r"1\.yaml: m\.l-: no elements match B \(the list holds A\)"):
        from_arguments(files(tmp_path, "m.l: [A]", "m.l-: B"))


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    text = "x: &x {l: [{class_path: A}], n: {k: 1}}\ny: *x\ny.l[A].v: 1\ny.n.k: 2\ny.l+: B"
    assert from_arguments(files(tmp_path, text)).tree["x"] == {"l": [{"class_path": "A"}], "n": {"k": 1}}


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1\.yaml: says nothing; fix: leave it out$"):
        from_arguments(files(tmp_path, "a: 1", "# nothing"))


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1\.yaml: a\[B\]\.x: "):
        from_arguments(files(tmp_path, "a: [A]", "a[B].x: 1"))
    with pytest.raises(ConfigError, match=r"0\.yaml: class_path: stands at the top"):
        from_arguments(files(tmp_path, "class_path: A"))


# ---------------------------------------------------------------------- where


@pytest.fixture
def told(tmp_path: Path) -> Layers:
    base = """\
model:
  class_path: M
  init_args:
    norm: N
    block:
      class_path: B
      init_args:
        norm: &n {class_path: N, init_args: {eps: 1}}
        edits:
        - {class_path: Q, init_args: {norm: N}}
        - my.RoPE
    other: {<<: *n}
t: {max: 1}
"""
    over = """\
t.max: 2
model.block.edits+: K
model.block.edits[RoPE].theta: 3
model:
  d: 4
  block.+edits:
  - P
  - {class_path: S, init_args: {v: 1}}
model.block.edits-: Q
"""
    return from_arguments(
        [*files(tmp_path, base, over), "--t.min", "3", "--model.block.edits+={class_path: Z, init_args: {w: 1}}"]
    )


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("t.max", "1.yaml:1"), ("t.min", "on the command line"), ("model", "1.yaml:4"), ("model.d", "1.yaml:5"),
        ("model.norm", "0.yaml:4"), ("model.block", "0.yaml:6"), ("model.block.norm", "0.yaml:8"), ("model.block.norm.eps", "0.yaml:8"),
        ("model.block.edits[Q].norm", "0.yaml:10"), ("model.block.edits[P].x", "1.yaml:7"), ("model.block.edits[S].v", "1.yaml:8"), ("model.block.edits[S].w", "1.yaml:8"),
        ("model.block.edits[Q]", "0.yaml:10"), ("model.block.edits[K]", "1.yaml:2"), ("model.block.edits[RoPE].theta", "1.yaml:3"),
        ("model.block.edits[1].theta", "1.yaml:3"), ("model.block.edits[Z].w", "on the command line"), ("model.block.edits[Z]", "on the command line"),
        ("model.block.norm.missing", "0.yaml:8"), ("model.block.missing", "0.yaml:6"),
    ],
)  # fmt: skip
def test_where(told: Layers, path: str, place: str) -> None:
    assert told.where(path).endswith(f"{place})")


def test_where_of_nothing(told: Layers) -> None:
    assert told.where("nowhere") == ""
