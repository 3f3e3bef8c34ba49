"""How parameters start.

GPT2Init  Radford et al. 2019: every linear map and embedding N(0, std²), biases 0; the maps that write into the stream
          N(0, std² / (2 L)), so that its variance does not grow with the depth of L blocks.
          zero_outputs: what is last in a branch starts at 0 instead, so that every block is the identity at step 0
          (Zhang et al. 2019, arXiv:1901.09321; Yang et al. 2022, arXiv:2203.03466). Last is the map that writes into the
          stream; in a branch that ends in a post-norm, it is the norm's gain, and the map before it starts as without
          zero_outputs: were both zero, neither would have a gradient, and were only the map, one step would undo it
Differs   parameters that are neither a linear map nor an embedding keep the start their own part gave them
"""

from torch import nn

from blagpt_pl.nn.base import Init, Site, WritesStream
from blagpt_pl.nn.block import Branch


class GPT2Init(Init):
    """N(0, std²) for linear maps and embeddings, smaller or zero for those that write into the stream.

    Args:
        zero_outputs: start what is last in every branch at zero: its output map, or the gain of its post-norm.
        std: standard deviation of all others.
    """

    def __init__(self, zero_outputs: bool, std: float = 0.02) -> None:
        self.zero_outputs = zero_outputs
        self.std = std

    def __call__(self, model: nn.Module, site: Site) -> None:
        outputs_std = self.std / (2 * site.n_layers) ** 0.5
        normed = [module for module in model.modules() if isinstance(module, Branch) and module.ends_in_norm]
        behind_a_norm = {module for branch in normed for module in branch.part.modules()}
        for module in model.modules():
            if isinstance(module, WritesStream):
                last = self.zero_outputs and module not in behind_a_norm
                module.start_output(0.0 if last else outputs_std)
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.zero_outputs:
            for branch in normed:
                branch.start_at_zero()
