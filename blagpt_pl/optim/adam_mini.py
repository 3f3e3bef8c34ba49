"""Adam-mini: Adam whose second moment is one number for a block of weights that act as one: a head, a row, a gain.

Source   Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv:2406.16793, algorithm 1
Formula  m <- β1 m + (1 - β1) g,  v_b <- β2 v_b + (1 - β2) mean of g² over block b
         W <- (1 - η λ) W - η (m / (1 - β1^t)) / (sqrt(v_b / (1 - β2^t)) + eps)
Blocks   of queries and keys the heads; of all other matrices, embeddings and heads of the model the rows; of a norm the whole
         gain; of a bias and of any other vector each number, which is Adam. More dimensions: slices along the first.
Differs  blocks are told by the model's parts (`nn.roles.blocks_of`), not read from names; weight decay acts on matrices alone.
         v is float32 at least, whatever the weights are.
Cost     one number a parameter of state and one a block, and no temporary as large as a parameter. Under FSDP2 one all-reduce
         of one number a block for each group.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative, wide
from blagpt_pl.optim.placed import here, mine, ranks_of
from blagpt_pl.optim.roles import Blocks, rows_apart


def by_block(rows: Tensor, runs: Blocks) -> Tensor:
    """One number a row -> their means, one number a block."""
    parts = zip(rows.split([n for n, _ in runs]), runs, strict=True)
    return torch.cat([x if size == 1 else x.view(-1, size).mean(1) for x, (_, size) in parts])


def by_row(values: Tensor, runs: Blocks) -> Tensor:
    """One number a block -> the same for each of its rows."""
    parts = zip(values.split([n // size for n, size in runs]), runs, strict=True)
    return torch.cat([x if size == 1 else x.repeat_interleave(size) for x, (_, size) in parts])


def rows_of(p: Tensor) -> int:
    """Rows of a whole tensor, also where this rank has only some of them."""
    return p.shape[0] if p.ndim else 1


def rows_first(x: Tensor) -> Tensor:
    """The tensor with a first dimension, which a number lacks."""
    return x if x.ndim else x.view(1)


def squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, ...) -> (rows,), the sum of squares of each row."""
    if x.ndim == 1:
        return x.to(dtype).square()
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), dtype=dtype).square()


