"""Rotary positions make scores depend on distance alone, in the pairing that transformers' Llama uses."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.ops.rotary import RopeScaling, Rotation, rotary


def test_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(query_at, key_at):
        turned = [
            rotary(x, Rotation.build(torch.tensor([[at]]), 8, 100.0, torch.float64))
            for x, at in ((q, query_at), (k, key_at))
        ]
        return (turned[0] * turned[1]).sum(-1)

    assert torch.allclose(score(3, 1), score(1003, 1001), atol=1e-10)
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_position_zero_changes_nothing_and_norms_are_kept():
    x = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5).expand(2, -1)
    turned = rotary(x, Rotation.build(positions, 6, 10000.0))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_first_pair_turns_by_one_radian_per_token():
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = 1.0
    turned = rotary(x, Rotation.build(torch.tensor([[1]]), 4, 10000.0))[0, 0, 0]
    assert torch.allclose(turned, torch.tensor([torch.cos(torch.tensor(1.0)), 0.0, torch.sin(torch.tensor(1.0)), 0.0]))


def test_one_row_of_positions_serves_every_row_and_the_dtype_stays():
    x = torch.randn(3, 4, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    shared = rotary(x, Rotation.build(torch.arange(4)[None], 8, 500.0))
    assert shared.dtype == torch.bfloat16
    assert torch.equal(shared, rotary(x, Rotation.build(torch.arange(4).expand(3, -1), 8, 500.0)))


def test_pairs_turn_as_complex_numbers():
    x = torch.randn(2, 7, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(100, 107)
    angles = positions[:, None].double() * 500.0 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(rotary(x, Rotation.build(positions[None], 8, 500.0, torch.float64)), expected, atol=1e-12)


@pytest.mark.slow
def test_it_is_what_transformers_llama_computes():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16)
    q = torch.randn(2, 7, 2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3, 10).expand(2, -1)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected, _ = llama.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    assert torch.allclose(rotary(q, Rotation.build(positions, 16, 10000.0)), expected.transpose(1, 2), atol=1e-6)


def test_an_odd_head_dim_is_refused():
    with pytest.raises(UserError, match="head_dim 5"):
        Rotation.build(torch.zeros(1, 1), 5, 10.0)


LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=64)


def test_llama3_scaling_slows_only_what_turns_slowly():
    frequencies = 2 * torch.pi / torch.tensor([8.0, 15.9, 32.0, 64.1, 1000.0], dtype=torch.float64)
    ratio = LLAMA3.scale(frequencies) / frequencies
    assert ratio[[0, 1]].tolist() == [1.0, 1.0]
    # 32 tokens a turn are 2 turns in 64: a third of the way from 1 to 4.
    assert torch.allclose(ratio[2:], torch.tensor([1 / 3 + 2 / 3 / 8, 1 / 8, 1 / 8], dtype=torch.float64), atol=1e-12)


def test_linear_scaling_is_position_interpolation():
    scaled = Rotation.build(torch.tensor([[12]]), 8, 100.0, scaling=RopeScaling(kind="linear", factor=4.0))
    assert torch.allclose(scaled.cos, Rotation.build(torch.tensor([[3]]), 8, 100.0).cos)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "yarn", "factor": 2.0}, "yarn"),
        ({"kind": "linear", "factor": 0}, "factor"),
        ({"kind": "linear", "factor": 2.0, "low_frequency": 1.0}, "`factor` alone"),
        ({"kind": "llama3", "factor": 2.0, "low_frequency": 1.0}, "incomplete"),
        ({**LLAMA3.model_dump(), "low_frequency": 4.0}, "below high_frequency"),
    ],
)
def test_half_a_scaling_is_refused(settings, problem):
    with pytest.raises(UserError, match=problem):
        RopeScaling.parse(settings, "rope_scaling")
