"""What an overlay says is so in the end, or a later layer said it anew in so many words, or there is an error."""

from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers, from_arguments
from blagpt_pl.lab.trees import put
from blagpt_pl.lab.undone import Watch

BASE = """\
model:
  class_path: M
  init_args:
    width: 8
    norm: N
    attention:
      class_path: A
      init_args:
        heads: 4
        gate: null
        core: SDPA
        edits: [{class_path: Q, init_args: {norm: N}}, R]
    mlp: {class_path: G, init_args: {activation: SiLU}}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1, betas: [1, 2]}}
trainer: {precision: bf16-mixed, prompts: [a, b]}
name: base
"""


def merged(folder: Path, *layers: str | tuple[str, str], base: str = BASE) -> Layers:
    """Layers over the base: a text is a file (1.yaml, 2.yaml, ...), a pair is a flag."""
    argv = []
    for i, layer in enumerate((base, *layers)):
        if isinstance(layer, tuple):
            argv += [f"--{layer[0]}={layer[1]}"]
        else:
            (folder / f"{i}.yaml").write_text(layer)
            argv += ["--config", str(folder / f"{i}.yaml")]
    return from_arguments(argv)


# ---------------------------------------------------------------------- by hand

SHIFT = "model.attention.edits+: K"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([SHIFT, "model.attention: {class_path: L, rank: 3}"],
         r"2\.yaml: names another model.attention, which drops model.attention.edits\[K\] that (\S+1\.yaml) set; fix: leave one of them out, or name \1 later, if the new model.attention takes that$"),
        ([SHIFT, ("model.attention", "L")], r"^--model.attention: names another model.attention, which drops model.attention.edits\[K\] that \S+1.yaml set"),
        ([SHIFT, "model.attention.edits: [R]"],
         r"2\.yaml: assigns all of model.attention.edits, which drops model.attention.edits\[K\] that \S+1.yaml set; fix: leave one of them out, or change the list by edits\+: \(append\), "),
        ([SHIFT, ("model.attention.edits", "[R]")], r"^--model.attention.edits: assigns all of model.attention.edits, which drops .*\[K\]"),
        ([SHIFT, "model: {class_path: M, init_args: {attention: {class_path: L, init_args: {rank: 1}}}}"], "names another model.attention, which"),
        ([SHIFT, "model: Other"], r"names another model, which drops model.attention.edits\[K\]"),
        ([SHIFT, "model.attention.edits-: K"], r"removes model.attention.edits\[K\], which drops"),
        ([SHIFT, "model.attention.edits[K]: Z"], r"removes model.attention.edits\[K\], which drops"),
        ([SHIFT, "model.attention.edits[2]: Z"], r"removes model.attention.edits\[K\], which drops"),
        (["model.attention.+edits: [{class_path: K, x: 1}]", "model.attention.edits[K].x: 2", ("model.attention.edits-", "K")],
         r"removes model.attention.edits\[K\], which drops model.attention.edits\[K\].x that \S+2.yaml set"),
        (["model.attention.edits-: R", "model.attention: L"], r"names another .*, which undoes the removal of model.attention.edits\[R\] by \S+1.yaml"),
        (["model.attention.edits-: R", "model.attention.edits: [R]"], r"assigns all of .*, which undoes the removal of"),
        (["model.attention.edits-: R", "model.attention.edits+: {class_path: R, x: 1}"], r"2.yaml: adds model.attention.edits\[R\], which undoes the removal"),
        (["model.attention.edits-: R", ("model.attention.edits", "[Q, R]")], "undoes the removal"),
        (["model.attention.edits[R].theta: 5", "model.attention.edits: [R]"], r"drops model.attention.edits\[R\].theta"),
        (["model.attention.edits[1].theta: 5", "model.attention.edits-: 1"], r"removes .*\[R\], which drops model.attention.edits\[R\].theta"),
        (["model.mlp: MLP", "model.mlp: {class_path: P, n: 3}"], r"2.yaml: names another model.mlp, which drops model.mlp that \S+1.yaml set; fix: leave one of them out$"),
        (["model.attention.core: X", "model.attention.core: Y"], "names another model.attention.core"),
        (["model.attention.core: X", "model.attention.core.class_path: my.X"], "names another model.attention.core"),
        (["model.mlp.activation: GELU", "model.mlp: MLP"], "names another model.mlp, which drops model.mlp.activation"),
        (["model.mlp.activation: GELU", ("model.mlp", "MLP")], "^--model.mlp: names another model.mlp, which drops model.mlp.activation"),
        (["optimizer.lr: 2", "optimizer: {class_path: Muon, init_args: {momentum: 3}}"], "names another optimizer, which drops optimizer.lr"),
        (["optimizer.lr: 2", "optimizer: {class_path: Muon, init_args: {lr: 3}}"],
         r"2.yaml: names another optimizer, which drops optimizer.lr that (\S+1.yaml) set; fix: leave one of them out, or name \1 later, if"),
        (["model.attention.gate: S", "model.attention.gate: null"], "sets model.attention.gate, which drops model.attention.gate"),
        (["model.norm: null", "model.norm.x: 1"], "sets model.norm.x, which drops model.norm that"),
        (["trainer.prompts+: c", "trainer.prompts: [d]"], r"assigns all of trainer.prompts, which drops trainer.prompts\[c\]"),
        ([f"{SHIFT}\nmodel.attention: L"], r"1.yaml: names another model.attention, which drops .*\[K\] that the same file set; fix: leave one of them out$"),
        ([("model.mlp.activation", "GELU"), ("model.mlp", "MLP")], "drops model.mlp.activation that --model.mlp.activation set"),
        ([("model.mlp", "MLP"), "model.mlp: P"], "1?.yaml: names another model.mlp, which drops model.mlp that --model.mlp set"),
    ],
)  # fmt: skip
def test_what_is_undone_is_an_error(layers: list, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        merged(tmp_path, *layers)


@pytest.mark.parametrize(
    "layers",
    [
        ["model.attention: {class_path: L, rank: 3}", "model.attention.edits+: K"],
        ["model.attention: L", "model.mlp: P", "model.attention.rank: 3"],
        ["model.norm: X", "model.norm: X\nname: x"],
        ["model.norm: X", "model.norm: {class_path: X, init_args: {eps: 1}}", "model.norm.eps: 2"],
        ["model.norm: X", "model.norm: blagpt_pl.nn.norm.X\nname: x"],
        ["model.norm: X", ("model.norm", "Y")],
        ["model.norm: {class_path: X, eps: 3}", ("model.norm", "Y")],
        ["model.mlp: {class_path: P, init_args: {activation: {class_path: GELU, tanh: true}}}", ("model.mlp", "MLP")],
        ["model.attention.gate: S", ("model.attention.gate", "null")],
        ["model.attention.gate: null\nname: x", "model.attention.gate: S"],
        ["model.width: 3", "model.width: 4", ("model.width", "5")],
        ["model: {width: 3}", "model.init_args.width: 4"],
        ["model.width: 3", "model.width: null"],
        ["trainer.precision: 16-true", "trainer.precision: 32-true"],
        ["trainer.prompts: [x]", "trainer.prompts: [y]"],
        ["trainer.prompts: [x]", ("trainer.prompts[0]", "y")],
        ["optimizer.betas: [3, 4]", "optimizer.betas: [5, 6]"],
        ["optimizer.betas[0]: 3", "optimizer.betas[0]: 4"],
        ["name: Mine", "name: Yours"],
        [SHIFT, "model.attention.edits+: Z", "model.attention.+edits: Y"],
        [SHIFT, SHIFT, ("model.attention.edits-", "3")],
        [SHIFT, "model.attention.edits: [Q, K, R]"],
        [SHIFT, ("model.attention.edits-", "K")],
        [SHIFT, ("model.attention.edits[K]", "Z")],
        ["model.attention.edits+: {class_path: K, x: 1}", ("model.attention.edits-", "K")],
        ["model.attention.edits+: {class_path: K, x: 1}", "model.attention.edits[K].x: 2"],
        ["model.attention.edits: [K]", ("model.attention.edits", "[R]")],
        ["model.attention.edits: []", "model.attention.edits+: K"],
        ["model.attention.edits-: [Q, R]", "model.attention.edits+: K"],
        ["model.attention.edits-: R", ("model.attention.edits+", "R")],
        ["model.attention.edits-: R", "model.attention: {class_path: L, init_args: {edits: []}}"],
        ["model.attention.heads: 2", "model.attention: {class_path: L, init_args: {heads: 2}}"],
        ["optimizer.lr: 2", ("optimizer", "{class_path: Muon, init_args: {lr: 3}}")],
        ["optimizer.lr: 2", "optimizer: {class_path: AdamW, init_args: {lr: 3}}"],
        ["optimizer: {class_path: Muon, init_args: {lr: 3}}", "optimizer.lr: 2"],
        ["model.attention.edits-: R\nmodel.attention.edits+: {class_path: R, init_args: {theta: 3}}"],
        [("model.mlp", "MLP"), ("model.mlp.activation", "GELU"), ("model.mlp", "P")],
    ],
)  # fmt: skip
def test_what_holds_or_is_said_anew_is_none(layers: list, tmp_path: Path) -> None:
    merged(tmp_path, *layers)


OWN = "model: {class_path: M2, init_args: {width: 4, attention: {class_path: A, init_args: {edits: [R]}}, mlp: {class_path: P, init_args: {tokens: 3}}}}"


def test_a_file_with_a_model_of_its_own_is_a_base_too(tmp_path: Path) -> None:
    after = ["model.mlp: {class_path: G, init_args: {activation: SiLU}}", SHIFT, "model.width: 5"]
    model = merged(tmp_path, OWN, *after).tree["model"]["init_args"]
    assert model["mlp"] == {"class_path": "G", "init_args": {"activation": "SiLU"}} and model["width"] == 5
    for layers, words in (
        ([OWN, "model: {class_path: M3}"], "2.yaml: names another model, which drops model that .*1.yaml set"),
        ([SHIFT, OWN], r"names another model, which drops model.attention.edits\[K\]"),
        ([OWN, SHIFT, "model.attention: L"], r"names another model.attention, which drops model.attention.edits\[K\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            merged(tmp_path, *layers)
    same = "model: {class_path: M, init_args: {mlp: {class_path: P}}}"  # a difference, though it names the model
    with pytest.raises(ConfigError, match="names another model.mlp, which drops model.mlp that"):
        merged(tmp_path, same, "model.mlp: {class_path: G}")


def test_the_base_may_be_differed_from_at_will(tmp_path: Path) -> None:
    merged(tmp_path, ("model", "Other"))
    merged(tmp_path, "model.attention: L\nmodel.mlp: P\noptimizer: Muon\nmodel.norm: X")
    merged(tmp_path, base=f"{BASE}\nmodel.attention.edits+: K\nmodel.attention.edits-: K")


# ---------------------------------------------------------------------- any layers

numbers = st.integers(0, 2)


def part(names: str, option: str) -> st.SearchStrategy:
    """A part with or without its one option: (YAML, what it says below its own place)."""
    bare = st.sampled_from(names).map(lambda c: (c, [("", "class", c)]))
    told = st.builds(
        lambda c, n: ({"class_path": c, "init_args": {option: n}}, [("", "class", c), (f".{option}", "value", n)]),
        st.sampled_from(names), numbers,
    )  # fmt: skip
    return bare | told


def at(place: str, said: list) -> list:
    return [(place + below, verb, what) for below, verb, what in said]


def elements(made: list) -> tuple[list, list]:
    values = [value for value, _ in made]
    return values, [s for _, said in made for s in at(f"l[{said[0][2]}]", [("", "has", said[0][2]), *said[1:]])]


element = part("EFG", "w")
several = st.lists(element, max_size=2, unique_by=lambda made: made[1][0][2])
outer = st.builds(
    lambda c, x, s: (
        "m", {"class_path": c, "init_args": {"x": x, "s": s[0]}}, [("", "class", c), ("x", "value", x), *at("s", s[1])]
    ),
    st.sampled_from("AB"), numbers, part("PQ", "v"),
)  # fmt: skip
gentle = st.one_of(
    numbers.map(lambda n: ("m.x", n, [("x", "value", n)])),
    st.sampled_from(["a", None, [1, 2]]).map(lambda v: ("m", {"x": v}, [("x", "value", v)])),
    numbers.map(lambda n: ("m.s.v", n, [("s.v", "value", n)])),
    several.map(lambda made: ("m.l+", *elements(made))),
    element.map(lambda made: ("m", {"+l": made[0]}, elements([made])[1])),
    st.builds(lambda c, n: (f"m.l[{c}].w", n, [(f"l[{c}].w", "value", n)]), st.sampled_from("EFG"), numbers),
)
keys = st.one_of(
    gentle,
    part("PQ", "v").map(lambda p: ("m.s", p[0], at("s", p[1]))),
    part("PQ", "v").map(lambda p: ("m", {"init_args": {"s": p[0]}}, at("s", p[1]))),
    several.map(lambda made: ("m.l", *elements(made))),
    st.sampled_from("EFG").map(lambda c: ("m.l-", c, [(f"l[{c}]", "lacks", c)])),
    st.sampled_from("AB").map(lambda c: ("m", c, [("", "class", c)])),
    outer,
)


def layers_of(keys: st.SearchStrategy) -> st.SearchStrategy:
    """Up to four layers of one or two keys: (whether it is a flag, keys)."""
    return st.lists(st.tuples(st.booleans(), st.lists(keys, min_size=1, max_size=2)), min_size=1, max_size=4)


def stands(tree: dict, place: str, verb: str, what: object) -> bool:
    """Whether the final tree says so; written without the house's help."""
    node = tree.get("m", {})
    for step in filter(None, place.replace("[", ".[").split(".")):
        if step.startswith("["):
            found = [n for n in node if step[1] == (n if isinstance(n, str) else n["class_path"])]
            if verb in ("has", "lacks") and place.endswith(step):
                return bool(found) == (verb == "has")
            if not found:
                return False
            if verb == "value":
                values = [n.get("init_args", {}).get("w") for n in found if isinstance(n, dict)]
                return what in values
        else:
            values = node if isinstance(node, dict) else {}
            values = values.get("init_args", {}) if "class_path" in values else values
            if step not in values:
                return False
            node = values[step]
    if verb == "class":
        return what == (node.get("class_path") if isinstance(node, dict) else node)
    return node == what


def said_anew(place: str, verb: str, mine: list, later: list) -> bool:
    """Whether a later key speaks of the place in so many words, and may; or a flag replaces what this layer named."""
    for is_flag, key, said in later:
        places = {p for p, _, _ in said}
        if place in places and (is_flag or verb == "value"):
            return True
        replaced = places | ({"l"} if key == "m.l" else set())
        named = {p for p, v, _ in mine if v in ("class", "has")}
        above = {p for p in named if place.startswith(p)} | ({"l"} if place.startswith("l[") else set())
        if is_flag and replaced & above:
            return True
    return False


def undone(layers: list, tree: dict) -> list:
    """What files said that is neither so in the end nor said anew, and what should have been an error."""
    flat = [(i, is_flag, key, said) for i, (is_flag, ks) in enumerate(layers) for key, _, said in ks]
    wrong = []
    for n, (i, is_flag, _, said) in enumerate(flat):
        mine = [s for j, _, _, ss in flat if j == i for s in ss]
        later = [(f, k, s) for _, f, k, s in flat[n + 1 :]]
        back = {p for j, _, _, ss in flat[n + 1 :] if j == i for p, v, _ in ss if v == "has"}
        wrong += [
            (place, verb, what)
            for place, verb, what in said
            if not is_flag
            and not stands(tree, place, verb, what)
            and not said_anew(place, verb, mine, later)
            and not (verb == "lacks" and place in back)  # a file may take out an E and put in another
        ]
    return wrong


FIRST = {
    "class_path": "A",
    "init_args": {
        "x": 0, "s": {"class_path": "P", "init_args": {"v": 0}}, "l": ["E", {"class_path": "F", "init_args": {"w": 0}}],
    },
}  # fmt: skip


def built(layers: list) -> dict:
    tree, watch = {"m": FIRST}, Watch()
    for i, (is_flag, ks) in enumerate(layers):
        for key, value, _ in ks:
            before = dict(tree)
            put(tree, key, value)
            watch.see(key, value, before, tree, f"--{key}" if is_flag else f"{i}.yaml")
    return tree


@settings(max_examples=400, deadline=None)
@given(layers_of(keys))
def test_every_overlay_is_so_in_the_end_or_said_anew(layers: list) -> None:
    try:
        tree = built(layers)
    except ConfigError as error:
        event("undone" if "fix: leave one" in str(error) else "cannot be followed")
        return
    event("merged")
    assert undone(layers, tree) == []


def test_without_the_watch_settings_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property can fail."""
    layers = [(False, [("m.l+", "G", [("l[G]", "has", "G")])]), (False, [("m", "B", [("", "class", "B")])])]
    with pytest.raises(ConfigError, match=r"names another m, which drops m.l\[G\]"):
        built(layers)
    monkeypatch.setattr(Watch, "see", lambda *_, **__: None)
    assert undone(layers, built(layers)) == [("l[G]", "has", "G")]


@settings(max_examples=100, deadline=None)
@given(layers_of(gentle))
def test_values_and_additions_never_clash(layers: list) -> None:
    try:
        built(layers)
    except ConfigError as error:
        assert "elements match" in str(error)  # two of one class
