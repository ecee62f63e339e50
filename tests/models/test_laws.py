"""The laws every pattern keeps: causality, isolation, decode = prefill = one pass, reach.

All patterns of up to three of the shipped letters, all of four over A, M and G, mixers side by side in one layer, and
twenty random ones of 8 to 24 layers. Patterns of up to two layers go through every case of a law; the others take turns
(see `turns`). Those of three and four layers, which are most, keep all laws in one test on passes that the laws share.
"""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from torch import Tensor

from longspan.foundation.randomness import numpy_generator, torch_generator
from longspan.models.mixers import registered

LETTERS = "".join(sorted(registered()))
ISOLATIONS = ("full", "attention", "state", "none")
T = 21
# Documents of a row: lengths that end inside and at the end of a chunk of 8, one of a single token, one of five tokens.
DOC = torch.tensor([0] * 8 + [1] * 1 + [2] * 7 + [3] * 5, dtype=torch.int32)


def side_by_side() -> list[str]:
    """Every pair alone and before or after a layer of one mixer, triples, and layers of pairs in a row."""
    pairs = [f"[{a}{b}]" for a, b in itertools.combinations_with_replacement(LETTERS, 2)]
    mixed = [
        LETTERS[i % len(LETTERS)] + pair if i % 2 else pair + LETTERS[i % len(LETTERS)] for i, pair in enumerate(pairs)
    ]
    around = LETTERS * 2
    triples = [f"[{around[i]}{around[i + 1]}{around[i + 3]}]" for i in range(len(LETTERS))]
    return [*pairs, *mixed, *triples, "[AM][MG][GA]", "[MA]A[AM]M", "[AMGA]"]


def random_patterns(number: int) -> list[str]:
    """8 to 24 layers of any letters, one layer in six a group."""
    generator = numpy_generator(0, "patterns")
    layers = [*LETTERS * 5, *(f"[{a}{b}]" for a, b in itertools.permutations(LETTERS, 2))][: len(LETTERS) * 6]
    return ["".join(generator.choice(layers, generator.integers(8, 25))) for _ in range(number)]


SHORT = ["".join(p) for n in (1, 2) for p in itertools.product(LETTERS, repeat=n)]
LONGER = ["".join(p) for letters, n in ((LETTERS, 3), ("AMG", 4)) for p in itertools.product(letters, repeat=n)]
PATTERNS = [
    *SHORT,
    *side_by_side(),
    *random_patterns(20),
]


def changed(tokens_BT: Tensor, where_T: Tensor) -> Tensor:
    """Other tokens where `where` holds."""
    return torch.where(where_T, (tokens_BT + 7) % 29, tokens_BT)


