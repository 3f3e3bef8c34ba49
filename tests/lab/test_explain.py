"""Every mistake in a configuration: at most three lines, the field's whole path, what would have worked, the file's line."""

import sys
from pathlib import Path

import pytest

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import parts
from blagpt_pl.lab.explain import why
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.mistakes import fitting, mistakes_in
from blagpt_pl.lab.strict_yaml import load_mapping
from blagpt_pl.lab.train import run
from blagpt_pl.nn.base import Norm

BASE = """\
name: t
model:
  class_path: BlaGPT
  init_args:
    vocab_size: 320
    d_model: 16
    n_layers: 1
    norm: RMSNorm
    head: TiedHead
    init: {class_path: GPT2Init, init_args: {zero_outputs: true}}
    block:
      class_path: Block
      init_args:
        norm: RMSNorm
        attention:
          class_path: Attention
          init_args:
            n_heads: 2
            n_kv_heads: 1
            edits: [{class_path: QKNorm, init_args: {norm: RMSNorm}}, RoPE]
            core: SDPA
        mlp: {class_path: GatedMLP, init_args: {activation: SiLU, ratio: 4}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3, betas: [0.9, 0.95]}}
    schedule: {class_path: Trapezoid, init_args: {warmup: 1, warmdown: 1}}
trainer: {max_steps: 2, accelerator: cpu}
data: {source: PythonLibrary, context: 16, batch_size: 4, device_batch_size: 4, val_tokens: 100}
"""
ATTENTION = "model.block.attention"
TECHNIQUES = Path(__file__).parents[2] / "configs/techniques"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


def refused(base: Path, text: str = "", *argv: str, command: str = "fit") -> str:
    """What `blagpt` says of the base with `text` over it; a parser's own exit or any other error fails the test."""
    words = ["--config", str(base)]
    if text:
        (base.parent / "over.yaml").write_text(text)
        words += ["--config", str(base.parent / "over.yaml")]
    with pytest.raises(ConfigError) as error:
        run(command, [*words, *argv])
    said = str(error.value)
    assert error.value.exit_code == 2
    assert 1 <= said.count("\n") + 1 <= 3, said
    assert all(len(line) < 600 for line in said.splitlines()), said
    return said.replace(str(base.parent) + "/", "")


