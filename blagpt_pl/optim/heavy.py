"""HeavyBall's optimizers (heavyball 3.2) by their plain names, `heavyball.PSGDKron`, with the manners of this house.

Why      As they come, a parser cannot read them: lr, betas and others have no type, and what is not said is an `object()`, of
         no type either. A step compiles itself for minutes, takes the gradients away, and a state holds sets and a pickle.
How      Whoever imports heavyball gets it adapted: each class with a signature that says every type and default; no
         compilation unless `compile_step: true`; gradients stay; a state is plain tensors, numbers and lists, which come back
         as they were saved, and nothing in it is executed. Until somebody imports it, it costs nothing.
Left out options that need a second backward pass within a step (`hessian_approx` and its kin), are broken in 3.2.1 (`mars`,
         whose two rates are swapped, `use_precond_schedule`, which fails), or reach into the model's weights (`param_ecc`,
         `orig_shapes`). `SplitOpt` and `SAMWrapper` do not fit a step of one pass over parameter groups, `SFAdamW` and `MSAMLaProp` validate at
         other weights than they train at: these four say so.
"""

import functools
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from blagpt_pl.optim.soap import PaLMForeachSOAP

LEFT_OUT = {
    "hessian_approx", "finite_differences", "fallback_to_finite_differences", "hvp_interval", "consume_grad",
    "mars", "mars_gamma", "use_precond_schedule", "precond_scheduler", "param_ecc", "orig_shapes",
}  # fmt: skip
UNFIT = {
    "SplitOpt": "splits parameters itself; fix: class_path: Composite",
    "SAMWrapper": "needs a second backward pass within a step, and a step here has one",
    **dict.fromkeys(
        ("SFAdamW", "MSAMLaProp"), "validates and saves at other weights than it trains at; a run here has one kind"
    ),
}
OF_MATRICES = ("SOAP", "Shampoo", "SOLP", "Muon", "Ortho", "PSGD", "QSGD", "LATHER", "Scion")  # in the name of a class
DTYPE = Literal["float32", "bfloat16", "float16"]
TYPES = {  # where neither an annotation nor the default tells
    "weight_decay": float,
    "storage_dtype": DTYPE,
    "q_dtype": DTYPE,
    "ecc": Literal["bf16+8", "bf16+16", "fp16+8", "fp16+16"] | None,
    "memory_save_mode": str | None,
    "gradient_clipping": str | None,
    "update_clipping": str | None,
}
SETS = ("is_initialized",)  # of a state: which transforms have begun


def adapt(heavyball: ModuleType) -> None:
    """Give a freshly imported heavyball its manners."""
    if hasattr(heavyball, PaLMForeachSOAP.__name__):
        return
    heavyball.utils.compile_mode = None
    base, unsaid = heavyball.utils.StatefulOptimizer, heavyball.chainable.use_default
    base.consume_grad = False
    base.inner_group = property(
        lambda self: self.param_groups[0].setdefault("inner_group", {}), lambda self, value: None
    )
    base._store_stats = lambda self, state_dict: None
    base._load_stats = lambda self, state_dict: None
    base.load_state_dict = load_state_dict
    state_dict = heavyball.chainable.ChainOpt.state_dict
    heavyball.chainable.ChainOpt.state_dict = functools.wraps(state_dict)(lambda self: plain(state_dict(self)))
    for name in heavyball.__all__:
        found = getattr(heavyball, name)
        if name in UNFIT:
            refuse(found, UNFIT[name])
        elif inspect.isclass(found):
            say_types(found, unsaid)
    heavyball.PaLMForeachSOAP = PaLMForeachSOAP  # of heavyball 1.x, gone since 3.0


# ---------------------------------------------------------------------- what a configuration may say


def say_types(cls: type, unsaid: object) -> None:
    """Give a class a signature without gaps; an option that is not said stays so for heavyball."""
    init = cls.__init__
    silent = {name for name, p in inspect.signature(init).parameters.items() if p.default is unsaid}
    options = [
        typed(p, unsaid, getattr(cls, p.name, None))
        for p in inspect.signature(init).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name not in LEFT_OUT
    ]

    @functools.wraps(init)
    def __init__(self: Optimizer, params: Iterable, *values: Any, **named: Any) -> None:
        params = list(params)
        if any(word in type(self).__name__ for word in OF_MATRICES):
            no_tables(self, params)
        init(self, params, *values, **{k: v for k, v in named.items() if v is not None or k not in silent})

    del __init__.__wrapped__
    __init__.__signature__ = inspect.Signature(options)
    cls.__init__ = __init__


def refuse(cls: type, why: str) -> None:
    """Make a class say why it cannot be used."""

    def __init__(self: Optimizer, params: Iterable) -> None:
        raise ValueError(f"heavyball.{cls.__name__}: {why}")

    cls.__init__ = __init__


def no_tables(optimizer: Optimizer, params: list) -> None:
    """Refuse embeddings and heads to an optimizer of matrices; it makes an exception of vectors itself."""
    for group in params:
        role = group.get("role") if isinstance(group, dict) else None
        if role in ("embedding", "head"):
            name = type(optimizer).__name__
            raise ValueError(
                f"heavyball.{name}: takes matrices and vectors, found parameters of role {role}; fix: class_path: Composite "
                f"with matrix: heavyball.{name} and an optimizer for the other parameters"
            )


def typed(p: inspect.Parameter, unsaid: object, inherited: object) -> inspect.Parameter:
    """A parameter with its type, and with the default that a class has where the signature is silent."""
    if p.default is p.empty:
        return p.replace(annotation=Iterable) if p.name == "params" else p
    default, annotation = p.default, TYPES.get(p.name, p.annotation)
    if default is unsaid:
        default = inherited if isinstance(inherited, bool | int | float) else None
    if annotation is p.empty:
        annotation = float | None if default is None else type(default)
        if annotation is tuple:
            annotation = tuple[tuple(float for _ in default)]
    if default is None and annotation in (bool, int, float):
        annotation = annotation | None
    return p.replace(default=default, annotation=annotation)


# ---------------------------------------------------------------------- what a checkpoint holds


def plain(value: Any) -> Any:
    """The same with lists for sets."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return sorted(value) if isinstance(value, set) else value


def restored(value: Any, device: torch.device) -> Any:
    """A state of one parameter as it was before `plain`, its tensors beside the parameter and in their own precision."""
    if isinstance(value, Tensor):
        return value.clone().to(device)
    if isinstance(value, dict):
        return {key: set(one) if key in SETS else restored(one, device) for key, one in value.items()}
    return [restored(one, device) for one in value] if isinstance(value, list) else value


def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
    """Take up a state to the bit."""
    Optimizer.load_state_dict(self, {**state_dict, "state": {}})
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, p in zip(keys, (p for group in self.param_groups for p in group["params"]), strict=True):
        if key in state_dict["state"]:
            views = {
                int(n): one for n, one in state_dict["state"][key].items()
            }  # torch's sharded checkpoints make 0 a "0"
            self.state[p] = restored(views, p.device)


# ---------------------------------------------------------------------- when it is imported


class Adapter(importlib.abc.MetaPathFinder):
    """Finds heavyball where it is, and adapts it once it has been run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "heavyball":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_adapt(module: ModuleType) -> None:
                run(module)
                adapt(module)

            spec.loader.exec_module = run_and_adapt
        return spec


def wait() -> None:
    """Adapt heavyball: now where it has been imported, else when it is."""
    if "heavyball" in sys.modules:
        adapt(sys.modules["heavyball"])
    else:
        sys.meta_path.insert(0, Adapter())


wait()
