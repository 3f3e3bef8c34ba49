"""What every architecture shares: how it is trained, measured and optimised, never how it computes.

One Lightning batch is one optimizer step: `training_step` receives all micro-batches of the step, runs backward on each,
and returns the last one's loss for Lightning to finish, so that automatic optimization, clipping and every callback count
optimizer steps and nothing else (docs/architecture.md, "One batch is one step").
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import lightning as L
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from blagpt_pl.errors import ConfigError
from blagpt_pl.losses.choice import LossName, loss_named
from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.objective import Lesson, measure, objective, untraceable
from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import Carry, Head, continues
from blagpt_pl.nn.compiled import check_backend, compiled
from blagpt_pl.nn.flops import CannotCount, count_flops
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.roles import blocks_of, roles_of, splits_of
from blagpt_pl.nn.states import States
from blagpt_pl.optim.roles import groups_by_role, scale_learning_rates
from blagpt_pl.optim.schedule import Constant, Schedule
from blagpt_pl.resume import between_steps, check_fits, number_by_model, start_afresh
from blagpt_pl.ruler import Ruler
from blagpt_pl.sampling import sample
from blagpt_pl.seeding import reseed
from blagpt_pl.sharding import is_sharded, keep_gradients_local, shard, wants_local_gradients, without_sync
from blagpt_pl.window import Window

OptimizerFactory = Callable[[Iterable], Optimizer]
ScheduleFactory = Callable[[int], Schedule]
GRAPHS = (
    64  # that regions of all shapes may come to, each once to train and once to measure; torch counts them together
)


class LanguageModel(L.LightningModule):
    """Base of every architecture. A subclass sets `head`, and says `regions`, and `trunk` and `finish` (or `features`).

    A promise of `testing` that it does not make stands with its reason in `exempt`; so it may in any part.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        compile: backend of torch.compile for the regions and the loss, or None to run eagerly.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        memory: what the regions recompute instead of keeping it; nothing by default.
        whole_graph: compile trunk and loss as one graph instead of region by region.

    Raises:
        ValueError: no such backend, or a choice that would have no effect.
    """

    head: Head
    continues: ClassVar[bool] = False  # whether its `trunk` also takes `states`, those of a piece of a longer sequence
    head_passes: int = 1  # how many times the loss applies the head to a token; those of `losses` come on top

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "trunk" in vars(cls) and "continues" not in vars(cls):  # another way into the blocks, which says it anew
            cls.continues = False

    def __init__(
        self,
        vocab_size: int,
        context: int,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        compile: str | None = None,
        loss: LossName = "chunked",
        memory: MemoryPolicy | None = None,
        whole_graph: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(compile, str):
            check_backend(compile)
        if whole_graph and compile is None:
            raise ValueError("model.whole_graph: no effect without model.compile; fix: model.compile: inductor")
        if memory is not None:
            memory.check(compile)
        self.vocab_size = vocab_size
        self.context = context
        self.seed = torch.initial_seed()
        self.ruler = Ruler()
        self.losses = nn.ModuleList()
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.backend = compile
        self.memory = memory
        self._configured = False
        self._counted = False
        self._flops: int | None = None
        self._loss = loss_named(loss)
        self.whole_graph = whole_graph
        self._objective, self._measure = objective, measure
        self._window = Window()
        self._grad_norm: Tensor | None = None
        self._lr: dict[str, float] = {}
        self.tokens_per_step = 0  # of all ranks, known from the first batch on

    # ------------------------------------------------------------------ what a subclass says

    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        """(B, T) int64 -> the stream as it enters the last block, in that block's layout, and what travels beside it."""
        raise NotImplementedError(f"{type(self).__name__} must say how a stream (B, T, D) comes from tokens (B, T)")

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        """The stream of `trunk` -> (B, T, D): the last block, or another in its place, and all that stands before the head."""
        raise NotImplementedError(f"{type(self).__name__} must say how features come from what enters the last block")

    def readout(self) -> Iterable[nn.Module]:
        """What `finish` applies after the last block, and the head: shared by all who predict from the trunk."""
        raise NotImplementedError(f"{type(self).__name__} must name what stands after its last block")

    def features(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, D): everything before the head."""
        return self.finish(*self.trunk(tokens))

    def lesson(self, tokens: Tensor, targets: Tensor) -> Lesson:
        """What the head learns from: (B, T) tokens and targets -> features and targets; more than the next token in some."""
        return Lesson(self.features(tokens), targets)

    def regions(self) -> Iterable[nn.Module]:
        """The repeated pieces that are compiled and sharded one by one."""
        raise NotImplementedError(f"{type(self).__name__} must name its repeated pieces")

    # ------------------------------------------------------------------ the contract

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V); logits[:, t] predict tokens[:, t + 1]."""
        return self.head(self.features(tokens))

    def objective(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises.

        Args:
            tokens, targets: (B, T) int64; targets[:, t] is the token after tokens[:, t], shifted by the data stream.

        Returns:
            The scalar to differentiate, and the numbers it is the sum of: `loss`, the next-token loss in nats a token,
            and the terms of `losses` by name, weighted.
        """
        return self._objective(self, self._loss, tokens, targets)

    def next_token(self, features: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss alone, in nats a token; differentiable."""
        return self._loss.parts(self.head, features, targets)[0]

    def measure(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of the targets that count, in nats, float64."""
        return self._measure(self, self._loss, tokens, targets)

    def next_logits(self, tokens: Tensor, states: States | None = None) -> Tensor:
        """(B, T) -> (B, V): logits of the token that follows; with states, of a piece behind the others that these remember."""
        features = self.features(tokens) if states is None else self.finish(*self.trunk(tokens, states))
        return self.head(features[:, -1])

    def can_continue(self) -> bool:
        """Whether `next_logits` can be given a sequence piece by piece: the model and all its parts remember (nn/states.py)."""
        usual = all(getattr(type(self), name) is vars(LanguageModel)[name] for name in ("features", "next_logits"))
        return self.continues and usual and continues(self)

    def parameter_roles(self) -> dict[str, str]:
        """The role of every distinct parameter by its name: embedding, head, matrix or vector (`optim.roles`)."""
        return roles_of(self, self.head)

    def flops_per_token(self) -> int | None:
        """Forward and backward, at the full context, counted once (`nn.flops`); None where not all of it can be counted."""
        if not self._counted:
            self._counted = True
            with contextlib.suppress(CannotCount):
                flops = count_flops(self, self.context)
                self._flops = None if flops.uncounted else flops.per_token
        return self._flops

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue (B, T) tokens by `max_new_tokens`; see `sampling.sample`."""
        return sample(self, tokens, max_new_tokens, temperature, top_k, top_p, generator)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One optimizer step's micro-batches: inputs and targets (A, B, T), or (B, T) for a single one."""
        inputs, targets = (t if t.ndim == 3 else t[None] for t in batch)
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        n, ranks, rank = len(inputs), self.trainer.world_size, self.trainer.global_rank
        step = self.trainer.global_step
        if self.log_due(step + 1):
            self._lr = {group.get("role", "all"): group["lr"] for group in optimizer.param_groups}
        self.tokens_per_step = inputs.numel() * ranks
        for micro in range(n):
            last = micro == n - 1
            reseed(self.seed, step, micro * ranks + rank)
            total, parts = self.objective(inputs[micro], targets[micro])
            total = total if n == 1 else total / n
            for name, value in parts.items():
                self._window.add(name, value if n == 1 else value / n)
            if not last:
                with without_sync(self), without_autocast(self.device):
                    self.trainer.strategy.backward(total, optimizer)
        self._window.steps += 1
        return total

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: gradients are cleared before the first micro-batch, not between forward and backward."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Seed by the step alone, so that an optimizer which draws random numbers draws the same on every rank."""
        reseed(self.seed, self.trainer.global_step)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the Trainer is told to, and keep the norm from before for the log; it is computed once.

        Where gradients are local each rank clips its own by its own norm, and the log has the mean of these norms.
        """
        log_due = self.log_due(self.trainer.global_step + 1)
        if not gradient_clip_val and not log_due:
            return
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if log_due and wants_local_gradients(optimizer):
            self._grad_norm = self.trainer.strategy.reduce(norm.clone(), reduce_op="mean")
        if not gradient_clip_val:
            return
        if self._scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":  # without a scaler, Lightning refuses fused optimizers for no reason
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    @property
    def _scaler(self) -> object | None:
        """The loss scaler of float16."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Log the means since the last log, stamped with the number of optimizer steps taken."""
        trainer = self.trainer
        step = trainer.global_step
        if step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates once more before it leaves
        if not self.log_due(step):
            return
        rates = {"lr": next(iter(self._lr.values()))}
        if len(set(self._lr.values())) > 1:
            rates |= {f"lr/{role}": lr for role, lr in self._lr.items()}
        self.report({**rates, "tokens": float(step * self.tokens_per_step)})
        self._window.publish(self.trainer, step, {} if self._grad_norm is None else {"grad_norm": self._grad_norm})

    def report(self, scalars: Mapping[str, float]) -> None:
        """Numbers of the host for the log of this step: from a callback's `on_train_batch_end`, where `log_due`."""
        self._window.reported.update(scalars)

    def log_due(self, step: int) -> bool:
        """Whether scalars are logged when this many optimizer steps have been taken."""
        trainer = self.trainer
        return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps

    # ------------------------------------------------------------------ measuring

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Inputs and targets (B, T), and how many bytes the targets stand for where that is known."""
        tokens, targets, *n_bytes = batch
        self.ruler.update(self.measure(tokens, targets), (targets != IGNORE).sum(), *n_bytes)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/perplexity and, where known, val/bpb."""
        self._log_ruler("val")

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/perplexity and, where known, test/bpb."""
        self._log_ruler("test")

    def _log_ruler(self, stage: str) -> None:
        result = {f"{stage}/{name}": value for name, value in self.ruler.compute().items()}
        self.ruler.reset()
        self.log_dict({**result, "step": float(self.trainer.global_step)}, sync_dist=False)

    # ------------------------------------------------------------------ resuming

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Write the run's position as it is between two steps, and what it is a function of."""
        between_steps(checkpoint["loops"], checkpoint["global_step"])
        if "optimizer_states" in checkpoint and not is_sharded(self):
            for state, optimizer in zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True):
                number_by_model(state, optimizer, list(self.parameters()))
        mean_over_ranks = self.trainer.strategy.reduce
        sums = {name: mean_over_ranks(total, reduce_op="mean").cpu() for name, total in self._window.sums.items()}
        window = {"sums": sums, "steps": self._window.steps}
        checkpoint["position"] = {"step": checkpoint["global_step"], "seed": self.seed, "window": window}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """See that the weights are this model's, and take up the means that were being made for the next log."""
        if "state_dict" in checkpoint:
            check_fits(checkpoint["state_dict"], self)
        window = checkpoint.get("position", {}).get("window", {})
        self._window.sums, self._window.steps = dict(window.get("sums", {})), window.get("steps", 0)

    def on_train_start(self) -> None:
        """Begin the next step like any other, also after a resume."""
        start_afresh(self.trainer)
        if self.trainer.world_size > 1 and wants_local_gradients(self.optimizers(use_pl_optimizer=False)):
            keep_gradients_local(self.trainer.strategy.model, scaled=self._scaler is not None)

    # ------------------------------------------------------------------ wiring

    def configure_model(self) -> None:
        """Compile the regions in place, then shard them where the strategy shards (FSDP2)."""
        if self._configured:
            return
        self._configured = True
        if self.device_mesh is not None or self.memory is not None:
            self.flops_per_token()  # a sharded model cannot be copied; what is recomputed is no FLOP of the model
        self.apply_memory_policy()
        if self.backend is not None:
            self.compile_regions(self.backend)
        if self.device_mesh is not None:
            if self.whole_graph:
                raise ConfigError("model.whole_graph: true, but FSDP2 gathers weights region by region; fix: false")
            shard(self, self.regions(), self.device_mesh)

    def _all_regions(self) -> list[nn.Module]:
        """The regions of the model and of its terms."""
        return [*self.regions(), *(region for term in self.losses for region in term.regions())]

    def apply_memory_policy(self) -> None:
        """Let the policy change the regions of the model and of its terms, in place; once more changes nothing."""
        if self.memory is not None:
            for region in self._all_regions():
                self.memory.on_region(region)

    def compile_regions(self, backend: str | Callable) -> None:
        """Compile in place, each as one graph: the regions of the model and of its terms, and the loss of a chunk.

        With `whole_graph`: two graphs in all, one of the objective and one of what validation measures.
        """
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.optimize_ddp = False  # regions are smaller than a bucket graph already
        if hasattr(torch._functorch.config, "backward_pass_autocast"):  # not in every torch that we allow
            torch._functorch.config.backward_pass_autocast = "off"  # as in eager training
        for_regions = backend if self.memory is None else self.memory.backend(backend)
        if self.whole_graph:
            if reason := untraceable(self):
                raise ConfigError(f"model.whole_graph: true, but {reason} cannot be traced; fix: false")
            self._objective, self._measure = (compiled(f, for_regions) for f in (objective, measure))
            return
        for region in self._all_regions():
            region.compile(backend=for_regions, fullgraph=True, dynamic=False)
        self._loss = self._loss.compiled(backend)

    def make_optimizer(self) -> Optimizer:
        """One optimizer over the groups of `parameter_roles`.

        Raises:
            ConfigError: it does not take them.
        """
        named: list[tuple[str, Parameter]] = list(self.named_parameters())
        groups = groups_by_role(named, self.parameter_roles(), splits_of(self), blocks_of(self))
        try:
            optimizer = self.optimizer_factory(groups)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.optimizer: refuses the groups of this model: {error}") from error
        scale_learning_rates(optimizer)
        return optimizer

    def configure_optimizers(self) -> dict:
        """The optimizer, and the schedule over all of its groups."""
        optimizer = self.make_optimizer()
        scheduler = self.configure_schedule(self.trainer).on(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_schedule(self, trainer: L.Trainer) -> Schedule:
        """The schedule of a run; a trial of a few steps (fast_dev_run) has a constant one, since none would fit."""
        return Constant(1) if trainer.fast_dev_run else self.schedule_factory(trainer.max_steps)
