"""A configuration without its donor's file, and a grown one at a tiny size."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.parts import import_all
from blagpt_pl.lab.tiny import apart, tiny, what_shrank
from blagpt_pl.lab.without_donor import without_donor
from blagpt_pl.nn.pattention import Pattention

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FRESH = {"class_path": "GPT2Init", "init_args": {"zero_outputs": True}}
FROM = {"class_path": "FromCheckpoint", "init_args": {"path": "x.ckpt", "otherwise": FRESH}}


def test_otherwise_stands_in_its_place_and_all_else_stays() -> None:
    import_all()
    full = {**FROM, "class_path": "blagpt_pl.nn.init_from.FromCheckpoint"}
    for init in (FROM, full):
        tree = {"class_path": "BlaGPT", "init_args": {"d_model": 8, "init": init, "losses": [{"init": init}, "ZLoss"]}}
        kept = without_donor(tree)
        assert kept == {
            "class_path": "BlaGPT",
            "init_args": {"d_model": 8, "init": FRESH, "losses": [{"init": FRESH}, "ZLoss"]},
        }
        assert tree["init_args"]["init"] == init  # the one that is given stays as it is
        assert without_donor(kept) == kept
    assert without_donor("BlaGPT") == "BlaGPT" and without_donor(None) is None
    incomplete = {"class_path": "FromCheckpoint", "init_args": {"path": "x.ckpt"}}
    assert without_donor(incomplete) == incomplete  # the parser has a word to say on that


def test_a_parsed_configuration_stays_one() -> None:
    import_all()
    fresh = Namespace(class_path="blagpt_pl.nn.init.GPT2Init", init_args=Namespace(zero_outputs=True, std=0.02))
    init = Namespace(class_path="blagpt_pl.nn.init_from.FromCheckpoint", init_args=Namespace(path="x", otherwise=fresh))
    tree = Namespace(class_path="blagpt_pl.models.blagpt.BlaGPT", init_args=Namespace(init=init, betas=(0.9, 0.95)))
    kept = without_donor(tree)
    assert isinstance(kept, Namespace) and kept.init_args.init == fresh and kept.init_args.betas == (0.9, 0.95)
    assert tree.init_args.init == init


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"n": 8192, "m": 4096}, {"n": 384, "m": 384}, {"n": 384, "m": 192}),
        ({"m": 4096, "n": 8192}, {"m": 384, "n": 384}, {"m": 192, "n": 384}),
        ({"n": 11, "m": 10}, {"n": 2, "m": 2}, {"n": 2, "m": 1}),
        ({"n": 9000, "m": 8999, "k": 8998}, {"n": 384, "m": 384, "k": 384}, {"n": 384, "m": 382, "k": 380}),
        ({"n": 8192, "m": 1024}, {"n": 384, "m": 64}, {"n": 384, "m": 64}),
        ({"n": 512, "m": 512}, {"n": 32, "m": 32}, {"n": 32, "m": 32}),
        ({"n": 770, "d": 768}, {"n": 48, "d": 48}, {"n": 48, "d": 48}),
        ({"n": [5000, 9000]}, {"n": [384, 384]}, {"n": [212, 384]}),
    ],
)
def test_widths_that_differed_still_do(before: dict, after: dict, expected: dict) -> None:
    assert apart(before, after, 768) == expected


def test_a_grown_model_is_tiny_and_grown_still() -> None:
    words = ["--config", str(CONFIGS / "blagpt.yaml"), "--config", str(CONFIGS / "models/tokenformer.yaml")]
    for part in ("attention", "mlp"):
        words += [f"--model.block.{part}.n_tokens=8192", f"--model.block.{part}.grown_from=4096"]
    given = layers_for(words)
    given.tree["model"]["init_args"]["init"] = FROM
    small = tiny(given.tree)
    assert what_shrank(given.tree, small).endswith("n_tokens 8192→384, grown_from 4096→192")
    maps = [module for module in model_of(given, small).modules() if isinstance(module, Pattention)]
    assert {(len(one.keys), one.counted.item()) for one in maps} == {(384, 192)}
    assert tiny(small) == small
