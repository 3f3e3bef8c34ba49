"""The recurrent mixers in the baseline's block, by a flag of the command: `--model.block.attention Mamba2`."""

import pytest
import torch
from overlaid import LENGTHS, check_no_future, parsed, train
from shipped import BASELINE

from blagpt_pl.lab.model_of import layers_for
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.nn.recurrent.conv import GatedShortConv
from blagpt_pl.nn.recurrent.mamba1 import Mamba1
from blagpt_pl.nn.recurrent.mamba2 import Mamba2
from blagpt_pl.nn.recurrent.rwkv7 import RWKV7TimeMix
from blagpt_pl.nn.recurrent.rwkv7_channel import RWKV7ChannelMix

MIXERS = {"attention": (GatedShortConv, Mamba1, Mamba2, RWKV7TimeMix), "mlp": (RWKV7ChannelMix,)}


@pytest.mark.parametrize(("socket", "part"), [(s, part) for s, parts in MIXERS.items() for part in parts])
def test_by_its_name_alone(socket: str, part: type) -> None:
    words = ["--config", str(BASELINE), f"--model.block.{socket}", part.__name__]
    model = parsed(tiny(layers_for(words).tree))
    assert all(isinstance(getattr(block, socket).part, part) for block in model.blocks)
    train(model)
    check_no_future(model, LENGTHS[0], True, part.__name__)
    assert model.can_continue()
    tokens = torch.randint(model.vocab_size, (1, 4))
    assert model.generate(tokens, 3).shape == (1, 7)
