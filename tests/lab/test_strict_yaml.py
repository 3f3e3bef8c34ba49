"""YAML is read strictly: what could be a mistake is an error with file, line and column."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.strict_yaml import compose_text, load_mapping, load_text

names = st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda s: s not in ("e", "_"))
scalars = st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(allow_nan=False), names)
values = st.recursive(
    scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(names, below, max_size=3), max_leaves=8
)


@settings(max_examples=80, deadline=None)
@given(values)
def test_reads_what_pyyaml_writes(value: object) -> None:
    assert load_text(yaml.safe_dump(value), "x") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1e3", 1e3), ("1.0E+3", 1e3), ("-.5", -0.5), (".inf", float("inf")), ("5_000", 5000), ("1_0.5", 10.5),
        ("0x10", 16), ("010", 8), ("-3", -3), ("1.", 1.0), ("no", False), ("off", False), ("yes", True), ("on", True),
        ("'no'", "no"), ("y", "y"), ("~", None), ("", None), ("null", None), ("2020-01-01", "2020-01-01"),
        ("10:30:00", "10:30:00"), ("1:30.5", "1:30.5"), ("=", "="), ("1e", "1e"), ("e3", "e3"), ("1.2.3", "1.2.3"), ("!!str 3", "3"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    got = load_text(text, "x")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is written twice (first on line 1)"),
        ("a:\n  b: {c: 1, c: 2}", 2, "'c' is written twice"),
        ("a: 1\n'a': 2", 2, "written twice"),
        ("x: {a: 1}\ny:\n  <<: {b: 1}\n  <<: {c: 1}", 4, "written twice"),
        ("a: &x [1, *x]", 1, "*x stands inside itself"),
        ("a: &x\n  b:\n    c: *x", 3, "*x stands inside itself"),
        ("a: *nowhere", 1, "undefined alias"),
        ("a: 1\n? [b]\n: 2", 2, "a key is a list"),
        ("a: !!python/object/apply:os.system [true]", 1, "python/object"),
        ("a: !!binary aGk=", 1, "binary"),
        ("a: !!set {b}", 1, "set"),
        ("a: !!timestamp 2020-01-01", 1, "timestamp"),
        ("a: !mine 3", 1, "!mine"),
        ("a: [1, 2", 1, "expected"),
        ("a: b: c", 1, "not allowed"),
        ("a:\n\tb: 1", 2, "cannot start any token"),
        ("a: 1\n---\nb: 2", 2, "another document"),
    ],
)
def test_refused_with_its_line(text: str, line: int, word: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(text, "my.yaml")
    assert word in str(error.value)
    assert str(error.value).startswith(f"my.yaml:{line}:")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: \x00", "[" * 3000, "!!int x", "!!float x"])
def test_never_a_traceback(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^my\.yaml"):
        load_text(text, "my.yaml")


def test_anchors_and_merge_keys() -> None:
    text = "base: &b {x: 1, y: 2}\nsecond: &s\n  <<: *b\n  y: 3\nthird: {<<: [*s, {z: 9}], x: 5}\nlist: [*b, *b]"
    assert load_text(text, "x") == {
        "base": {"x": 1, "y": 2}, "second": {"x": 1, "y": 3}, "third": {"x": 5, "y": 3, "z": 9}, "list": [{"x": 1, "y": 2}] * 2,
    }  # fmt: skip


def test_merging_a_mapping_that_merges_another_is_no_repeated_key() -> None:
    text = "a: &a {k: 1}\nd: {deep: {deep: &b {<<: *a, k: 2}}}\nc: {<<: *b, k: 3}"
    assert load_text(text, "x") == {"a": {"k": 1}, "d": {"deep": {"deep": {"k": 2}}}, "c": {"k": 3}}


def test_nodes_know_their_lines() -> None:
    node = compose_text("a: 1\nb:\n  c: 2", "x")
    assert [key.start_mark.line for key, _ in node.value] == [0, 1]
    assert compose_text("# nothing\n", "x") is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\ufeff"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    assert load_mapping(text, "x") == {}


@pytest.mark.parametrize(("text", "kind"), [("- 1", "list"), ("3", "int"), ("word", "str")])
def test_other_than_a_mapping_is_refused(text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^x: holds a {kind}"):
        load_mapping(text, "x")
