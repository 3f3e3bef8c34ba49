"""What is told of an optimizer: the values that hold for each group, and every byte that it keeps."""

import json
from functools import partial

import torch
from helpers import tiny

from blagpt_pl.optim.account import groups_told, state_bytes
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.muon import Muon
from blagpt_pl.optim.schedule import Cosine


def trained(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_each_group_says_what_holds_for_it() -> None:
    muon, adamw = partial(Muon, lr=0.02), partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, fused=True)
    model = tiny(optimizer=partial(Composite, matrix=muon, other=adamw))
    optimizer = model.make_optimizer()
    scheduler = Cosine(100, warmup=50).on(optimizer)  # the peaks are told, whatever the step
    trained(optimizer)
    scheduler.step()
    told = {group["role"]: group for group in groups_told(optimizer)}
    json.dumps(told, allow_nan=False)
    assert told["matrix"]["lr"] == 0.02 and told["vector"]["lr"] == 1e-3
    assert told["matrix"]["momentum"] == 0.95 and told["vector"]["betas"] == [0.9, 0.999]
    assert told["vector"]["weight_decay"] == 0.0 and told["vector"]["fused"] is True  # the role's, not the optimizer's
    assert sum(group["parameters"] for group in told.values()) == sum(p.numel() for p in model.parameters())
    assert sum(group["tensors"] for group in told.values()) == len(list(model.parameters()))
    assert not {"params", "splits", "initial_lr"} & set().union(*told.values())


def test_state_is_counted_to_the_byte() -> None:
    ps = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    plain = trained(torch.optim.SGD(ps, lr=0.1))
    assert state_bytes(plain) == 0
    assert state_bytes(trained(torch.optim.SGD(ps, lr=0.1, momentum=0.9))) == 15 * 4 + 4 * 2
    adam = trained(torch.optim.Adam(ps))
    assert state_bytes(adam) == 2 * (15 * 4 + 4 * 2) + 2 * 4  # and a count of steps each
    assert state_bytes(adam, adam) == state_bytes(adam)


def test_also_where_a_state_has_states_in_it() -> None:
    import heavyball

    ps = [torch.nn.Parameter(torch.ones(3, 5))]
    assert 2 * 15 * 4 <= state_bytes(trained(heavyball.AdamW(ps))) < 2 * 15 * 4 + 64
