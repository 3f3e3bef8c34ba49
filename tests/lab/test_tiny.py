"""Any configuration at a tiny size: it builds, holds the same parts, and shrinks what the classes say and nothing else."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.sizes import class_of, measured, sizes_of
from blagpt_pl.lab.smaller import fewer_heads, fewer_letters, flat, narrower, shorter, shorter_in_steps, stream_width
from blagpt_pl.lab.tiny import tiny, tiny_model, what_shrank
from blagpt_pl.lm import LanguageModel
from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.base import Heads, Site

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = str(CONFIGS / "blagpt.yaml")
BASES = sorted(p.name for p in CONFIGS.glob("*.yaml"))
OVERLAYS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("techniques/*.yaml"))
MODELS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("models/*.yaml"))
SHIPPED = [(base,) for base in BASES] + [("blagpt.yaml", o) for o in OVERLAYS] + [(b, m) for b in BASES for m in MODELS]
ATTENTION = "--model.block.attention"


def layers(*names: str) -> Layers:
    """The layers of shipped files."""
    return layers_for([word for name in names for word in ("--config", str(CONFIGS / name))])


def said(*flags: str) -> Layers:
    """The baseline under some flags."""
    return layers_for(["--config", BASE, *flags])


def classes(model: LanguageModel) -> list[type]:
    """All modules, from the outside in."""
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("names", SHIPPED, ids="+".join)
def test_every_shipped_configuration(names: tuple[str, ...]) -> None:
    given = layers(*names)
    before = copy.deepcopy(given.tree)
    small = tiny(given.tree)
    model = model_of(given, small)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    sizes = measured(small["model"])
    stacks, words = sizes.get("layers", {}), sizes.get("pattern", {})
    assert max([*flat(stacks), *(word.count(letter) for word in words.values() for letter in word)]) == 2
    assert (model.vocab_size, model.context) == (97, 48)
    depths = stacks | words
    assert 32 <= small["model"]["init_args"]["d_model"] <= 64
    assert small["model"]["init_args"].get("compile") is None
    assert tiny(small) == small
    assert given.tree == before

    if names[0] != "blagpt.yaml" and len(names) > 1:  # parsing takes time
        return
    full = copy.deepcopy(given.tree)
    full["model"]["init_args"] |= depths
    with torch.device("meta"):
        assert classes(model_of(given, full)) == classes(model)


def test_what_shrank() -> None:
    tree = layers("blagpt.yaml").tree
    assert what_shrank(tree, tiny(tree)) == "d_model 768→48, n_layers 12→2, vocab_size 50304→97, context 1024→48"
    tree = layers("blagpt.yaml", "techniques/dilated.yaml", "techniques/pattention_mlp.yaml").tree
    more = what_shrank(tree, tiny(tree)).partition("context 1024→48, ")[2]
    assert more == "segments [64, 128, 256, 512, 1024]→[3, 6, 12, 24, 48], n_tokens 4608→288"
    assert what_shrank(tiny(tree), tiny(tree)) == ""


@pytest.mark.parametrize(
    ("flags", "widths"),
    [
        ({"d_model": 770, "n_heads": 7, "n_kv_heads": 1}, (42, 7, 1, 6)),
        ({"d_model": 1280, "n_heads": 20, "n_kv_heads": 5}, (48, 4, 1, 12)),
        ({"d_model": 1280, "n_heads": 20, "n_kv_heads": "null"}, (40, 10, 10, 4)),
        ({"d_model": 1600, "n_heads": 25, "n_kv_heads": "null"}, (40, 5, 5, 8)),
        ({"d_model": 1536, "n_heads": 24, "n_kv_heads": 1}, (96, 24, 1, 4)),
        ({"d_model": 768, "n_heads": 12, "head_dim": 128}, (48, 12, 4, 8)),
        ({"d_model": 768, "n_heads": 12, "head_dim": 64}, (48, 12, 4, 4)),
        ({"d_model": 16, "n_heads": 4}, (16, 4, 4, 4)),
        ({"d_model": 40, "n_heads": 20, "n_kv_heads": 5}, (40, 4, 1, 10)),
        ({"d_model": 56, "n_heads": 7, "n_kv_heads": "null", "head_dim": 8}, (42, 7, 7, 6)),
    ],
)
def test_heads(flags: dict, widths: tuple[int, ...]) -> None:
    words = [f"--model.d_model={flags.pop('d_model')}"]
    given = said(*words, *(f"{ATTENTION}.{name}={value}" for name, value in flags.items()))
    model = model_of(given, tiny(given.tree))
    heads = model.blocks[0].attention.part.heads
    assert (model.embedding.embedding_dim, heads.n, heads.n_kv, heads.dim) == widths


def test_latent_heads_keep_their_proportions() -> None:
    wide = ["--model.block.attention.nope_dim=128", "--model.block.attention.rope_dim=64", f"{ATTENTION}.v_dim=128"]
    given = layers_for(
        ["--config", BASE, "--config", str(CONFIGS / "techniques/mla.yaml"), *wide, f"{ATTENTION}.q_rank=512"]
    )
    assert measured(tiny(given.tree)["model"]["init_args"]["block"]["init_args"]["attention"]) == {
        "heads": {"n_heads": 12},
        "width": {"kv_rank": 12, "q_rank": 32},
        "head": {"nope_dim": 8, "rope_dim": 4, "v_dim": 8},
    }


@pytest.mark.parametrize("context", [1, 17, 48, 50])
def test_a_short_context_stays(context: int) -> None:
    given = said(f"--data.context={context}", "--model.n_layers=1", "--model.vocab_size=50")
    model = model_of(given, tiny(given.tree))
    assert (model.context, len(model.blocks), model.vocab_size) == (min(context, 48), 1, 50)


def test_what_is_wrong_at_full_size_is_told_as_it_is() -> None:
    with pytest.raises(ConfigError) as error:
        tiny_model(said("--model.d_model=770"))
    assert (
        str(error.value)
        == "layer 0: d_model=770 does not split into n_heads=12; nearby counts that do: [5, 7, 10, 11, 14]"
    )


def test_a_part_of_the_house_that_refuses_to_be_tiny() -> None:
    with pytest.raises(ConfigError) as error:
        tiny_model(said("--model.losses+={class_path: MultiToken, n: 60}"))
    assert str(error.value).startswith("MultiToken.n: 60 (expected 1 to 48, the context)")
    assert str(error.value).endswith(
        "; MultiToken refuses the tiny size (d_model 768→48, n_layers 12→2, "
        "vocab_size 50304→97, context 1024→48); fix: --full-size"
    )


# ---------------------------------------------------------------------- a stranger's parts

STRANGER = '''
from torch import nn
from blagpt_pl.nn.base import ChannelMixer, OutputLinear, Site
from blagpt_pl.nn.attention.attention import Attention

class Fixed(ChannelMixer):
    def __init__(self, site: Site, inner: int = 768, window: int = 256):
        super().__init__()
        if inner != site.d_model or window > site.context:
            raise ValueError(f"inner={inner} and window={window} fit no d_model={site.d_model}")
        self.inner, self.window, self.out = inner, window, OutputLinear(inner, site.d_model)

    def forward(self, x, carry):
        return self.out(x)

class Sized(Fixed):
    sizes = {"inner": "width", "window": "tokens"}

class Wider(Sized):
    """Has the sizes of the class above, through keywords too."""
    def __init__(self, site: Site, extra: int = 5, **kwargs):
        super().__init__(site, **kwargs)
        self.extra = extra

class Free(ChannelMixer):
    def __init__(self, site: Site, width: int = 100, taps: list[int] = None):
        super().__init__()
        self.width, self.out = width, OutputLinear(site.d_model, site.d_model)

    def forward(self, x, carry):
        return self.out(x)

class Misspelt(Free):
    sizes = {"width": "wdith"}

class Misnamed(Free):
    sizes = {"widht": "width"}

class Reader(Attention):
    def __init__(self, site: Site, strength: int = 300, **kwargs):
        super().__init__(site, **kwargs)
        self.strength = strength
'''


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tiny_ideas.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("tiny_ideas", None)


@pytest.mark.parametrize(
    ("word", "kept"),
    [("mmfmmfamfmmf", "mmffa"), ("mmmgmmgmg", "mmgg"), ("glllgllg", "gllg"), ("ab", "ab"), ("aaaa", "aa")],
)
def test_a_pattern_keeps_two_of_each_kind_in_order(word: str, kept: str) -> None:
    assert fewer_letters(word) == kept
    assert fewer_letters(kept) == kept


@pytest.mark.usefixtures("stranger")
def test_a_stranger_without_sizes() -> None:
    part = tiny_model(said("--model.block.mlp=tiny_ideas.Free", "--model.block.mlp.width=99")).blocks[0].mlp.part
    assert part.width == 99
    reader = said(
        f"{ATTENTION}={{class_path: tiny_ideas.Reader, n_heads: 20, core: SDPA, strength: 301}}", "--model.d_model=1280"
    )
    part = tiny_model(reader).blocks[0].attention.part  # a stranger's, with what it has of Attention
    assert (part.strength, part.heads.n, part.heads.dim) == (301, 10, 4)
    with pytest.raises(ConfigError) as error:
        tiny_model(said("--model.block.mlp=tiny_ideas.Fixed"))
    assert str(error.value) == (
        "inner=768 and window=256 fit no d_model=48; Fixed refuses the tiny size (d_model 768→48, n_layers 12→2, "
        "vocab_size 50304→97, context 1024→48); fix: --full-size, or `sizes` on tiny_ideas.Fixed"
    )


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize("name", ["Sized", "Wider"])
@pytest.mark.parametrize("is_said", [False, True])
def test_a_stranger_with_sizes(name: str, is_said: bool) -> None:
    flags = [f"--model.block.mlp=tiny_ideas.{name}", *(["--model.block.mlp.inner=768"] if is_said else [])]
    given = said(*flags)
    part = model_of(given, tiny(given.tree)).blocks[0].mlp.part
    assert class_of(name) is type(part)  # by its bare name, too, once it is loaded
    assert (type(part).__name__, part.inner, part.window) == (name, 48, 12)
    assert what_shrank(given.tree, tiny(given.tree)).endswith("context 1024→48, inner 768→48, window 256→12")


@pytest.mark.usefixtures("stranger")
def test_sizes_that_mean_nothing() -> None:
    with pytest.raises(
        ConfigError, match=r"Misspelt.sizes: width: 'wdith' \(expected one of width, head, heads, tokens, "
    ):
        tiny(said("--model.block.mlp=tiny_ideas.Misspelt").tree)
    with pytest.raises(ConfigError, match=r"Misnamed.sizes: 'widht' is no argument of it \(it has site, width, taps\)"):
        tiny(said("--model.block.mlp=tiny_ideas.Misnamed").tree)


# ---------------------------------------------------------------------- rules


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 96), st.booleans())
def test_heads_go_into_the_stream(groups: int, each_of: int, dim: int, grouped: bool) -> None:
    n_heads, d_model = groups * each_of, groups * each_of * dim
    heads = fewer_heads({"n_heads": n_heads, **({"n_kv_heads": groups} if grouped else {})})
    width = stream_width(d_model, list(heads.values()))
    assert width <= d_model
    attention = Attention(Site(width, 2, 0, 97, 48), core=lambda heads: torch.nn.Identity(), **heads).heads
    if grouped:
        assert attention.n * groups == n_heads * attention.n_kv  # as many queries share a key
    else:
        assert attention.n <= 16
    if width < d_model:
        assert attention.dim >= 4 and attention.dim % 2 == 0
        assert width <= 64 or attention.n > 4


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_widths(width: int, d_model: int) -> None:
    now = stream_width(d_model, [])
    small = narrower(width, (d_model, now))
    assert 1 <= small <= width
    if now < d_model:
        assert small % 2 == 0 or small == width == 1
        assert abs(small - width * now / d_model) <= 2 or small == 8 * now


@given(st.integers(49, 1 << 17), st.integers(1, 1 << 17))
def test_lengths(context: int, length: int) -> None:
    small = shorter(length, context)
    assert 1 <= small <= length
    assert (small == 48) == (length >= context)


@st.composite
def branches(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Branches as LongNet has them: each longer and sparser than the one before it; and a context of more than 48."""
    lengths, steps = [draw(st.integers(1, 2048))], [1]
    for _ in range(draw(st.integers(0, 5))):
        steps.append(steps[-1] * draw(st.sampled_from([1, 2, 2, 3, 4])))
        lengths.append(lengths[-1] // steps[-1] * steps[-1] * draw(st.sampled_from([2, 3, 4])) or 2 * steps[-1])
    return lengths, steps, draw(st.integers(49, 1 << 16))


@given(branches(), st.sampled_from([1, 4, 12]))
def test_branches(given: tuple[list[int], list[int], int], n_heads: int) -> None:
    lengths, steps, context = given

    def core(context: int, segments: list[int], dilations: list[int]) -> Dilated:
        return Dilated(Heads(Site(48, 2, 0, 97, context), n_heads, n_heads, 4), segments, dilations)

    try:
        core(context, lengths, steps)
    except ValueError:  # two branches that reach through, of one dilation
        return
    small = shorter_in_steps({"segments": lengths}, {"dilations": steps}, context)
    if not small:  # more of them than a context of 48 has room for
        assert len(lengths) > 3
        return
    core(48, **small)
    assert [n >= 48 for n in small["segments"]] == [n >= context for n in lengths]
    assert [n == 1 for n in small["dilations"]] == [n == 1 for n in steps]
    assert all(1 <= now <= was for now, was in zip(small["segments"], lengths, strict=True))


def test_dilations_that_do_not_fit() -> None:
    segments, dilations = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]  # LongNet's own
    fitted = shorter_in_steps({"w": segments}, {"r": dilations}, 32768)
    assert fitted == {"w": [3, 6, 12, 24, 48], "r": dilations}
    fitted = shorter_in_steps({"w": [64, 256, 1024]}, {"r": [1, 16, 256]}, 1024)
    assert fitted == {"w": [3, 12, 48], "r": [1, 2, 24]}
    assert shorter_in_steps({"w": [64, 256]}, {"r": [1]}, 1024) == {}


def test_every_class_of_the_house_says_sizes_that_it_has() -> None:
    from blagpt_pl.lab.parts import known_classes

    assert {cls.__name__ for cls in known_classes() if sizes_of(cls)} >= {"BlaGPT", "Attention", "Dilated"}
