"""Initialisation, loss, optimizer groups, precision and refusals of the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longspan.foundation.errors import UserError
from longspan.models.language_model import IGNORE, LanguageModel, ModelConfig
from longspan.models.mixers import registered

SMALL = {"width": 64, "heads": 4, "state": 16, "mamba_head_dim": 16, "delta_head_dim": 16}
LETTERS = sorted(registered())


def build(pattern: str, seed: int = 0, **settings: object) -> LanguageModel:
    return LanguageModel(ModelConfig.parse({"pattern": pattern, **SMALL, **settings}, "model"), 50, seed)


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second, other = build("AMG", 5), build("AMG", 5), build("AMG", 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim >= 2:
            assert not torch.equal(a, c), name


def test_equal_parts_of_two_patterns_start_equal():
    first, second = build("AM"), build("AMAM")
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert torch.equal(first.blocks[1].mixer.in_proj.weight, second.blocks[1].mixer.in_proj.weight)


@pytest.mark.parametrize("init", ["scaled", "normal"])
def test_dt_lies_in_its_range_after_the_whole_model_is_built(init):
    model = build("AMMGM", width=256, mamba_head_dim=8, init=init)
    dt = torch.cat([F.softplus(b.mixer.dt_bias) for b in model.blocks if b.letter == "M"])
    a = torch.cat([b.mixer.A_log.exp() for b in model.blocks if b.letter == "M"])
    assert dt.min() >= 1e-3 * (1 - 1e-4)
    assert dt.max() <= 1e-1 * (1 + 1e-4)
    assert dt.max() / dt.min() > 30
    assert a.min() >= 1
    assert a.max() <= 16 * (1 + 1e-6)


def test_a_fresh_state_forgets_as_little_as_it_is_told_to():
    model = build("M", width=256, mamba_head_dim=8, mixers={"M": {"decay_init": [0.01, 0.02], "dt_init": [0.05, 0.05]}})
    mixer = model.blocks[0].mixer
    torch.testing.assert_close(F.softplus(mixer.dt_bias), torch.full_like(mixer.dt_bias, 0.05))
    assert 0.01 * (1 - 1e-5) <= mixer.A_log.exp().min() < mixer.A_log.exp().max() <= 0.02 * (1 + 1e-5)
    for given in ({"decay_init": [0, 1]}, {"dt_init": [0.2, 0.1]}):
        with pytest.raises(UserError, match="two positive numbers, the smaller one first"):
            build("M", mixers={"M": given})


@pytest.mark.parametrize("letter", ["M", "m"])
def test_every_step_size_of_an_ssm_follows_its_input_and_learns(letter):
    """An earlier code clamped them at their upper end from the start: constant, and without a gradient."""
    model = build(letter)
    tokens = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(0))
    loss, _ = model.loss(tokens, tokens.roll(-1, 1))
    loss.backward()
    mixer = model.blocks[0].mixer
    projection = mixer.in_proj.weight.grad[-mixer.heads :] if letter == "M" else mixer.dt_proj.weight.grad
    assert (mixer.dt_bias.grad != 0).all()
    assert (projection != 0).any(dim=1).all()


def test_what_writes_into_the_residual_stream_starts_small():
    shallow, deep = build("A"), build("A8")
    for part in ("mixer.out_proj", "mlp.output_linear"):
        ratio = (
            shallow.blocks[0].get_parameter(f"{part}.weight").std()
            / deep.blocks[0].get_parameter(f"{part}.weight").std()
        )
        assert ratio.item() == pytest.approx(8**0.5, rel=0.05)


def test_published_initialisation_is_normal_everywhere():
    model = build("AA", mlp="gelu", norm="layernorm", attention_bias=True, init="normal", tied=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("letter", [*LETTERS, "[AM]"])
def test_no_decay_for_biases_norms_and_recurrence_parameters(letter):
    model = build(letter, attention_bias=True, mlp="gelu", norm="layernorm", positions="learned", max_positions=32)
    decayed, spared = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert not spared_names & decayed_names
    assert spared_names | decayed_names == set(names.values())
    expected = {n for n in names.values() if "norm" in n or "bias" in n or n.endswith(("A_log", ".A", ".D", "dt_bias"))}
    assert spared_names == expected


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_token_nll_equal_plain_cross_entropy(tied, tokens):
    model = build("AM", tied=tied)
    batch, targets = tokens(2, 9), tokens(2, 9, name="targets").clone()
    targets[0, 3] = targets[1, 0] = IGNORE
    doc = torch.tensor([[0] * 5 + [1] * 4, [2] * 9])
    hidden, _ = model(batch, doc)
    plain = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(2, 9)
    nll, state = model.token_nll(batch, targets, doc)
    total, count = model.loss(batch, targets, doc)
    assert state is None
    assert count.item() == 16
    torch.testing.assert_close(nll, plain)
    torch.testing.assert_close(total, plain.sum())
    assert nll[0, 3] == 0
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nll_of_a_document_does_not_depend_on_the_cut(tokens):
    model, batch, targets = build("AMG"), tokens(1, 30), tokens(1, 30, name="targets")
    with torch.no_grad():
        whole, _ = model.token_nll(batch, targets)
        state, parts = model.initial_state(), []
        for part, target in zip(batch.split(11, 1), targets.split(11, 1), strict=True):
            nll, state = model.token_nll(part, target, state=state)
            parts.append(nll)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


def test_next_logits_continue_a_prompt(tokens):
    model, batch = build("AMG"), tokens(2, 12)
    with torch.no_grad():
        expected = model.logits(model(batch)[0][:, -1])
        _, state = model.next_logits(batch[:, :11], model.initial_state())
        logits, state = model.next_logits(batch[:, 11:], state)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert state.length == 12


def test_dropout_acts_in_training_only(tokens):
    model, batch = build("AM", dropout=0.5), tokens(1, 8)
    with torch.no_grad():
        evaluated = [model.eval()(batch)[0] for _ in range(2)]
        trained = model.train()(batch)[0]
    assert torch.equal(*evaluated)
    assert not torch.equal(evaluated[0], trained)


@pytest.mark.parametrize("pattern", [*LETTERS, "[AM]"])
def test_bfloat16_stays_close_and_gradients_stay_fp32(pattern, tokens):
    model, batch = build(pattern), tokens(1, 24)
    exact, _ = model.loss(batch, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model.loss(batch, batch)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_casting_keeps_the_recurrence_parameters_in_fp32(tokens):
    model, batch = build("AMG"), tokens(1, 24)
    exact, _ = model.token_nll(batch, batch)
    model.cast(torch.bfloat16)
    kept = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    with torch.no_grad():
        state = model.initial_state()
        nll, state = model.token_nll(batch, batch, state=state)
        model.next_logits(batch[:, :1], state)
    assert (nll - exact).abs().max() < 0.2


def test_learned_positions_reset_with_isolated_documents_and_end_at_their_table(tokens):
    model, batch = build("A", positions="learned", max_positions=8), tokens(1, 12)
    doc = torch.tensor([[0] * 6 + [1] * 6])
    model(batch, doc)
    for bad in ({"isolation": "none", "doc_id_BT": doc}, {}):
        with pytest.raises(UserError, match="position 11 with learned positions"):
            model(batch, **bad)
    _, state = model(batch[:, :8], None, model.initial_state())
    with pytest.raises(UserError, match="position 8"):
        model(batch[:, :1], None, state)


def test_the_meta_device_allocates_nothing():
    model = LanguageModel(ModelConfig(pattern="(AMG)9", width=4096, heads=32), 100_000, device="meta")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "heads = 5"),
        ({"heads": None}, "no number of heads"),
        ({"kv_heads": 3}, "kv_heads = 3"),
        ({"heads": 64}, "head dimension of 1"),
        ({"mamba_head_dim": 48}, "mamba_head_dim = 48"),
        ({"positions": "learned"}, "without `max_positions`"),
        ({"conv": 40}, "model.conv = 40"),
        ({"mixers": {"A": {"head": 2}}}, "unknown key `model.mixers.A.head`"),
        ({"mixers": {"B": {"positions": "nope"}}}, "mixers.B has no mixer"),
        ({"mixers": {"B": {"mixer": "attentive"}}}, "mixers.B.mixer: no mixer is called 'attentive'"),
        ({"pattern": ["AM"]}, "model.pattern: the list"),
        ({"mixers": {"[AM]": {"heads": 2}}}, "mixers.[AM]"),
        ({"mixers": {"AM": {"mixer": "attention"}}}, "mixers.AM"),
        ({"pattern": "[AM]", "heads": 5}, "heads = 5"),
        ({"embedding_multiplier": 0}, "model.embedding_multiplier = 0"),
        ({"mixers": {"A": {"positions": "learned"}}}, "mixers.A.positions = 'learned'"),
        ({"widht": 3}, "unknown key `model.widht`"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.parse({"pattern": "AM", **SMALL, **settings}, "model")
    assert message in str(caught.value)


def test_letters_may_be_bound_to_other_settings(tokens):
    config = ModelConfig.parse(
        {"pattern": "ABM", **SMALL, "mixers": {"B": {"mixer": "attention", "positions": "nope"}, "M": {"state": 8}}},
        "model",
    )
    model = LanguageModel(config, 50)
    kinds = [block.mixer for block in model.blocks]
    assert [kind.name for kind in kinds] == ["attention", "attention", "mamba2"]
    assert [kinds[0].settings.positions, kinds[1].settings.positions] == ["rope", "nope"]
    assert kinds[2].settings.state == 8
    assert config.describe_mixers() == "2 attention, 1 mamba2"
    assert ModelConfig.parse(config.model_dump(mode="json"), "model") == config
    model(tokens(1, 5))


def test_the_embedding_multiplier_scales_what_enters_the_layers_and_not_the_tied_head(tokens):
    plain, scaled = build("AM"), build("AM", embedding_multiplier=3.0)
    assert torch.equal(plain.embedding.weight, scaled.embedding.weight)
    batch = tokens(1, 12)
    with torch.no_grad():
        expected = scaled(batch)[0]
        plain.embedding.weight.mul_(3.0)
        entered = plain(batch)[0]
        state, steps = scaled.initial_state(), []
        for part in batch.split(1, 1):
            hidden, state = scaled(part, None, state)
            steps.append(hidden)
    torch.testing.assert_close(entered, expected)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=0)
    assert torch.equal(scaled.logits(expected), expected @ build("AM").embedding.weight.T)


def test_wrong_shapes_are_refused(tokens):
    with pytest.raises(UserError, match="doc_id of shape"):
        build("A")(tokens(2, 5), torch.zeros(2, 4))
