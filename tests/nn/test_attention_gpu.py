"""On a GPU: which kernel attends, that what cuDNN refuses falls through, and windows through flex_attention. Not run yet."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import SITE, attention, block, tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.nn.attention.backends import HOPPER, backend_used, kernels
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_window import Windowed, banded
from blagpt_pl.nn.attention.flex import band, found
from blagpt_pl.nn.base import Core, Heads, Site

pytestmark = pytest.mark.gpu
OPS = {"cudnn": "cuDNN", "flash": "flash", "efficient": "efficient"}  # in the operation's name -> in the report
BF16, F32 = torch.bfloat16, torch.float32


def qkv(n: int, n_kv: int, dim: int, values: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((n, dim), (n_kv, dim), (n_kv, values))
    return [torch.randn(2, x, length, w, device="cuda").to(dtype).requires_grad_() for x, w in shapes]


def on_hopper() -> bool:
    return torch.cuda.get_device_capability() == HOPPER


class Attends(TorchDispatchMode):
    """The kernel that ran forward."""

    kernel = "math"

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func._overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            self.kernel = next((said for part, said in OPS.items() if part in name), self.kernel)
        return func(*args, **(kwargs or {}))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~past, -torch.inf).softmax(-1) @ v


def close(y: Tensor, twin: Tensor, inputs: list[Tensor], wide: list[Tensor], tolerance: float) -> None:
    """Values and gradients, each to its own largest number."""
    weight = torch.randn_like(twin)
    mine = [y, *torch.autograd.grad(y, inputs, weight.to(y.dtype), retain_graph=True)]
    theirs = [twin, *torch.autograd.grad(twin, wide, weight, retain_graph=True)]
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double() - b.double()).abs().max() < tolerance * b.abs().max()


# n, n_kv, width of keys, width of values, dtype -> kernels that may take it on Hopper, and elsewhere
CASES = {
    "baseline": ((12, 4, 64, 64, BF16), {"cuDNN"}, {"flash"}),
    "one head of keys": ((12, 1, 64, 64, BF16), {"cuDNN"}, {"flash"}),
    "ungrouped": ((12, 12, 64, 64, BF16), {"cuDNN"}, {"flash"}),
    "wide heads": ((4, 4, 128, 128, BF16), {"cuDNN"}, {"flash"}),
    "values of another width (MLA)": ((8, 8, 96, 64, BF16), {"cuDNN", "efficient"}, {"efficient", "cuDNN"}),
    "a width of no multiple of 8": ((4, 2, 60, 60, BF16), {"flash", "math"}, {"flash", "math"}),
    "float32": ((12, 12, 64, 64, F32), {"efficient"}, {"efficient"}),
    "float32, grouped": ((12, 4, 64, 64, F32), {"math", "efficient"}, {"math", "efficient"}),
}


@pytest.mark.parametrize(("case", "hopper", "elsewhere"), CASES.values(), ids=CASES)
def test_the_first_kernel_that_can_runs_is_right_and_is_reported(case: tuple, hopper: set, elsewhere: set) -> None:
    n, n_kv, dim, values, dtype = case
    inputs = qkv(n, n_kv, dim, values, 256, dtype)
    core = SDPA(Heads(SITE, n, n_kv, dim, values))
    before = torch._C._get_sdp_priority_order()
    with Attends() as ran:
        y = core(*inputs)
    assert ran.kernel == backend_used(*inputs) == core.kernel(inputs[0].device, dtype, 256)
    assert ran.kernel in (hopper if on_hopper() else elsewhere)
    assert torch._C._get_sdp_priority_order() == before
    wide = [x.detach().double().requires_grad_() for x in inputs]
    close(y, exact(*wide), inputs, wide, 3e-2 if dtype == BF16 else 1e-2)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_dropout_runs_and_keeps_the_mean(dtype: torch.dtype) -> None:
    inputs = qkv(4, 2, 64, 64, 128, dtype)
    core = SDPA(Heads(SITE, 4, 2, 64), dropout=0.3)
    with Attends() as ran:
        core(*inputs)
    assert ran.kernel == backend_used(*inputs, dropout=0.3)
    with torch.no_grad():
        mean = torch.stack([core(*inputs).double() for _ in range(400)]).mean(0)
        assert not torch.equal(core(*inputs), core(*inputs))
        core.eval()
        assert (mean - core(*inputs)).abs().mean() < 0.05


def test_deterministic_algorithms_still_find_a_kernel() -> None:
    inputs = qkv(12, 4, 64, 64, 256, BF16)
    core = SDPA(Heads(SITE, 12, 4, 64))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (torch.autograd.grad(core(*inputs).float().square().sum(), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_a_user_s_own_choice_holds() -> None:
    inputs = qkv(12, 4, 64, 64, 256, BF16)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), Attends() as ran:
        SDPA(Heads(SITE, 12, 4, 64))(*inputs)
    assert ran.kernel == "flash"


def test_keys_and_values_are_kept_once_a_group() -> None:
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = qkv(12, 4, 64, 64, 1024, BF16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        SDPA(Heads(SITE, 12, 4, 64))(*inputs)
    row = 2 * 1024 * 64 * 2  # bytes of one head
    assert sum(kept.values()) < (12 + 4 + 4 + 12 + 2) * row  # and a little beside; repeated, it would be 48


def test_compiled_it_is_the_same_kernel() -> None:
    """Seen by the profiler: a compiled graph calls the operation that was chosen while it was traced."""
    inputs = qkv(12, 4, 64, 64, 256, BF16)
    core = SDPA(Heads(SITE, 12, 4, 64))
    compiled = torch.compile(core, fullgraph=True, dynamic=False)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    close(compiled(*inputs), exact(*wide), inputs, wide, 3e-2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        compiled(*inputs)
    names = " ".join(event.key for event in seen.key_averages())
    part = next(part for part, said in OPS.items() if said == backend_used(*inputs))
    assert f"_scaled_dot_product_{part}_attention" in names


def test_a_model_says_what_runs() -> None:
    said = kernels(tiny(), Core, torch.device("cuda"), BF16, 32)
    assert said in ("cuDNN", "flash")


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 3e-2), (F32, 1e-2)])
@pytest.mark.parametrize("length", [200, 1024])
def test_a_window_s_kernel_equals_its_twin(
    length: int, dtype: torch.dtype, tolerance: float, cap: float | None
) -> None:
    inputs = qkv(12, 4, 64, 64, length, dtype)
    core = Windowed(Heads(Site(768, 2, 0, 61, 2048), 12, 4, 64), 150, cap)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    twin = banded(*wide, 150, cap)
    for form in (core, torch.compile(core, fullgraph=True, dynamic=False)):
        y = form(*inputs)
        assert y.dtype == dtype
        close(y, twin, inputs, wide, tolerance)


def test_a_model_trains_and_generates_with_a_window_and_makes_its_mask_once() -> None:
    found.cache_clear()
    parts = block(attention=attention(head_dim=16, core=partial(Windowed, window=9)))
    model = tiny(block=parts, compile="inductor").cuda()
    model.configure_model()
    tokens = torch.randint(61, (3, 24), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", BF16):
            total, _ = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] - 0.1
    assert found.cache_info().misses == 1
    assert [x.device.type for x in found(band, 9, 23, tokens.device)] == ["cuda"] * 8
    assert model.generate(tokens[:, :5], 9).shape == (3, 14)
