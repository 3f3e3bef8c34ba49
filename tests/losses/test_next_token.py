"""The chunked loss equals its naive twin, in value and in every gradient, and never holds the logits."""

import weakref
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from helpers import SITE, D, V
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blagpt_pl.losses.choice import loss_named
from blagpt_pl.losses.chunked import FEWEST, LARGEST, Chunked, chunk_of, linear_of
from blagpt_pl.losses.next_token import IGNORE, Full, NextToken, full, summed, token_losses
from blagpt_pl.losses.slopes import nats, slopes
from blagpt_pl.losses.term import LogitTerm
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.nn.base import Site
from blagpt_pl.nn.head import LinearHead, TiedHead

HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


class Own(LinearHead):
    """A head that the loss knows nothing of: it is differentiated by autograd, chunk by chunk."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * 1.5


HEADS = {
    "tied": TiedHead,
    "linear": LinearHead,
    "linear with bias": partial(LinearHead, bias=True),
    "capped": partial(LinearHead, bias=True, softcap=2.0),
    "own": partial(Own, bias=True),
}


def chunked(head: nn.Module, features: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """What `Chunked` minimises."""
    return Chunked(chunk).parts(head, features, targets)[0]


def total_nats(head: nn.Module, features: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """What `Chunked` measures."""
    return Chunked(chunk).nats(head, features, targets)


def problem(
    head: str = "linear with bias",
    shape: tuple[int, ...] = (3, 17),
    ignored: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Module, Tensor, Tensor]:
    """A head, features (..., D) that are a leaf, and targets of which some count nowhere."""
    module = HEADS[head](SITE, nn.Embedding(V, D)).to(dtype)
    features = torch.randn(*shape, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, shape)
    targets[torch.rand(shape) < ignored] = IGNORE
    targets.view(-1)[0] = 5  # one that counts
    return module, features, targets


def results(loss: Tensor, head: nn.Module, features: Tensor, factor: float = 1.0) -> list[Tensor]:
    """The loss, and the gradients of features and head after backward from factor · loss."""
    inputs = [features, *head.parameters()]
    return [loss.detach(), *torch.autograd.grad(factor * loss, inputs)]


def gap(mine: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(mine) == len(theirs)
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 17, 50, 51, 8192])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_chunked_equals_full(chunk: int, head: str, ignored: float) -> None:
    module, features, targets = problem(head, ignored=ignored)
    mine = results(chunked(module, features, targets, chunk), module, features)
    theirs = results(full(module, features, targets), module, features)
    assert gap(mine, theirs) < 1e-12
    assert all(g.any() for g in theirs)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.floats(-1e3, 1e3), st.sampled_from(list(HEADS)))
def test_chunked_equals_full_for_any_shape(batch: int, length: int, chunk: int, factor: float, head: str) -> None:
    module, features, targets = problem(head, (batch, length))
    mine = results(chunked(module, features, targets, chunk), module, features, factor)
    theirs = results(full(module, features, targets), module, features, factor)
    assert gap(mine, theirs) < 1e-12 * (1 + abs(factor))


def test_the_value_is_the_definition() -> None:
    module, features, targets = problem("linear with bias", (2, 9))
    p = module(features).softmax(-1)
    rows = [-p[b, t, targets[b, t]].log() for b in range(2) for t in range(9) if targets[b, t] != IGNORE]
    assert abs(chunked(module, features, targets, 4) - sum(rows) / len(rows)) < 1e-12


def test_gradients_pass_gradcheck() -> None:
    module, features, targets = problem("linear with bias", (5,))
    small = module.linear.weight[:7].detach().clone().requires_grad_()
    targets = targets.clamp(max=6)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(small)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    head = Small()
    assert torch.autograd.gradcheck(lambda x, w: chunked(head, x, targets, 2), (features, head.weight))


def test_the_trunk_and_a_tied_table_receive_the_sum() -> None:
    """One table both looks tokens up and scores them: both gradients add up in it."""
    tokens, targets = torch.randint(V, (2, 3, 17)).unbind()
    gradients = []
    for loss in (full, partial(chunked, chunk=8)):
        torch.manual_seed(4)
        table, mix = nn.Embedding(V, D).double(), nn.Linear(D, D).double()
        loss(TiedHead(SITE, table), mix(table(tokens)).tanh(), targets).backward()
        gradients.append([table.weight.grad, mix.weight.grad, mix.bias.grad])
    assert gap(*gradients) < 1e-12


def test_two_backwards_accumulate() -> None:
    module, features, targets = problem()
    sums = []
    for loss in (full, partial(chunked, chunk=8)):
        module.zero_grad()
        features.grad = None
        for _ in range(2):
            (loss(module, features, targets) / 2).backward()
        sums.append([features.grad, *(p.grad for p in module.parameters())])
    assert gap(*sums) < 1e-12


def test_a_term_beside_it_adds_its_own_gradient() -> None:
    module, features, targets = problem()
    mine, theirs = (
        results(loss(module, features, targets) + 0.1 * features.square().mean(), module, features)
        for loss in (partial(chunked, chunk=8), full)
    )
    assert gap(mine, theirs) < 1e-12


def test_a_frozen_head_receives_nothing() -> None:
    module, features, targets = problem()
    module.requires_grad_(False)
    (mine,) = torch.autograd.grad(chunked(module, features, targets, 8), [features])
    (theirs,) = torch.autograd.grad(full(module, features, targets), [features])
    assert gap([mine], [theirs]) < 1e-12


def test_a_second_derivative_is_refused() -> None:
    """Its gradients are stored, not computed in backward: to differentiate them again would silently give too little."""
    module, features, targets = problem()
    loss = features.exp().mean() * chunked(module, features, targets, 8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, [features], create_graph=True)


def test_ignored_rows_change_nothing() -> None:
    module, features, targets = problem()
    before = results(chunked(module, features, targets, 8), module, features)
    with torch.no_grad():
        features[targets == IGNORE] = 1e3
    after = results(chunked(module, features, targets, 8), module, features)
    assert gap(before, after) < 1e-12
    assert not after[1][targets == IGNORE].any()


def test_a_chunk_that_counts_nowhere() -> None:
    module, features, targets = problem(shape=(40,), ignored=0.0)
    targets[8:24] = IGNORE  # two whole chunks
    theirs = results(full(module, features, targets), module, features)
    assert gap(results(chunked(module, features, targets, 8), module, features), theirs) < 1e-12


def test_a_batch_that_counts_nowhere_has_no_mean() -> None:
    module, features, targets = problem()
    targets[:] = IGNORE
    assert chunked(module, features, targets, 8).isnan()
    assert full(module, features, targets).isnan()
    assert total_nats(module, features, targets) == 0


@pytest.mark.parametrize("head", HEADS)
def test_under_bf16_autocast(head: str) -> None:
    """As exact as the twin under autocast, measured from float32; gradients keep their parameters' dtype."""
    module, features, targets = problem(head, (4, 64), dtype=torch.float32)
    exact = results(full(module, features, targets), module, features)
    with torch.autocast("cpu", torch.bfloat16):
        mine = results(chunked(module, features, targets, 48), module, features)
        theirs = results(full(module, features, targets), module, features)
    assert [g.dtype for g in mine] == [torch.float32] * len(mine)
    for a, b, reference in zip(mine, theirs, exact, strict=True):
        scale = reference.abs().max()
        assert (a - reference).abs().max() < 2e-2 * scale
        assert (a - reference).abs().max() < 2 * (b - reference).abs().max() + 1e-6 * scale


