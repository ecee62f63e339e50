"""Where a loss or gradient first stopped being finite: the difference between a failed run and a finding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from longspan.models.language_model import LanguageModel
from longspan.training.batches import to_device

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.segments import Isolation
    from longspan.training.distributed import Spread


def locate(
    model: LanguageModel,
    batches: Sequence[Batch],
    *,
    isolation: Isolation,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
) -> str:
    """Repeat one step on the weights it started from and name the first layer that is not finite.

    Forward, that is the first module whose output is not finite; backward, the deepest layer whose gradient is not
    (gradients come from the loss down). Gradients are cleared; weights are not touched.

    Args:
        batches: the micro-batches of the step.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the weights `{name}` were already not finite"
    model.zero_grad(set_to_none=True)
    try:
        for batch in batches:
            found = _locate_in(model, batch, isolation, device, autocast)
            if found:
                return found
        return _largest_gradient(model)
    finally:
        model.zero_grad(set_to_none=True)


def locate_in_spread(
    spread: Spread,
    batches: Sequence[Batch],
    *,
    isolation: Isolation,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
) -> str:
    """`locate` for a model over several ranks, all of which must call it and learn the same.

    Rank 0 repeats the whole step on a whole copy, rows in the portions that the ranks had.
    """
    weights, ranks = spread.whole(), spread.ranks

    def alone() -> str:
        model = LanguageModel(spread.model.config, spread.model.vocab_size, device=device)
        model.load_state_dict(weights)
        model.train(spread.model.training)
        every = (dataclasses.replace(ranks, rank=rank) for rank in range(ranks.size))
        portions = [rank.part(batch) for rank in every for batch in batches]
        return locate(model, portions, isolation=isolation, device=device, autocast=autocast)

    return ranks.on_first(alone)


def _locate_in(
    model: LanguageModel,
    batch: Batch,
    isolation: Isolation,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
) -> str | None:
    bad: list[str] = []

    def watch(name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not bad and not all(bool(torch.isfinite(t).all()) for t in _floats(output)):
                bad.append(f"the output of `{name}` ({kind}) in the forward pass")

        return hook

    handles = [m.register_forward_hook(watch(name, type(m).__name__)) for name, m in model.named_modules() if name]
    try:
        with autocast():
            nll, _ = model.loss(*to_device(batch, device), isolation)
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return bad[0]
    if not bool(torch.isfinite(nll)):
        return "the loss over the head's logits, with every layer's output finite"
    nll.backward()  # type: ignore[no-untyped-call]
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of `{name}` in the backward pass"
    return None


def _largest_gradient(model: LanguageModel) -> str:
    norms = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=lambda key: norms[key])
    largest = f"the largest is `{name}` with norm {norms[name]:.3g}"
    return f"the joint norm of all gradients, each finite when repeated; {largest}"


def _floats(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)
