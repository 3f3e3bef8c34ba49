"""A few continuations at each validation, as text in TensorBoard: the same prompts and the same dice every time."""

import lightning as L
import torch

from blagpt_pl.errors import DataError


class Samples(L.Callback):
    """Logs the text `samples` at each validation of a fit.

    Args:
        prompts: beginnings to continue; an empty one begins a document.
        max_new_tokens: tokens to add to each; 0 turns samples off.
        temperature: 0 for the likeliest token; larger is wilder.
        top_k: keep this many of the likeliest tokens.
    """

    def __init__(
        self,
        prompts: tuple[str, ...] = ("", "The "),
        max_new_tokens: int = 48,
        temperature: float = 0.8,
        top_k: int | None = 50,
    ) -> None:
        self.prompts = tuple(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        if trainer.state.fn != "fit" or trainer.sanity_checking or tokenizer is None or not self.max_new_tokens:
            return
        try:
            starts = [tokenizer.encode(prompt) or [tokenizer.end_of_text] for prompt in self.prompts]
        except DataError:  # the tokenizer's files are not here, as the data module has said
            return
        texts = []
        for start in starts:
            dice = torch.Generator(pl_module.device).manual_seed(0)
            tokens = torch.tensor([start], device=pl_module.device)
            out = pl_module.generate(tokens, self.max_new_tokens, self.temperature, self.top_k, generator=dice)
            texts.append(tokenizer.decode(out[0].tolist()))
        if trainer.is_global_zero:
            page = "\n\n---\n\n".join("    " + text.replace("\n", "\n    ") for text in texts)  # a code block each
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_text"):
                    logger.experiment.add_text("samples", page, trainer.global_step)