MISTAKES = [
    # an unknown option, at every depth
    ("bogus: 1", "bogus: no such field"),
    ("modle.d_model: 3", "modle: no such field; did you mean model?"),
    ("trainer.max_stepz: 3", "trainer.max_stepz: Trainer has no such option; did you mean max_steps"),
    ("data.contxt: 3", "data.contxt: TokenData has no such option; did you mean context?"),
    ("data.source.val_percnt: 3", "data.source.val_percnt: PythonLibrary has no such option; did you mean val_percent?"),
    ("checkpoint.every_n_step: 3", "checkpoint.every_n_step: Checkpoint has no such option; did you mean every_n_steps?"),
    ("samples.promts: [a]", "samples.promts: Samples has no such option; did you mean prompts?"),
    ("step_time.warmpu: 1", "step_time.warmpu: StepTime has no such option; did you mean warmup?"),
    ("model.d_modle: 3", "model.d_modle: BlaGPT has no such option; did you mean d_model?"),
    ("model.block.attentoin: Attention", "model.block.attentoin: Block has no such option; did you mean attention?"),
    (f"{ATTENTION}.n_haeds: 3", f"{ATTENTION}.n_haeds: Attention has no such option; did you mean n_heads"),
    (f"{ATTENTION}.edits[RoPE].teta: 3", f"{ATTENTION}.edits[RoPE].teta: RoPE has no such option; did you mean theta?"),
    (f"{ATTENTION}.edits[QKNorm].norm.epss: 3", f"{ATTENTION}.edits[QKNorm].norm.epss: RMSNorm has no such option; did you mean eps?"),
    (f"{ATTENTION}.edits: [{{class_path: RoPE, thta: 3}}]", f"{ATTENTION}.edits[RoPE].thta: RoPE has no such option; did you mean"),
    (f"{ATTENTION}.edits+: [RoPE, {{class_path: RoPE, thta: 3}}]", f"{ATTENTION}.edits[3].thta: RoPE has no such option"),
    (f"{ATTENTION}.clas_path: X", f"{ATTENTION}.clas_path: Attention has no such option; options: n_heads, core"),
    ("model: {class_path: BlaGPT, init_arg: {d_model: 3}}", "model.init_arg: BlaGPT has no such option"),
    ("model.block.bogus: {}", "model.block.bogus: Block has no such option"),
    ("model.optimizer.lrr: 3", "model.optimizer.lrr: AdamW has no such option; did you mean lr?"),
    ("model.positions: {x: 1}", "model.positions: {'x': 1} names no class; parts that fit: LearnedPositions"),
    ("trainer.callbacks: [{class_path: LearningRateMonitor, logging_intervall: step}]",
     "trainer.callbacks[LearningRateMonitor].logging_intervall: LearningRateMonitor has no such option; did you mean"),
    ("trainer.strategy: {class_path: DDPStrategy, foo: 1}", "trainer.strategy.foo: DDPStrategy has no such option"),
    # an unknown class, a class that does not fit, a module that cannot be imported
    ("model: BlaGTP", "model: 'BlaGTP' is not a known class; did you mean BlaGPT?"),
    (f"{ATTENTION}: Atention", f"{ATTENTION}: 'Atention' is not a known class; did you mean Attention"),
    (f"{ATTENTION}.edits+: Xyzzy", f"{ATTENTION}.edits[Xyzzy]: 'Xyzzy' is not a known class; parts that fit: "),
    ("data.source: ShardFile", "data.source: 'ShardFile' is not a known class; did you mean ShardFiles?"),
    ("trainer.callbacks: [Xyzzy]", "trainer.callbacks[Xyzzy]: 'Xyzzy' is not a known class"),
    ("model.optimizer: torch.optim.AdamWW", "model.optimizer: 'torch.optim' has no 'AdamWW'; did you mean AdamW"),
    ("model.optimizer: torch.optm.AdamW", "model.optimizer: cannot import 'torch.optm.AdamW' (no module 'torch.optm'"),
    (f"{ATTENTION}: my_ideas.Running", f"{ATTENTION}: cannot import 'my_ideas.Running' (no module 'my_ideas'"),
    (f"{ATTENTION}: stranger_broken.Part", f"{ATTENTION}: cannot import 'stranger_broken.Part' (SyntaxError: "),
    (f"{ATTENTION}: GatedMLP", f"{ATTENTION}: 'GatedMLP' does not fit here; "),
    ("model.block.norm: SiLU", "model.block.norm: 'SiLU' does not fit here; "),
    ("model.block.norm: torch.nn.LayerNorm", "model.block.norm: 'torch.nn.LayerNorm' does not fit here; "),
    ("model.block.norm: math.sqrt", "model.block.norm: 'math.sqrt' does not fit here; "),
    ("model: Attention", "model: 'Attention' does not fit here"),
    (f"{ATTENTION}.edits+: RMSNorm", f"{ATTENTION}.edits[RMSNorm]: 'RMSNorm' does not fit here"),
    (f"{ATTENTION}: {{class_path: 3}}", f"{ATTENTION}: {{'class_path': 3}} names no class; parts that fit: "),
    # a value of another type
    ("model.d_model: wide", "model.d_model: 'wide' (expected a whole number)"),
    ("model.d_model: 1.5", "model.d_model: 1.5 (expected a whole number)"),
    ("model.d_model: true", "model.d_model: true (expected a whole number)"),
    ("trainer.max_steps: 1e3", "trainer.max_steps: 1000.0 (expected a whole number); fix: 1000"),
    ("data.context: big", "data.context: 'big' (expected a whole number)"),
    ("data.context: {a: 1}", "data.context: {'a': 1} (expected a whole number)"),
    (f"{ATTENTION}.edits[RoPE].theta: x", f"{ATTENTION}.edits[RoPE].theta: 'x' (expected a number)"),
    ("model.optimizer.lr: x", "model.optimizer.lr: 'x' (expected a number)"),
    ("model.optimizer.betas: [1, x]", "model.optimizer.betas[1]: 'x' (expected a number)"),
    ("model.optimizer.betas: [1]", "model.optimizer.betas: [1] (expected a list of 2)"),
    ("model.init.zero_outputs: maybe", "model.init.zero_outputs: 'maybe' (expected true or false)"),
    ("trainer.precision: bf17", "trainer.precision: 'bf17' (expected "),
    ("samples.prompts: [1]", "samples.prompts[0]: 1 (expected text); fix: in quotes"),
    ("name: 3", "name: 3 (expected text); fix: in quotes"),
    ("seed_everything: x", "seed_everything: 'x' (expected a whole number)"),
    ("ckpt_path: [1]", "ckpt_path: [1] (expected text or null)"),
    # null where something is needed
    (f"{ATTENTION}: null", f"{ATTENTION}: null is no part; parts that fit: "),
    ("model.block:", "model.block: null is no part"),
    (f"{ATTENTION}.core: null", f"{ATTENTION}.core: null is no part; parts that fit: "),
    ("model.block.mlp.activation: null", "model.block.mlp.activation: null is no part; parts that fit: "),
    (f"{ATTENTION}.edits[QKNorm].norm: null", f"{ATTENTION}.edits[QKNorm].norm: null is no part"),
    (f"{ATTENTION}.edits: [null]", f"{ATTENTION}.edits[0]: null is no part"),
    ("model.optimizer: null", "model.optimizer: null is no part"),
    ("model.init: null", "model.init: null (expected a Init)"),
    ("model.d_model: null", "model.d_model: null (expected a whole number)"),
    ("data.source: null", "data.source: null (expected a Source)"),
    ("model: null", "model: null (expected a LanguageModel)"),
    ("trainer:", "trainer: null (expected options"),
    ("data: null", "data: null (expected options"),
    # a value that is missing
    ("model.block.mlp: MLP", "model.block.mlp.activation: has no value, and MLP needs one"),
    ("model.schedule: Cosine", "model.schedule.warmup: has no value, and Cosine needs one"),
    ("data.source: ShardFiles", "data.source.train: has no value, and ShardFiles needs one"),
    # a list where a part is expected, and the reverse
    (f"{ATTENTION}: [Attention]", f"{ATTENTION}: ['Attention'] is no part; parts that fit: "),
    ("model: [BlaGPT]", "model: ['BlaGPT'] (expected a LanguageModel)"),
    (f"{ATTENTION}.edits: RoPE", f"{ATTENTION}.edits: 'RoPE' (expected a list or null)"),
    (f"{ATTENTION}.edits: {{class_path: RoPE}}", f"{ATTENTION}.edits: {{'class_path': 'RoPE'}} (expected a list or null)"),
    ("trainer: [1]", "trainer: [1] (expected options"),
    ("data: x", "data: 'x' (expected options"),
    (f"{ATTENTION}.edits+: 3", f"{ATTENTION}.edits[2]: 3 is no part"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_broken.py").write_text("class Part(\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("text", "begins"), MISTAKES)
def test_mistake(base: Path, text: str, begins: str) -> None:
    said = refused(base, text)
    assert said.startswith(begins)
    if "expected options" not in said and "bogus" not in text.partition(".")[2]:
        assert "(in over.yaml:1)" in said


def test_two_mistakes_at_once(base: Path) -> None:
    said = refused(base, "model.d_modle: 3\ndata.contxt: 4").splitlines()
    assert said[0].startswith("model.d_modle: ") and said[0].endswith("(in over.yaml:1)")
    assert said[1].startswith("data.contxt: ") and said[1].endswith("(in over.yaml:2)")


def test_many_mistakes_at_once(base: Path) -> None:
    said = refused(base, "\n".join(f"model.bad{i}: 3" for i in range(7))).splitlines()
    assert len(said) == 3
    assert said[2] == "and 5 more"


def test_the_second_of_three_files(base: Path) -> None:
    (base.parent / "second.yaml").write_text(f"# a difference\nname: x\n{ATTENTION}:\n  n_heads: 2\n  n_haeds: 4\n")
    (base.parent / "third.yaml").write_text(f"{ATTENTION}.n_heads: 2\nname: y\n")
    said = refused(
        base, "", "--config", f"{base.parent}/second.yaml", "--config", f"{base.parent}/third.yaml", "--name", "z"
    )
    assert said.startswith(f"{ATTENTION}.n_haeds: ")
    assert said.endswith("(in second.yaml:5)")


def test_a_mistake_in_a_nested_base(base: Path) -> None:
    base.write_text(BASE.replace("core: SDPA", "core: SPDA"))
    assert refused(base, "name: x").endswith("did you mean SDPA? (in base.yaml:21)")


def test_a_mistake_on_the_command_line(base: Path) -> None:
    said = refused(base, f"{ATTENTION}.n_heads: 1", f"--{ATTENTION}.n_heads", "two")
    assert said == f"{ATTENTION}.n_heads: 'two' (expected a whole number) (on the command line)"


@pytest.mark.parametrize(
    ("argv", "begins"),
    [
        ([], "model: no layer names its class; fix: name a complete --config first"),
        (["--trainer.max_steps", "3"], "model: no layer names its class; fix: name a complete --config first"),
        (["--model.block.mlp.ratio", "3"], "model: no layer names its class; fix: name a complete --config first"),
        (["--data.contxt", "3", "--print_config"], "model: no layer names its class; fix: name a complete"),
        (
            ["--config", f"{TECHNIQUES}/z_loss.yaml"],
            "model: no layer names its class; fix: name a complete --config first",
        ),
        (["--model", "BlaGPT"], "model.vocab_size: has no value"),
        (["--model.help", "Xyzzy"], "--model.help: 'Xyzzy' is not a known class"),
        (["--bogus.help"], "--bogus.help: no such help"),
        (["--config", "missing.yaml"], "--config: 'missing.yaml': no such file"),
        (["fit"], "'fit': belongs to no flag"),
    ],
)
def test_without_a_base(argv: list[str], begins: str) -> None:
    with pytest.raises(ConfigError) as error:
        run("fit", argv)
    assert str(error.value).startswith(begins)
    if begins.startswith("model: "):
        assert str(error.value).removeprefix(begins) in ("", " --config first")
        with pytest.raises(ConfigError, match=f"{begins}.*, or --ckpt_path FILE"):
            run("validate", argv)


def test_validate_explains_too(base: Path) -> None:
    assert refused(base, "model.d_modle: 3", command="validate").startswith("model.d_modle: ")


def test_nothing_is_wrong_with_what_is_right(base: Path) -> None:
    parts.import_all()
    assert mistakes_in(load_mapping(BASE, "x")) == []
    trainer = "{precision: bf16-mixed, devices: [0], strategy: ddp, callbacks: [LearningRateMonitor], max_time: '00:01:00:00'}"
    assert mistakes_in(from_arguments(["--config", str(base), "--trainer", trainer]).tree) == []


@pytest.mark.parametrize("config", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_nothing_is_wrong_with_the_configurations_of_the_house(config: Path) -> None:
    parts.import_all()
    assert mistakes_in(from_arguments(["--config", str(config)]).tree) == []


def test_a_stranger_in_the_current_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "stranger_ok.py").write_text(
        "from blagpt_pl.nn.attention.attention import Attention\n"
        "from blagpt_pl.nn.norm import RMSNorm\n"
        "class Mine(Attention):\n"
        "    def __init__(self, where, power: 'float' = 1.0, **kwargs):\n        super().__init__(where, **kwargs)\n"
        "def gain(width: int) -> RMSNorm:\n    return RMSNorm(width)\n"
    )
    argv = ["--config", str(base), f"--{ATTENTION}", "{class_path: stranger_ok.Mine, n_heads: 2, core: SDPA, power: 2}"]
    try:
        assert mistakes_in(from_arguments(argv).tree) == []
        assert mistakes_in(from_arguments([*argv, "--model.norm", "stranger_ok.gain"]).tree) == []
        wrong = mistakes_in(from_arguments([*argv, f"--{ATTENTION}.powr", "3", f"--{ATTENTION}.power", "x"]).tree)
        assert [(m.path, m.text.split(";")[0]) for m in wrong] == [
            (f"{ATTENTION}.power", "'x' (expected a number)"),
            (f"{ATTENTION}.powr", "Mine has no such option"),
        ]
    finally:
        sys.modules.pop("stranger_ok", None)


def test_parts_that_fit() -> None:
    assert {"RMSNorm", "LayerNorm"} <= set(fitting(Norm))
    assert "Norm" not in fitting(Norm)


def test_the_innermost_cause() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        assert isinstance(why(error), KeyError)
