"""The models that `blagpt bench peers` trains: two shapes everybody knows, ours and other people's, each in its own idiom.

llama   RMSNorm, rotary positions, SwiGLU, no biases, tied embeddings, as many key/value heads as query heads
gpt2    LayerNorm, learned positions, tanh-GELU MLP, biases, tied embeddings
Loss    the mean cross-entropy of the same B·T targets, shifted before: Hugging Face takes them as `shift_labels`; litgpt has
        `chunked_cross_entropy` outside of its (compiled) model, as in its pretraining; x-transformers' own wrapper would
        run the model on one token more, so that its loss is written out here, inside of what is compiled
Peers   are optional; one that is not there, or cannot be imported, is a line of the report
"""

import contextlib
import importlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.data.shards import write_shard
from blagpt_pl.data.tokenizers import Tokenizer
from blagpt_pl.lab import parts
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import model_of

Loss = Callable[[Tensor, Tensor], Tensor]
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}  # everybody's


@dataclass(frozen=True)
class Shape:
    """The sizes that all share.

    Attributes:
        d_model, n_layers, n_heads: of the stream, the blocks and each attention.
        gated: F of the gated MLP of the llama shape; the plain one of gpt2 has 4 D.
        vocab_size, context: V and T.
        batch: B.
    """

    d_model: int
    n_layers: int
    n_heads: int
    gated: int
    vocab_size: int
    context: int
    batch: int


SHAPES = {
    "small": Shape(256, 4, 4, 688, 8192, 256, 4),
    "full": Shape(768, 12, 12, 2048, 50304, 1024, 32),
}

# ---------------------------------------------------------------------- ours


def tree_of(style: str, s: Shape, backend: str | None) -> dict:
    """Our configuration of a shape, to which only a source of data and a Trainer's values are missing."""
    llama = style == "llama"
    norm = {"class_path": "RMSNorm" if llama else "LayerNorm"}
    attention: dict[str, Any] = {"n_heads": s.n_heads, "core": "SDPA"}
    if llama:
        attention["edits"] = ["RoPE"]
        mlp = {"class_path": "GatedMLP", "init_args": {"activation": "SiLU", "ratio": s.gated / s.d_model}}
    else:
        attention |= {"qkv_bias": True, "out_bias": True}
        gelu = {"class_path": "GELU", "init_args": {"tanh": True}}
        mlp = {"class_path": "MLP", "init_args": {"activation": gelu, "bias": True}}
    block = {"norm": norm, "attention": {"class_path": "Attention", "init_args": attention}, "mlp": mlp}
    model = {
        "vocab_size": s.vocab_size, "d_model": s.d_model, "n_layers": s.n_layers, "norm": norm, "head": "TiedHead",
        "init": {"class_path": "GPT2Init", "init_args": {"zero_outputs": False}},
        "block": {"class_path": "Block", "init_args": block},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {**ADAMW, "betas": list(ADAMW["betas"])}},
        "schedule": "Constant", "compile": backend, **({} if llama else {"positions": "LearnedPositions"}),
    }  # fmt: skip
    data = {
        "context": s.context,
        "batch_size": s.batch,
        "device_batch_size": s.batch,
        "val_tokens": s.context * s.batch,
    }
    return {"model": {"class_path": "BlaGPT", "init_args": model}, "data": data}


def ours(style: str) -> Callable[[Shape, torch.device, str | None], tuple[nn.Module, Loss]]:
    """Our module, its regions compiled as a run compiles them."""

    def build(s: Shape, device: torch.device, backend: str | None) -> tuple[nn.Module, Loss]:
        model = model_of(Layers(), tree_of(style, s, backend)).to(device)
        model.configure_model()
        return model, lambda tokens, targets: model.objective(tokens, targets)[0]

    return build


class Numbers(Tokenizer):
    """Tokens that stand for nothing.

    Args:
        vocab_size: how many there are.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        return [0] * len(text)

    def decode(self, tokens: list[int]) -> str:
        return ""

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * self.end_of_text + [0], np.int64)


class Clock(L.Callback):
    """The time from the end of the first step to the end of the last, nothing else waited for."""

    def __init__(self) -> None:
        self.steps, self._start, self.ms_per_step = 0, 0.0, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        if self.steps not in (1, trainer.max_steps):
            return
        if pl_module.device.type != "cpu":
            torch.accelerator.synchronize(pl_module.device)
        now = time.perf_counter()
        if self.steps == 1:
            self._start = now
        self.ms_per_step = 1e3 * (now - self._start) / max(1, self.steps - 1)


def through_trainer(s: Shape, device: torch.device, backend: str | None, precision: str, steps: int) -> Clock:
    """`blagpt fit` of the llama shape, with all of its callbacks, on shards of random tokens in a temporary folder.

    Args:
        steps: that are timed; one more comes before them.

    Returns:
        What has been timed.
    """
    from blagpt_pl.lab.train import BlagptCLI

    parts.import_all()
    dice = np.random.default_rng(0)
    tree = tree_of("llama", s, backend)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Any] = {}
        for name, n_steps in (("train", steps + 1), ("val", 1)):
            path = Path(folder) / f"{name}.bin"
            write_shard(path, dice.integers(0, s.vocab_size, n_steps * s.batch * s.context + 1), s.vocab_size)
            files[name] = [str(path)]
        files["tokenizer"] = {"class_path": f"{__name__}.Numbers", "init_args": {"vocab_size": s.vocab_size}}
        tree["data"]["source"] = {"class_path": "ShardFiles", "init_args": files}
        where = {"accelerator": device.type, "devices": [device.index or 0] if device.type == "cuda" else 1}
        end = {"max_steps": steps + 1, "val_check_interval": steps + 1}
        callbacks = [{"class_path": f"{__name__}.Clock"}]
        tree |= {"trainer": {**where, **end, "precision": precision, "callbacks": callbacks}, "logs": folder}
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli = BlagptCLI("fit", tree)
        return next(c for c in cli.trainer.callbacks if isinstance(c, Clock))


# ---------------------------------------------------------------------- other people's


class WithLoss(nn.Module):
    """A model that gives logits, and the loss of them, as one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1).float(), targets.flatten())


