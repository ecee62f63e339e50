"""How weights move: AdamW with its parameter groups, the learning-rate schedules, and clipping."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from longspan.training.config import TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longspan.models.language_model import LanguageModel

ROUNDING = 1e-6
"""Keeps the quotient of clipping finite, as torch's `clip_grad_norm_` does."""
FUSED_DEVICES = frozenset({"cpu", "cuda"})


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Learning rate of the update that follows `step` finished steps (0 for the first).

    Warm-up is peak × (step + 1) / warm-up. `cosine` then falls to `min_lr` over all remaining steps, `wsd` holds the
    peak and falls linearly over the last `decay` steps, `constant` holds the peak.
    """
    peak, floor, total = training.peak_lr, training.min_lr, training.num_steps
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.schedule == "cosine":
        progress = (step - training.warmup_steps) / (total - training.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if training.schedule == "wsd" and step >= total - training.decay_steps:
        progress = (step - (total - training.decay_steps)) / training.decay_steps
        return peak + (floor - peak) * progress
    return peak


def make_optimizer(model: LanguageModel, training: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the model's own parameter groups, as one fused kernel where the device has it."""
    return torch.optim.AdamW(
        model.parameter_groups(training.weight_decay),
        lr=learning_rate(training, 0),
        betas=training.betas,
        eps=training.eps,
        fused=device.type in FUSED_DEVICES,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`.

    Returns:
        the norm before clipping, () fp32, still on the device; not finite where any gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Of gradients that several processes hold in parts, each sees its own: the wrapper around them costs the host more
    # for every tensor than the device needs for the work.
    own = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(own)
    parted: Any = next((g for g in gradients if hasattr(g, "to_local")), None)
    if parted is not None:
        square = norm.square()
        torch.distributed.all_reduce(square, group=parted.device_mesh.get_group())
        norm = square.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(own, (max_norm / (norm + ROUNDING)).clamp(max=1.0))
    return norm