def test_bf16_weights_add_up_in_float32() -> None:
    """Many small chunks: the head's gradient is as good as that of one chunk."""
    module, features, targets = problem("tied", (512,), dtype=torch.bfloat16)
    double = TiedHead(SITE, nn.Embedding(V, D)).double()
    with torch.no_grad():
        double.weight.copy_(module.weight)
    exact = results(full(double, wide := features.detach().double().requires_grad_(), targets), double, wide)
    mine = results(chunked(module, features, targets, 8), module, features)
    assert mine[2].dtype == torch.bfloat16
    assert (mine[2].double() - exact[2]).abs().max() < 1e-2 * exact[2].abs().max()


@pytest.mark.parametrize("head", ["linear with bias", "own"])
def test_the_compiled_half_is_called_once_a_chunk(head: str) -> None:
    calls = []

    def watched(function: object) -> object:
        def body(scores: Tensor, *args: object, **kwargs: object) -> object:
            calls.append(len(scores))
            return function(scores, *args, **kwargs)

        return body

    module, features, targets = problem(head, shape=(20,))
    loss, _ = Chunked(8, watched(slopes), watched(nats), watched(summed)).parts(module, features, targets)
    assert calls == [8, 8, 4]
    loss.backward()
    assert calls == [8, 8, 4]


# ---------------------------------------------------------------------- every combination, compiled or not

WEIGHTS = {"one target": None, "two targets": (1.0, 0.3), "three targets": (0.5, 0.0, 2.0)}


class Squares(LogitTerm):
    """A term of the logits that is no term of log Z."""

    name = "squares"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets == IGNORE, 0.0, 0.01 * logits.square().mean(-1))