def compiled(module: nn.Module, backend: str | None) -> Callable:
    """The module, compiled as a whole if at all."""
    return module if backend is None else torch.compile(module, backend=backend)


def of_transformers(model: nn.Module, device: torch.device, backend: str | None) -> tuple[nn.Module, Loss]:
    """A causal language model of Hugging Face, which makes its loss itself."""
    model = model.to(device).train()
    call = compiled(model, backend)
    return model, lambda tokens, targets: call(input_ids=tokens, labels=targets, shift_labels=targets).loss


def hf_llama(s: Shape, device: torch.device, backend: str | None) -> tuple[nn.Module, Loss]:
    """Hugging Face's Llama on SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()  # it warns of token ids beyond a small vocabulary
    config = LlamaConfig(
        vocab_size=s.vocab_size, hidden_size=s.d_model, intermediate_size=s.gated, num_hidden_layers=s.n_layers,
        num_attention_heads=s.n_heads, num_key_value_heads=s.n_heads, max_position_embeddings=s.context,
        tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return of_transformers(LlamaForCausalLM(config), device, backend)


def hf_gpt2(s: Shape, device: torch.device, backend: str | None) -> tuple[nn.Module, Loss]:
    """Hugging Face's GPT-2 on SDPA, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=s.vocab_size, n_positions=s.context, n_embd=s.d_model, n_layer=s.n_layers, n_head=s.n_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return of_transformers(GPT2LMHeadModel(config), device, backend)


def litgpt(chunk: int) -> Callable[[Shape, torch.device, str | None], tuple[nn.Module, Loss]]:
    """litgpt's GPT, tied; `chunk` is that of its cross-entropy, 0 for none."""

    def build(s: Shape, device: torch.device, backend: str | None) -> tuple[nn.Module, Loss]:
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy

        config = Config(
            block_size=s.context, padded_vocab_size=s.vocab_size, vocab_size=s.vocab_size, n_layer=s.n_layers,
            n_head=s.n_heads, n_embd=s.d_model, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=s.gated,
        )  # fmt: skip
        model = GPT(config).to(device).train()
        model.transformer.wte.weight = model.lm_head.weight
        call = compiled(model, backend)
        return model, lambda tokens, targets: chunked_cross_entropy(call(tokens), targets, chunk_size=chunk)

    return build


def x_transformers(s: Shape, device: torch.device, backend: str | None) -> tuple[nn.Module, Loss]:
    """x-transformers' decoder with the llama parts, on SDPA."""
    from x_transformers import Decoder, TransformerWrapper

    head = s.d_model // s.n_heads
    layers = Decoder(
        dim=s.d_model, depth=s.n_layers, heads=s.n_heads, attn_dim_head=head, attn_flash=True, use_rmsnorm=True,
        rotary_pos_emb=True, rotary_emb_dim=head, ff_mult=s.gated / s.d_model, ff_glu=True, ff_swish=True, ff_no_bias=True,
    )  # fmt: skip
    net = TransformerWrapper(
        num_tokens=s.vocab_size, max_seq_len=s.context, attn_layers=layers, use_abs_pos_emb=False, tie_embedding=True
    )
    model = WithLoss(net).to(device).train()
    return model, compiled(model, backend)


@dataclass(frozen=True)
class Peer:
    """A model of one of the shapes.

    Attributes:
        name: in the table.
        style: the shape, `llama` or `gpt2`.
        build: shape, device and backend (None: eager) -> the module, and its loss of tokens and targets.
        package: what it needs besides us.
        install: how to get that.
    """

    name: str
    style: str
    build: Callable[[Shape, torch.device, str | None], tuple[nn.Module, Loss]]
    package: str | None = None
    install: str = "pip install 'blagpt-pl[bench]'"

    def missing(self) -> str | None:
        """Why it cannot be built, or None."""
        if self.package is None:
            return None
        if importlib.util.find_spec(self.package) is None:
            return f"{self.name}: not installed; fix: {self.install}"
        try:
            importlib.import_module(self.package)
        except Exception as error:  # noqa: BLE001  whatever a package of other people stumbles over
            return f"{self.name}: cannot be imported ({type(error).__name__}: {error}); fix: {self.install}"
        return None


ALONE = "pip install 'blagpt-pl[bench]'; pip install --no-deps litgpt==0.5.13 (it asks for an older jsonargparse)"
OURS = "blagpt, plain loop"
PEERS = (
    Peer(OURS, "llama", ours("llama")),
    Peer("Hugging Face Llama", "llama", hf_llama, "transformers"),
    Peer("litgpt, loss in chunks", "llama", litgpt(128), "litgpt", ALONE),
    Peer("litgpt, plain loss", "llama", litgpt(0), "litgpt", ALONE),
    Peer("x-transformers", "llama", x_transformers, "x_transformers"),
    Peer(OURS, "gpt2", ours("gpt2")),
    Peer("Hugging Face GPT-2", "gpt2", hf_gpt2, "transformers"),
)
