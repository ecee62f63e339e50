from __future__ import annotations

import pytest
import torch

from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.models.matrix_layout import lay_out_for_decoding
from longspan.models.mixers import registered

LETTERS = "".join(sorted(registered()))


def model_of(pattern: str, **settings: object) -> LanguageModel:
    tiny = {"width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "delta_head_dim": 6, "mlp_width": 24}
    return LanguageModel(ModelConfig.parse({"pattern": pattern, **tiny, **settings}, "model"), 29, 0).eval()


def by_columns(weight: torch.Tensor) -> bool:
    return weight.stride() == (1, weight.shape[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", [*LETTERS, "[AM]"])
def test_a_model_laid_out_for_decoding_answers_as_before(pattern: str, tied: bool) -> None:
    plain, model = model_of(pattern, tied=tied), model_of(pattern, tied=tied)
    lay_out_for_decoding(model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, plain.get_parameter(name)), name
    tokens = torch.randint(0, 29, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = plain.initial_state(), model.initial_state()
        for part in torch.split(tokens, [9, 1, 1, 1], dim=1):
            right, expected = plain.next_logits(part, expected)
            logits, found = model.next_logits(part, found)
            torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)


def test_matrices_with_more_rows_than_columns_lie_column_by_column_and_no_others() -> None:
    model = model_of("AGm")
    lay_out_for_decoding(model)
    attention, gru, mamba1 = (block.mixer for block in model.blocks)
    moved = [model.head_weight, gru.weight_input, gru.weight_hidden, attention.qkv_proj.weight, mamba1.in_proj.weight]
    moved += [block.mlp.input_linear.weight for block in model.blocks]
    kept = [attention.out_proj.weight, mamba1.out_proj.weight, mamba1.A_log, mamba1.conv_weight]
    kept += [block.mlp.output_linear.weight for block in model.blocks]
    assert all(by_columns(weight) for weight in moved)
    assert all(weight.is_contiguous() for weight in kept)
    assert model.embedding.weight is model.head_weight


def test_where_the_head_is_a_matrix_of_its_own_embeddings_stay_row_by_row() -> None:
    model = model_of("A", tied=False)
    lay_out_for_decoding(model)
    assert by_columns(model.head_weight)
    assert model.embedding.weight.is_contiguous()


def test_every_matrix_of_a_mixer_that_is_named_is_there() -> None:
    for letter in LETTERS:
        mixer = model_of(letter).blocks[0].mixer
        assert all(mixer.get_parameter(name).ndim == 2 for name in mixer.matrices)
