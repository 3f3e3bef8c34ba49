"""What a person wants to read when a run is over."""

from collections.abc import Mapping
from pathlib import Path


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def summary(result: Mapping) -> str:
    """A few lines for the terminal, from what `result.json` holds."""
    rows: list[tuple[str, str]] = []
    if "val_loss" in result:
        best = f"  (best {result['best_val_loss']:.4f} at step {result['best_step']})" if "best_step" in result else ""
        rows.append(("val loss", f"{result['val_loss']:.4f} nats a token{best}"))
        rows.append(("perplexity", f"{result['val_perplexity']:,.2f}"))
    if "val_bpb" in result:
        unigram = f"  (unigram model {result['val_unigram_bpb']:.4f})" if "val_unigram_bpb" in result else ""
        rows.append(("val bpb", f"{result['val_bpb']:.4f} bits a byte{unigram}"))
    rows.append(("parameters", f"{result['parameters'] / 1e6:,.2f} M"))
    rows.append(("tokens", f"{result['tokens']:,}"))
    if "step_ms" in result:
        pace = f"{result['step_ms']:,.1f} ms median, {result['step_ms_p90']:,.1f} ms p90, {result['tokens_per_s']:,.0f} tokens/s"
        pace += f", optimizer {result['optimizer_ms']:,.1f} ms" if "optimizer_ms" in result else ""
        rows.append(("step", pace))
    if "optimizer" in result:
        rows.append(("optimizer", f"{result['optimizer']}, {result['optimizer_state_mib']:,.1f} MiB of state"))
    if "first_step_s" in result:
        first = f"{result['first_step_s']:,.1f} s"
        if pieces := result.get("kernels_compiled", 0) + result.get("kernels_cached", 0):
            first += (
                f", {result['graphs']} graphs in all, {result['kernels_cached']} of {pieces} pieces from torch's cache"
            )
        rows.append(("first step", first))
    vram = max(result.get("peak_vram_train_mib", 0), result.get("peak_vram_eval_mib", 0))
    memory = f"VRAM {result.get('peak_vram_train_mib', 0):,.0f} MiB training, {result.get('peak_vram_eval_mib', 0):,.0f} MiB evaluating"
    rows.append(("peak memory", memory if vram else f"RAM {result['peak_ram_mib']:,.0f} MiB (no accelerator)"))
    rows.append(("hardware", result["hardware"]))
    rows.append(("logs", f"{result['run']}  (tensorboard --logdir {Path(result['run']).parent.parent})"))
    head = f"{result['state']}: step {result['steps']} of {result['max_steps']} in {_time(result['seconds'])}"
    return "\n".join([head, *(f"  {name:<12}{value}" for name, value in rows)])
