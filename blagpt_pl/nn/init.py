"""How parameters start.

GPT2Init  Radford et al. 2019: every linear map and embedding N(0, std²), biases 0; the maps that write into the stream
          N(0, std² / (2 L)), so that its variance does not grow with the depth of L blocks.
          zero_outputs: those maps start at 0 instead, so that every block is the identity at step 0
          (Zhang et al. 2019, arXiv:1901.09321; Yang et al. 2022, arXiv:2203.03466).
Differs   parameters that are neither a linear map nor an embedding keep the start their own part gave them
"""

from torch import nn

from blagpt_pl.nn.base import Init, Site, WritesStream


class GPT2Init(Init):
    """N(0, std²) for linear maps and embeddings, smaller or zero for those that write into the stream.

    Args:
        zero_outputs: start every map that writes into the stream at zero.
        std: standard deviation of all others.
    """

    def __init__(self, zero_outputs: bool, std: float = 0.02) -> None:
        self.zero_outputs = zero_outputs
        self.std = std

    def __call__(self, model: nn.Module, site: Site) -> None:
        outputs_std = 0.0 if self.zero_outputs else self.std / (2 * site.n_layers) ** 0.5
        for module in model.modules():
            if isinstance(module, WritesStream):
                module.start_output(outputs_std)
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
