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
    kind = PartedAdamW if any(map(_is_parted, model.parameters())) else torch.optim.AdamW
    return kind(
        model.parameter_groups(training.weight_decay),
        lr=learning_rate(training, 0),
        betas=training.betas,
        eps=training.eps,
        fused=device.type in FUSED_DEVICES,
    )


class PartedAdamW(torch.optim.AdamW):
    """AdamW of parameters that several processes hold in parts (DTensors), on this process's own parts.

    The same numbers as torch's own, which reaches each tensor through its wrapper: that costs the host more than
    the device needs for the update. States are DTensors too, as checkpoints expect them.
    """

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by the gradients over `grad_scale`; none on the device while `found_inf` is not 0."""
        from torch.optim.adamw import adamw

        assert closure is None
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in held]
            adamw(
                _own(held),
                _own([p.grad for p in held]),
                _own([state["exp_avg"] for state in states]),
                _own([state["exp_avg_sq"] for state in states]),
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return state


def _is_parted(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _own(tensors: Sequence[Any]) -> list[torch.Tensor]:
    """What this process holds of each."""
    return [tensor.to_local() if _is_parted(tensor) else tensor for tensor in tensors]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(
    optimizer: torch.optim.AdamW, parameters: Sequence[torch.nn.Parameter], max_norm: float | None
) -> torch.Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`.

    A fused optimizer does so in its coming update, where it reads them anyway.

    Returns:
        the norm before clipping, () fp32, still on the device; not finite where any gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(_own(gradients))
    parted: Any = next(filter(_is_parted, gradients), None)
    if parted is not None:
        square = norm.square()
        torch.distributed.all_reduce(square, group=parted.device_mesh.get_group())
        norm = square.sqrt()
    divisor = None if max_norm is None else ((norm + ROUNDING) / max_norm).clamp(min=1.0)
    if all(group["fused"] for group in optimizer.param_groups):
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    elif divisor is not None:
        torch._foreach_div_(_own(gradients), divisor)
    return norm