class AdamMini(GroupOptimizer):
    """Adam with one second moment a block of rows.

    Args:
        params: tensors, or groups of them whose `blocks` say for each tensor the runs (rows, rows of one block) along its
            first dimension. Without `blocks` every row is one, and so every number of a vector.
        lr: η.
        betas: β1 and β2.
        eps: added to the root of a second moment.
        weight_decay: λ, decoupled: a step takes η λ of each weight.

    Raises:
        ValueError: a value out of its range, or blocks that are not all rows of their tensor.
    """

    precise = ("exp_avg_sq",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._blocks: dict[Tensor, Blocks] = {}
        self._rows: dict[Tensor, slice] = {}  # of the whole tensor's, those on this rank; of sharded tensors alone
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group, with its `blocks` if it has some."""
        super().add_param_group(param_group)
        params = param_group["params"]
        blocks = param_group.setdefault("blocks", [rows_apart(p) for p in params])
        if len(blocks) != len(params):
            raise ValueError(f"AdamMini: blocks of {len(blocks)} tensors for {len(params)} (expected as many)")
        for p, runs in zip(params, blocks, strict=True):
            rows = rows_of(p)
            if any(n < 0 or size < 1 or n % size for n, size in runs) or sum(n for n, _ in runs) != rows:
                raise ValueError(
                    f"AdamMini: blocks {runs} of a tensor {tuple(p.shape)} (expected runs (rows, rows of one block) that "
                    f"are {rows} rows in all, each a multiple of its block)"
                )
            self._blocks[p] = tuple(map(tuple, runs))
            if isinstance(p, DTensor) != isinstance(params[0], DTensor):
                raise ValueError("AdamMini: sharded tensors and whole ones in one group (expected one group for each)")
            if isinstance(p, DTensor):
                if p.device_mesh.ndim != 1:
                    raise ValueError(f"AdamMini: a tensor on a mesh of {p.device_mesh.ndim} dimensions (expected 1)")
                on_rank = mine(torch.arange(rows), like=p).tolist()
                self._rows[p] = slice(on_rank[0], on_rank[-1] + 1) if on_rank else slice(0)

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        return {
            "lr": not_negative(group["lr"]),
            "betas": betas_fit(group["betas"]),
            "eps": not_negative(group["eps"]),
            "weight_decay": not_negative(group["weight_decay"]),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        counts = self.count(params)
        seconds = self.second_moments(params, beta2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_div_(roots, [(1 - beta2**t) ** 0.5 for t in counts])
        torch._foreach_add_(roots, group["eps"])

        weights = [rows_first(here(p)) for p in params]
        momenta = [rows_first(m) for m in self.zeros(params, "exp_avg")]
        torch._foreach_lerp_(momenta, [rows_first(here(p.grad)) for p in params], 1 - beta1)
        decay_(weights, group["lr"] * group["weight_decay"])
        steps = [-group["lr"] / (1 - beta1**t) for t in counts]
        torch._foreach_addcdiv_(weights, momenta, self.beside(params, roots), steps)

    def second_moments(self, params: list[Tensor], beta2: float) -> list[Tensor]:
        """Take the mean square of each block into its second moment; returns these, (blocks,) for each parameter."""
        rows = [squares(rows_first(here(p.grad)), wide(p.dtype)) for p in params]
        torch._foreach_div_(rows, [max(1, p.numel()) / max(1, rows_of(p)) for p in params])
        ranks = None
        if params[0] in self._rows:  # rows of others are zero here, and ours there
            whole = [x.new_zeros(rows_of(p)) for p, x in zip(params, rows, strict=True)]
            for all_rows, p, x in zip(whole, params, rows, strict=True):
                all_rows[self._rows[p]] = x
            rows, ranks = whole, ranks_of(params[0])
        means = by_block(torch.cat(rows), self.runs(params))
        if ranks is not None:
            dist.all_reduce(means, group=ranks)
        each = zip(params, means.split([self.n_blocks(p) for p in params]), strict=True)
        new = [mean.to(wide(p.dtype)) for p, mean in each]
        seconds = []
        for p, mean in zip(params, new, strict=True):
            state = self.state[p]
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(mean)
            seconds.append(state["exp_avg_sq"])
        torch._foreach_lerp_(seconds, new, 1 - beta2)
        return seconds

    def beside(self, params: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """One number a block -> (rows, 1, ...), the same for each row that this rank has of each parameter."""
        rows = by_row(torch.cat(values), self.runs(params)).split([rows_of(p) for p in params])
        return [x[self._rows.get(p, slice(None))].view(-1, *(1,) * (p.ndim - 1)).to(p.dtype)
                for p, x in zip(params, rows, strict=True)]  # fmt: skip

    def runs(self, params: list[Tensor]) -> Blocks:
        """The runs of several parameters, one after the other; neighbours of single rows are one run."""
        found: list[tuple[int, int]] = []
        for rows, size in chain.from_iterable(self._blocks[p] for p in params):
            if found and size == found[-1][1] == 1:
                found[-1] = (found[-1][0] + rows, 1)
            else:
                found.append((rows, size))
        return tuple(found)

    def n_blocks(self, p: Tensor) -> int:
        """How many second moments a parameter has."""
        return sum(rows // size for rows, size in self._blocks[p])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError: it has other blocks.
        """
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if "exp_avg_sq" not in self.state[p]:
                    continue
                second = state_dict["state"][key]["exp_avg_sq"]
                if second.shape != (self.n_blocks(p),):
                    raise ValueError(
                        f"AdamMini: the saved state has {tuple(second.shape)} second moments of a tensor {tuple(p.shape)} "
                        f"(expected {self.n_blocks(p)}, of blocks {self._blocks[p]})"
                    )
