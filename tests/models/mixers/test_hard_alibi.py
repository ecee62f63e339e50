"""Hard ALiBi: the first heads see a few tokens each, the others everything, and every law of attention still holds."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.models.interchange.choose import architecture_of
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.ops.attention import attention

KINDS = ["hard_alibi", "hard_alibi_rope"]


def model_with(positions: str, pattern: str = "AA", **settings: object) -> LanguageModel:
    options = {"width": 16, "heads": 4, "mlp_width": 16, "state": 4, "mamba_head_dim": 8, "chunk": 8, **settings}
    return LanguageModel(ModelConfig.parse({"pattern": pattern, "positions": positions, **options}, "model"), 29).eval()


def plain(q, k, v, windows, doc=None):
    """Every head on its own, with its own mask written out."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    out = []
    for head, window in enumerate(windows):
        seen = (distance >= 0) & (distance < window)
        scores = q[:, :, head] @ k[:, :, head].transpose(-1, -2) / q.shape[-1] ** 0.5
        if doc is not None:
            seen = seen & (doc[:, :, None] == doc[:, None])
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, :, head])
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("time", [5, 70, 150])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("cut", [None, 4])
def test_every_head_sees_its_own_window(time, backend, cut):
    generator = torch.Generator().manual_seed(time)
    q, k, v = (torch.randn(2, time, 3, 8, generator=generator) for _ in range(3))
    doc = None if cut is None else (torch.arange(time) >= cut).int().expand(2, -1).contiguous()
    windows = torch.tensor([1, 2, 3])
    y = attention(q, k, v, q_doc_BT=doc, window=3, head_windows_H=windows, backend=backend)
    torch.testing.assert_close(y, plain(q, k, v, windows.tolist(), doc), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", KINDS)
def test_masked_heads_reach_no_further_than_their_place(positions, tokens):
    """In one layer of masked heads only, all but one: a change far back reaches the output through the other head."""
    model = model_with(positions, "A", masked_heads=3)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        # Rows of the last head that write into the stream are silenced.
        mixer.out_proj.weight[:, 12:] = 0
        batch = tokens(1, 20)
        after = batch.clone()
        after[:, 5] = (after[:, 5] + 1) % 29
        changed = (model(batch)[0] != model(after)[0]).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [5, 6, 7]


@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("pattern", ["AA", "AM", "[AM]A"])
@pytest.mark.parametrize("split", [[1] * 21, [7, 13, 1], [20, 1]])
def test_decoding_at_any_split_is_one_pass(positions, pattern, split, tokens):
    model, batch = model_with(positions, pattern), tokens(2, 21)
    doc = torch.tensor([[0] * 8 + [1] * 13, [0] * 21], dtype=torch.int32)
    with torch.no_grad():
        for ids in (None, doc):
            whole, _ = model(batch, ids)
            state, parts = model.initial_state(), []
            for part, part_doc in zip(
                batch.split(split, 1), [None] * len(split) if ids is None else ids.split(split, 1), strict=True
            ):
                hidden, state = model(part, part_doc, state)
                parts.append(hidden)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", KINDS)
def test_a_document_never_sees_another(positions, tokens):
    model, batch = model_with(positions), tokens(1, 21)
    doc = torch.tensor([[0] * 9 + [1] * 12])
    after = batch.clone()
    after[:, :9] = (after[:, :9] + 7) % 29
    with torch.no_grad():
        first, second = model(batch, doc)[0], model(after, doc)[0]
        alone = model(batch[:, 9:])[0]
    assert torch.equal(first[:, 9:], second[:, 9:])
    torch.testing.assert_close(first[:, 9:], alone, atol=1e-5, rtol=1e-4)


def test_only_the_other_heads_rotate(tokens):
    """Without positions a shift of the whole string changes nothing; rotary heads see distances, so nor do they."""
    model, batch = model_with("hard_alibi_rope", "A"), tokens(1, 12)
    other = model_with("hard_alibi", "A")
    with torch.no_grad():
        assert not torch.allclose(model(batch)[0], other(batch)[0])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"masked_heads": 4}, "4 masked heads of 4"),
        ({"heads": 1}, "0 masked heads of 1"),
        ({"kv_heads": 2}, "2 key-value heads"),
        ({"pattern": "S"}, "sliding window"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    options = {"pattern": "A", **settings}
    with pytest.raises(UserError, match=words):
        model_with("hard_alibi", **options)


def test_no_published_architecture_holds_it():
    with pytest.raises(UserError, match="hard_alibi"):
        architecture_of(model_with("hard_alibi").config)
