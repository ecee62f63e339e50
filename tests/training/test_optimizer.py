"""Learning rates, weight-decay groups and clipping."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from longspan.training.config import TrainingConfig
from longspan.training.optimizer import clip_gradients, learning_rate, make_optimizer


def rates(**changes: object) -> list[float]:
    config = TrainingConfig.parse({"context": 1, "batch_tokens": 1, "peak_lr": 1.0, "steps": 20, **changes}, "training")
    return [learning_rate(config, step) for step in range(config.num_steps)]


def test_warmup_starts_at_peak_over_warmup_and_reaches_the_peak() -> None:
    assert rates(warmup=5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rates(warmup=0)[0] == 1.0


def test_cosine_falls_from_the_peak_to_the_floor() -> None:
    values = rates(warmup=0, min_lr_ratio=0.2)
    assert values[10] == pytest.approx(0.6)
    assert values == sorted(values, reverse=True)
    assert 0.2 < values[-1] < 0.21


def test_cosine_to_zero_never_trains_with_zero() -> None:
    assert min(rates(warmup=3, min_lr_ratio=0)) > 0


def test_constant_holds_the_peak() -> None:
    assert rates(warmup=2, schedule="constant") == [0.5] + [1.0] * 19


def test_wsd_holds_the_peak_and_falls_at_the_end() -> None:
    values = rates(warmup=2, schedule="wsd", decay=4, min_lr_ratio=0)
    assert values == pytest.approx([0.5] + [1.0] * 16 + [0.75, 0.5, 0.25])


def test_norms_biases_and_recurrence_parameters_get_no_weight_decay(small: ModuleType) -> None:
    model = small.model()
    optimizer = make_optimizer(model, small.settings(weight_decay=0.3), torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(decay) == len(by_name)
    spared = {name for name, value in by_name.items() if value == 0.0}
    expected = {n for n, p in model.named_parameters() if p.ndim < 2 or n.endswith(("A_log", ".D", "dt_bias"))}
    assert spared == expected
    assert any(name.endswith("A_log") for name in spared)
    assert {value for name, value in by_name.items() if name not in spared} == {0.3}


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_scales_the_joint_norm_and_tells_the_one_before(fused: bool) -> None:
    weights, ends = [torch.zeros(2), torch.zeros(1)], []
    for gradients, max_norm in (([3.0, 0.0, 4.0], 1.0), ([0.6, 0.0, 0.8], None), ([0.6, 0.0, 0.8], 2.0)):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        parameters[0].grad, parameters[1].grad = torch.tensor(gradients[:2]), torch.tensor(gradients[2:])
        # With so large an epsilon an update is nearly in proportion to the gradient.
        optimizer = torch.optim.AdamW(parameters, lr=1.0, eps=1e3, weight_decay=0.0, fused=fused)
        norm = clip_gradients(optimizer, parameters, max_norm)
        assert norm.item() == pytest.approx(sum(g * g for g in gradients) ** 0.5)
        optimizer.step()
        ends.append(torch.cat([parameter.detach() for parameter in parameters]))
    assert ends[0][2] < 0
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=0)


def test_a_clipping_is_forgotten_by_the_next_update() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    parameter.grad = torch.full((1,), 100.0)
    clip_gradients(optimizer, [parameter], 1.0)
    optimizer.step()
    parameter.grad = torch.full((1,), 0.5)
    clip_gradients(optimizer, [parameter], 1.0)
    optimizer.step()
    # The mean of both gradients, as clipped, at the usual 0.9.
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(0.9 * 0.1 * 1.0 + 0.1 * 0.5, rel=1e-4)
