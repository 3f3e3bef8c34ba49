"""blagpt_pl: a laboratory for language-model architectures, on PyTorch Lightning and LightningCLI."""

__version__ = "0.1.0"
