"""A state that another optimizer has saved is refused, since its groups would replace what is asked for."""

import copy
from functools import partial

import pytest
import torch
from quadratic import gradients, parameters
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from blagpt_pl.optim.adamw_independent import AdamWIndependent
from blagpt_pl.optim.ademamix import AdEMAMix
from blagpt_pl.optim.adopt import ADOPT
from blagpt_pl.optim.base import GroupOptimizer
from blagpt_pl.optim.c_adamw import CAdamW
from blagpt_pl.optim.mars import MARS
from blagpt_pl.optim.muon import Muon
from blagpt_pl.optim.soap import SOAP


def after_a_step(kind: type) -> torch.optim.Optimizer:
    params = parameters(shapes=((4, 3),))
    optimizer = kind(params, lr=0.01)
    LambdaLR(optimizer, lambda step: 1.0)
    params[0].grad = gradients(params, 0)[0]
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [ADOPT, AdEMAMix, AdamWIndependent, CAdamW, MARS, Muon, SOAP])
@pytest.mark.parametrize("saver", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9), ADOPT, CAdamW, SOAP])
def test_another_optimizers_state_is_refused(kind: type[GroupOptimizer], saver: type) -> None:
    """AdamW's groups in MARS lacked `gamma`, so that it was AdamW; in AdamWIndependent they brought another weight decay."""
    optimizer = after_a_step(kind)
    before = copy.deepcopy(optimizer.state_dict())
    if saver is kind:
        return
    with pytest.raises(ValueError, match=rf"{kind.__name__}: the saved state is another optimizer's"):
        optimizer.load_state_dict(after_a_step(saver).state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"][0].keys() == after["state"][0].keys()


def test_groups_in_another_order_are_refused() -> None:
    """Of as many tensors: torch would hand each the other's values."""
    groups = [{"params": [Parameter(torch.ones(2, 2))], "role": role} for role in ("matrix", "embedding")]
    saved = ADOPT([dict(group) for group in groups]).state_dict()
    with pytest.raises(ValueError, match=r"group 0 .*role matrix.*role embedding"):
        ADOPT([dict(group) for group in reversed(groups)]).load_state_dict(saved)
    ADOPT([dict(group) for group in groups]).load_state_dict(saved)
