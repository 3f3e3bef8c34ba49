"""On a GPU: what `describe` says of a step's memory and time, beside a step that is made. Not run yet: no GPU so far."""

import statistics
from pathlib import Path

import pytest
import torch

from blagpt_pl.devices import device_named, device_of
from blagpt_pl.lab.account import Account
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.nn.autocast import without_autocast

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = {
    "blagpt": ["blagpt.yaml"],
    "gpt2": ["gpt2.yaml"],
    "untied": ["blagpt.yaml", "techniques/untied.yaml"],
    "mla": ["blagpt.yaml", "techniques/mla.yaml"],
    "multi_token": ["blagpt.yaml", "techniques/multi_token.yaml"],
}
MICRO = 2  # micro-batches of a step


def steps(account: Account, device: torch.device, n: int, warmup: int) -> tuple[int, float]:
    """Bytes at the worst instant of a step, and the median time of one in milliseconds."""
    torch.manual_seed(0)
    model = model_of(account.layers).to(device)
    model.configure_model()
    optimizer = model.make_optimizer()
    tokens = torch.randint(model.vocab_size, (2, account.device_batch, account.context), device=device)
    times = []
    for step in range(warmup + n):
        if step == warmup:
            torch.cuda.reset_peak_memory_stats(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            for _ in range(MICRO):
                total, _ = model.objective(*tokens)
                with without_autocast(device):
                    (total / MICRO).backward()
        optimizer.step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return torch.cuda.max_memory_allocated(device), statistics.median(times[warmup:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_memory_and_time_are_as_described(name: str) -> None:
    device = torch.device("cuda")
    known = device_of(device)
    words = [word for file in MODELS[name] for word in ("--config", str(CONFIGS / file))]
    words += ["--data.device_batch_size", "16", "--data.batch_size", str(16 * MICRO)]
    account = Account(layers_for(words), known or device_named("H100"))
    peak, ms = steps(account, device, n=10, warmup=5)
    said = account.memory.at(16, MICRO)["total"]
    assert abs(said / peak - 1) <= 0.10, f"described {said / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f} MiB"
    if known is not None:
        told = account.prediction.step_ms
        assert abs(told / ms - 1) <= 0.20, f"predicted {told:.1f} ms, measured {ms:.1f} ms"