TERMS = {
    "alone": [],
    "z-loss": [ZLoss(SITE, None, 0.1)],
    "a term of its own": [Squares()],
    "both": [Squares(), ZLoss(SITE, None, 0.2)],
}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("several", WEIGHTS)
@pytest.mark.parametrize("head", ["tied", "capped", "own"])
def test_every_combination_equals_the_twin(head: str, several: str, terms: str, backend: str | None) -> None:
    """Value, parts and every gradient, in float64: soft cap, terms, masks, several targets, tied or not."""
    if backend == "aot_eager" and head == "own" and terms != "both":
        pytest.skip("one of them is enough: the compiled piece is autograd's")
    module, features, targets = problem(head)
    weights = WEIGHTS[several]
    if weights is not None:
        targets = torch.stack(
            [torch.where(torch.rand(3, 17) < 0.3 * k, IGNORE, targets) for k in range(len(weights))], -1
        )
        assert all((targets[..., k] != IGNORE).any() for k in range(len(weights)))
    how = Chunked(17) if backend is None else Chunked(17).compiled(backend)
    found = []
    for loss in (how, Full()):
        total, parts = loss.parts(module, features, targets, TERMS[terms], weights)
        found.append([total, parts, *torch.autograd.grad(total, [features, *module.parameters()])])
        assert not parts.requires_grad
        assert len(parts) == len(weights or [1]) + len(TERMS[terms])
    assert gap(*found) < 1e-12


def test_several_targets_are_the_weighted_sum_of_their_means() -> None:
    module, features, targets = problem("capped")
    later = torch.where(torch.rand(3, 17) < 0.5, IGNORE, torch.randint(V, (3, 17)))
    total, parts = Chunked(8).parts(module, features, torch.stack([targets, later], -1), weights=(1.0, 0.3))
    first, second = full(module, features, targets), full(module, features, later)
    assert gap([total, *parts], [first + 0.3 * second, first, 0.3 * second]) < 1e-12