def run(model, tokens_BT: Tensor, doc_BT: Tensor | None, isolation="full") -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a fixed function of all logits with respect to the embedded inputs."""
    embedded: list[Tensor] = []

    def capture(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.embedding.register_forward_hook(capture)
    try:
        hidden, _ = model(tokens_BT, doc_BT, isolation=isolation)
    finally:
        handle.remove()
    logits = model.logits(hidden)
    weights = torch.randn(logits.shape, generator=torch_generator(0, "weights"))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded)
    return logits.detach(), gradient


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_token_sees_a_later_one(pattern, tiny, tokens):
    model, before = tiny(pattern), tokens(1, T)
    after = changed(before, torch.arange(T) >= 11)
    with torch.no_grad():
        first, second = (model(t)[0] for t in (before, after))
    assert torch.equal(first[:, :11], second[:, :11])
    assert not torch.equal(first[:, 11:], second[:, 11:])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_changing_one_document_leaves_every_other_untouched(pattern, tiny, tokens):
    model, before, doc = tiny(pattern), tokens(1, T), DOC[None]
    logits, gradient = run(model, before, doc)
    for document in turns(pattern, [0, 2]):
        others = document != DOC
        new_logits, new_gradient = run(model, changed(before, ~others), doc)
        assert torch.equal(logits[:, others], new_logits[:, others])
        assert torch.equal(gradient[:, others], new_gradient[:, others])
        assert not torch.equal(logits[:, ~others], new_logits[:, ~others])


def leaks(pattern: str, isolation: str) -> bool:
    """Whether some layer sees other documents at a partial isolation."""
    kinds = {registered()[letter].isolated_as for letter in pattern if letter in LETTERS}
    return bool({"attention": {"state"}, "state": {"attention"}, "none": {"state", "attention"}}[isolation] & kinds)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_partial_isolation_leaks_only_what_it_should(pattern, tiny, tokens):
    model, before, doc = tiny(pattern), tokens(1, T), DOC[None]
    after, later = changed(before, DOC == 0), DOC > 0
    for isolation in turns(pattern, list(ISOLATIONS[1:])):
        with torch.no_grad():
            first, second = (model(t, doc, isolation=isolation)[0] for t in (before, after))
        assert torch.equal(first[:, later], second[:, later]) == (not leaks(pattern, isolation)), isolation


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_and_any_chunked_prefill_equal_one_pass(pattern, tiny, tokens):
    model = tiny(pattern)
    # A deep random network magnifies rounding, above all where mixers side by side end in norms of their own.
    tolerance = 1e-5 if len(model.blocks) <= 4 else 1e-4
    generator = torch_generator(1, pattern)
    # The second row has other boundaries, so that rows of one batch close their documents at different steps.
    doc = torch.stack([DOC, DOC.flip(0) + 10])
    batch = tokens(2, T, name=pattern)
    splits = ([13] + [1] * 8, random_split(generator))
    for isolation, lengths in turns(pattern, list(itertools.product(ISOLATIONS, splits))):
        with torch.no_grad():
            whole, _ = model(batch, doc, isolation=isolation)
            state, parts = model.initial_state(), []
            for part, ids in zip(batch.split(lengths, 1), doc.split(lengths, 1), strict=True):
                hidden, state = model(part, ids, state, isolation=isolation)
                parts.append(hidden)
        assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance, (isolation, lengths)


@pytest.mark.parametrize("pattern", LONGER)
def test_three_and_four_layers_keep_every_law(pattern, tiny, tokens):
    model, before, doc, generator = tiny(pattern), tokens(1, T, name=pattern), DOC[None], torch_generator(1, pattern)
    # Changing one document leaves every other untouched.
    (document,) = turns(pattern, [0, 2])
    others = document != DOC
    logits, gradient = run(model, before, doc)
    new_logits, new_gradient = run(model, changed(before, ~others), doc)
    assert torch.equal(logits[:, others], new_logits[:, others])
    assert torch.equal(gradient[:, others], new_gradient[:, others])
    assert not torch.equal(logits[:, ~others], new_logits[:, ~others])
    (isolation,) = turns(pattern, list(ISOLATIONS[1:]))
    with torch.no_grad():
        whole, _ = model(before, doc, isolation=isolation)
        # No token sees a later one.
        after, _ = model(changed(before, torch.arange(T) >= 11), doc, isolation=isolation)
        assert torch.equal(whole[:, :11], after[:, :11])
        assert not torch.equal(whole[:, 11:], after[:, 11:])
        # Partial isolation leaks only what it should.
        leaked, _ = model(changed(before, DOC == 0), doc, isolation=isolation)
        assert torch.equal(whole[:, DOC > 0], leaked[:, DOC > 0]) == (not leaks(pattern, isolation)), isolation
        # Chunked prefill and decode equal one pass.
        for decoded, lengths in turns(pattern, list(itertools.product((isolation, "full"), ([17, 1, 1, 1, 1], None)))):
            lengths = lengths or random_split(generator)
            state, parts = model.initial_state(), []
            for part, ids in zip(before.split(lengths, 1), doc.split(lengths, 1), strict=True):
                hidden, state = model(part, ids, state, isolation=decoded)
                parts.append(model.logits(hidden) if decoded == "full" else hidden)
            one_pass = logits if decoded == "full" else whole
            assert (torch.cat(parts, 1) - one_pass).abs().max() <= 1e-5, (decoded, lengths)


@pytest.mark.parametrize("pattern", [*LETTERS, "AMG", "[AM]G"])
@pytest.mark.parametrize("positions", ["rope", "nope", "alibi", "learned"])
def test_every_kind_of_position_decodes_like_one_pass(pattern, positions, tiny, tokens):
    model = tiny(pattern, positions=positions, max_positions=T, kv_heads=1, attention_bias=True, norm="layernorm")
    doc, batch = torch.stack([DOC, DOC.flip(0) + 10]), tokens(2, T)
    for isolation in ISOLATIONS:
        with torch.no_grad():
            whole, _ = model(batch, doc, isolation=isolation)
            state, parts = model.initial_state(), []
            for part, ids in zip(batch.split(4, 1), doc.split(4, 1), strict=True):
                hidden, state = model(part, ids, state, isolation=isolation)
                parts.append(hidden)
            assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("pattern", [*LETTERS, "AMG", "MMAG", "M[AG]"])
@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
def test_an_isolated_document_is_the_same_wherever_it_stands(pattern, positions, tiny, tokens):
    model, batch = tiny(pattern, positions=positions, max_positions=T), tokens(1, T)
    with torch.no_grad():
        packed, _ = model(batch, DOC[None])
        for document in range(4):
            own = document == DOC
            alone, _ = model(batch[:, own])
            assert (alone - packed[:, own]).abs().max() <= 1e-5


# C is a convolution and no more.
@pytest.mark.parametrize("letter", LETTERS.replace("C", ""))
def test_reach_goes_beyond_the_convolution(letter, tiny, tokens):
    model, before = tiny(letter, window=16), tokens(1, 16)
    after = changed(before, torch.arange(16) == 0)
    with torch.no_grad():
        difference = (model(before)[0] - model(after)[0]).abs()
    assert bool((difference.amax(-1)[0, 5:16] > 0).all())


def turns(pattern: str, cases: list) -> list:
    """Every case for patterns of up to two letters; longer ones and groups take one case each, drawn by their name."""
    return cases if pattern in SHORT else [cases[zlib.crc32(pattern.encode()) % len(cases)]]


def random_split(generator: torch.Generator) -> list[int]:
    """Lengths >= 1 that sum to T."""
    cuts = torch.randperm(T - 1, generator=generator)[:4].sort().values + 1
    edges = [0, *cuts.tolist(), T]
    return [b - a for a, b in itertools.pairwise(edges)]