@pytest.mark.parametrize("head", ["tied", "capped"])
def test_compiled_under_autocast_it_is_what_it_is_eagerly(head: str) -> None:
    module, features, targets = problem(head, (4, 64), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (
            results(how.parts(module, features, targets)[0], module, features)
            for how in (Chunked(64).compiled("aot_eager"), Chunked(64))
        )
    assert gap(mine, theirs) < 1e-4


def test_a_head_that_changes_its_forward_alone_is_no_linear_map() -> None:
    own, plain = Own(SITE, nn.Embedding(V, D)), LinearHead(SITE, nn.Embedding(V, D))
    assert linear_of(own) is None
    assert linear_of(plain).weight is plain.linear.weight
    assert linear_of(nn.Linear(D, V)) is None
    assert linear_of(Mixed(SITE, nn.Embedding(V, D))) is None


class Twice:
    """Something that changes what a head gives, mixed into one."""

    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


class Mixed(Twice, LinearHead):
    """`forward` is neither its own nor its head's."""


class Unused(Own):
    """A head with a parameter that its logits do not depend on."""

    def __init__(self, site: Site, embedding: nn.Embedding) -> None:
        super().__init__(site, embedding)
        self.unused = nn.Parameter(torch.zeros(3))


def hook_on(name: str, kind: str) -> Callable[[nn.Module], object]:
    return lambda head: getattr(head.get_submodule(name), f"register_{kind}_hook")(lambda *_: None)


CHANGES = {
    **{f"{kind} {name}": hook_on(name, kind) for name in ("", "linear", "cap") for kind in HOOKS},
    "forward": lambda head: setattr(head, "forward", lambda x: 2 * head.linear(x)),
    "forward within": lambda head: setattr(
        head.linear, "forward", lambda x: 2 * nn.functional.linear(x, head.linear.weight, head.linear.bias)
    ),
    "another cap": lambda head: setattr(head, "cap", nn.Tanh()),
    "another linear": lambda head: setattr(head, "linear", nn.Sequential(nn.Linear(D, V), nn.Tanh()).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_was_changed_is_no_linear_map(change: str) -> None:
    """What somebody put onto a head, or into it, is in the loss, whatever its implementation, and in what is measured."""
    module, features, targets = problem("capped")
    assert linear_of(module) is not None
    CHANGES[change](module)
    assert linear_of(module) is None
    assert (
        gap(*(results(how.parts(module, features, targets)[0], module, features) for how in (Chunked(9), Full())))
        < 1e-12
    )
    assert gap([Chunked(9).nats(module, features, targets)], [Full().nats(module, features, targets)]) < 1e-10


class Learns(LogitTerm):
    """A term with something to learn."""

    name = "learns"

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets == IGNORE, 0.0, (self.rate - logits.logsumexp(-1)).square())


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("head", ["tied", "own"])
def test_a_term_that_learns_gets_its_gradient(head: str, backend: str | None) -> None:
    module, features, targets = problem(head)
    term, found = Learns(), []
    for how in (Chunked(9) if backend is None else Chunked(9).compiled(backend), Full()):
        total, _ = how.parts(module, features, targets, [term])
        found.append([total, *torch.autograd.grad(total, [term.rate, features, *module.parameters()])])
    assert found[1][1] != 0
    assert gap(*found) < 1e-12


def test_a_parameter_that_a_head_does_not_use_has_no_gradient() -> None:
    _, features, targets = problem("own")
    module = Unused(SITE, nn.Embedding(V, D)).double()
    for how in (Chunked(9), Full()):
        module.zero_grad()
        how.parts(module, features, targets)[0].backward()
        assert module.unused.grad is None
        assert module.linear.weight.grad is not None


@pytest.mark.parametrize("how", [Chunked(9), Full()])
def test_terms_are_means_over_the_first_target(how: NextToken) -> None:
    """Whatever the others leave out; and one of them that counts nowhere adds nothing."""
    module, features, targets = problem("linear")
    other = torch.full_like(targets, IGNORE)
    other[0, :5] = 3
    for second in (other, torch.full_like(targets, IGNORE)):
        total, parts = how.parts(module, features, torch.stack([targets, second], -1), TERMS["z-loss"], (1.0, 0.3))
        z, counts = module(features.detach()), targets != IGNORE
        of_second = token_losses(z.flatten(0, 1), second.flatten()).sum() / max(1, (second != IGNORE).sum())
        term = 0.1 * z.logsumexp(-1)[counts].square().mean()
        expected = [full(module, features, targets).detach(), 0.3 * of_second, term]
        assert gap([*parts], expected) < 1e-12
        assert (total - sum(expected)).abs() < 1e-12


def test_an_own_head_in_bf16_adds_up_in_float32() -> None:
    """The sum over many chunks of one token is as good as over one chunk of many."""
    module, features, targets = problem("own", shape=(4096,), ignored=0.0, dtype=torch.bfloat16)
    exact, (x, y) = problem("own")[0], (features.detach().double().requires_grad_(), targets)
    exact.load_state_dict({name: p.double() for name, p in module.state_dict().items()})
    (truth,) = torch.autograd.grad(full(exact, x, y), [exact.linear.bias])
    (mine,) = torch.autograd.grad(chunked(module, features, y, 4), [module.linear.bias])
    assert (mine.double() - truth).norm() / truth.norm() < 0.01


def test_the_mean_is_not_rounded_to_16_bit() -> None:
    """The scale 1.00772 / 257 lies between two numbers of bfloat16, 0.4 % from either."""
    module, features, targets = problem("linear", shape=(257,), ignored=0.0, dtype=torch.bfloat16)
    exact, (x, y) = problem("linear")[0], (features.detach().double().requires_grad_(), targets)
    exact.load_state_dict({name: p.double() for name, p in module.state_dict().items()})
    (truth,) = torch.autograd.grad(full(exact, x, y) * 1.00772, [x])
    (mine,) = torch.autograd.grad(chunked(module, features, y, 257) * 1.00772, [features])
    assert abs((mine.double() * truth).sum() / truth.square().sum() - 1) < 2e-3


@given(st.integers(1, 300_000))
def test_chunks_are_few_and_alike(n: int) -> None:
    chunk = chunk_of(n)
    count = -(-n // chunk)
    assert chunk <= LARGEST
    assert count <= max(2 * FEWEST, 2 * -(-n // LARGEST))
    assert chunk * count - n < chunk
    if n % (1024 * 8) == 0:  # a micro-batch as it usually is: one shape, hence one graph
        assert n % chunk == 0


def test_chunks_of_usual_micro_batches() -> None:
    assert [chunk_of(b * 1024) for b in (1, 4, 8, 32, 64, 128)] == [256, 512, 1024, 4096, 8192, 8192]


def test_the_name_of_a_loss_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="model.loss: 'nothing' .expected one of chunked, full, liger"):
        loss_named("nothing")


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="liger-kernel; fix: pip install"):
        loss_named("liger")


@pytest.mark.gpu
@pytest.mark.parametrize("terms", ["alone", "z-loss"])
@pytest.mark.parametrize("head", ["tied", "capped"])
def test_liger_equals_the_twin(head: str, terms: str) -> None:
    pytest.importorskip("liger_kernel")
    module, features, targets = problem(head, (4, 64), dtype=torch.float32)
    module, targets = module.cuda(), targets.cuda()
    features = features.detach().cuda().requires_grad_()
    found = []
    for loss in (loss_named("liger"), Full()):
        total, parts = loss.parts(module, features, targets, TERMS[terms])
        found.append([total, *parts, *torch.autograd.grad(total, [features, *module.parameters()])])
    assert gap(*found) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_bf16_products_add_up_in_float32_on_a_gpu(backend: str | None) -> None:
    """The head's gradient of many chunks is as good as that of one."""
    table = nn.Embedding(4096, 256, device="cuda")
    features = torch.randn(8192, 256, device="cuda", requires_grad=True)
    targets = torch.randint(4096, (8192,), device="cuda")
    head, errors = TiedHead(SITE, table), []
    exact = torch.autograd.grad(full(head.double(), features.double(), targets), list(head.parameters()))[0]
    head.float()
    for chunk in (8192, 256):
        how = Chunked(chunk) if backend is None else Chunked(chunk).compiled(backend)
        with torch.autocast("cuda", torch.bfloat16):
            total, _ = how.parts(head, features, targets)
        (mine,) = torch.autograd.grad(total, list(head.parameters()))
        errors.append((mine.double() - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0] < 1e-2


# ---------------------------------------------------------------------- the ruler's sum


@pytest.mark.parametrize("chunk", [1, 7, 51, 8192])
def test_total_nats_is_the_sum_in_float64(chunk: int) -> None:
    module, features, targets = problem(dtype=torch.float32)
    nats = total_nats(module, features, targets, chunk)
    p = module.double()(features.double()).log_softmax(-1).flatten(0, 1)
    expected = sum(-p[i, t].item() for i, t in enumerate(targets.flatten().tolist()) if t != IGNORE)
    assert nats.dtype == torch.float64
    assert not nats.requires_grad
    assert abs(nats.item() - expected) < 1e-6 * expected


def test_total_nats_does_not_drift() -> None:
    """A float32 sum of a million losses near 11 is off by far more."""
    n = 2**20
    head = nn.Identity()
    logits = torch.full((n, 2), 0.0)
    logits[:, 1] = -10.7
    exact = n * token_losses(logits[:1].double(), torch.ones(1, dtype=torch.int64)).item()
    drift = abs(total_nats(head, logits, torch.ones(n, dtype=torch.int64)).item() - exact)
    assert drift < 1e-7 * exact


def test_padding_and_mean_agree() -> None:
    module, features, targets = problem()
    n = (targets != IGNORE).sum()
    assert abs(total_nats(module, features, targets) / n - full(module, features, targets)) < 1e-12


# ---------------------------------------------------------------------- memory


class Memory(TorchDispatchMode):
    """Watches every tensor an operation returns: the largest, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            self.largest = max(self.largest, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def watched(loss: object, backward: bool = True) -> tuple[Memory, int]:
    """Memory of a loss and its backward over N = 512 tokens, and the elements of all logits, N · V."""
    vocabulary, tokens = 1000, 512
    head = TiedHead(SITE, nn.Embedding(vocabulary, 8))
    features = torch.randn(tokens, 8, requires_grad=backward)
    targets = torch.randint(vocabulary, (tokens,))
    with Memory() as memory:
        value = loss(head, features, targets)
        if backward:
            value.backward()
    return memory, tokens * vocabulary


@pytest.mark.parametrize("chunk", [16, 100])
def test_all_logits_are_never_held(chunk: int) -> None:
    memory, everything = watched(partial(chunked, chunk=chunk))
    naive, _ = watched(full)
    assert memory.largest == chunk * 1000
    assert naive.largest == everything  # the same watch sees them in the twin
    assert (
        memory.peak < 4 * 4 * chunk * 1000 + 200_000
    )  # logits, their softmax and gradients of one chunk, and the head's
    assert naive.peak > 2 * 4 * everything


def test_measuring_holds_one_chunk_too() -> None:
    memory, _ = watched(partial(total_nats, chunk=16), backward=False)
    assert memory.largest == 16 * 1000
    assert memory.peak < 4 * 4 * 16 * 1000


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_one_chunk() -> None:
    vocabulary, tokens, width, chunk = 50304, 16384, 256, 2048
    peaks = []
    for loss in (partial(chunked, chunk=chunk), full):
        table = nn.Embedding(vocabulary, width, device="cuda")
        features = torch.randn(tokens, width, device="cuda", requires_grad=True)
        targets = torch.randint(vocabulary, (tokens,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss(TiedHead(SITE, table), features, targets).backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < 0.4 * peaks[1]
