"""What prompts of a call share is computed once, and nobody can tell from the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines import prefix_tree
from longspan.engines.base import Engine, Sampling
from longspan.engines.native import NativeEngine
from longspan.engines.prefix_tree import Fork, shared_tokens, walk
from longspan.models.language_model import LanguageModel

GREEDY = Sampling(max_new_tokens=6, stop_at_boundary=False)
DRAWN = Sampling(max_new_tokens=6, temperature=1.2, top_p=0.9, seed=2, stop_at_boundary=False)
CONTEXTS = (8_192, 16_384, 32_768, 65_536, 131_072)
SWEEP = (80, 160, 320, 400)
"""Contexts of a sweep, and prompts beside it: one of each kind goes through alone or with others of its length."""


def draw(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, length)


def cut(document: np.ndarray, context: int) -> np.ndarray:
    return np.concatenate([document[: context // 2], document[-(context // 2) :]])


def nested() -> list[np.ndarray]:
    document = draw(500, 0)
    swept = [cut(document, context) for context in SWEEP]
    return [*swept, draw(90, 1), swept[1], swept[0][:60], draw(33, 2), np.append(swept[3], 7), draw(1, 3)]


def forks(root: Fork) -> Iterator[Fork]:
    yield root
    for child in root.children:
        yield from forks(child)


def test_a_sweep_over_contexts_computes_every_common_half_once() -> None:
    document = np.arange(200_000)
    prompts = [cut(document, context) for context in CONTEXTS]
    tree = prefix_tree.prefix_tree(prompts, least=512)
    assert tree.size == 192_512
    assert shared_tokens(tree, 5) == [0, 4_096, 8_192, 16_384, 32_768]
    assert sum(map(len, prompts)) - sum(shared_tokens(tree, 5)) == tree.size


@pytest.mark.parametrize("seed", range(30))
def test_every_beginning_is_computed_once_and_every_sequence_goes_on_from_one_of_its_own(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_tree, "SHARED_SHARE", 0.0)
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 2, rng.integers(1, 9)) for _ in range(rng.integers(1, 14))]
    tree = prefix_tree.prefix_tree(sequences, least=1)
    found = list(forks(tree))
    assert sorted(leaf for fork in found for leaf in fork.leaves) == list(range(len(sequences)))
    for fork in found:
        for leaf in [*fork.leaves, *(child.sequence for child in fork.children)]:
            assert sequences[leaf][: fork.end].tolist() == sequences[fork.sequence][: fork.end].tolist()
            assert len(sequences[leaf]) > fork.end
        assert [child.start for child in fork.children] == [fork.end] * len(fork.children)
    beginnings = {tuple(each[:end].tolist()) for each in sequences for end in range(1, len(each))}
    branching = {
        each
        for each in beginnings
        if sum(tuple(s[: len(each)].tolist()) == each and len(s) > len(each) for s in sequences) > 1
    }
    alone = sum(tuple(s[:end].tolist()) not in branching for s in sequences for end in range(1, len(s) + 1))
    again = sum(end == len(s) and tuple(s.tolist()) in branching for s in sequences for end in [len(s)])
    assert tree.size == len(branching) + alone + again
    shared = shared_tokens(tree, len(sequences))
    assert sum(map(len, sequences)) - sum(shared) == tree.size
    assert all(0 <= saved < len(each) for saved, each in zip(shared, sequences, strict=True))


def test_a_beginning_that_is_not_worth_it_is_not_shared() -> None:
    head = draw(40, 0)
    some = [np.concatenate([head, draw(length, length - 599)]) for length in (600, 601)]
    assert prefix_tree.prefix_tree(some).children == ()
    assert prefix_tree.prefix_tree([each[:300] for each in some]).children[0].end == 40
    assert prefix_tree.prefix_tree([each[:300] for each in some], least=41).children == ()
    assert prefix_tree.prefix_tree([each[:300] for each in some], least=None).children == ()
    assert prefix_tree.prefix_tree([]).leaves == ()
    # What both share beyond a beginning that is not worth it counts all the same.
    longer = [np.concatenate([head, draw(400, 7), draw(300, seed)]) for seed in (8, 9)]
    tree = prefix_tree.prefix_tree([*some, *longer])
    assert [(child.start, child.end, child.leaves) for child in tree.children] == [(0, 440, (2, 3))]


def test_only_states_on_the_way_are_kept() -> None:
    alive: list[int] = [0, 0]

    class State:
        def __init__(self) -> None:
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self) -> None:
            alive[0] -= 1

    prompts = [cut(np.arange(2_000), context) for context in range(100, 1_900, 70)]
    tree = prefix_tree.prefix_tree(prompts)
    assert len(list(forks(tree))) > 10
    seen = []
    for fork, _state in walk(tree, State(), lambda before, fork, needed: State()):
        seen += fork.leaves
        del _state
    assert sorted(seen) == list(range(len(prompts)))
    # The one that is gone on from, and the one that comes of it.
    assert alive == [0, 2]


@pytest.fixture(params=["A", "M", "AMG", "llama", "mamba2", "granite", "zamba2", "sliding", "mamba"])
def engine(request: pytest.FixtureRequest, tiny_model: Callable[..., LanguageModel], tiny_engine: Any) -> Engine:
    if request.param.isupper():
        return tiny_engine(tiny_model(request.param), batch_tokens=64)  # type: ignore[no-any-return]
    return transformers_engine(request.param, request.getfixturevalue("tokenizer"))


def transformers_engine(name: str, tokenizer: Tokenizer) -> Engine:
    pytest.importorskip("transformers")
    from longspan.engines.transformers import TransformersEngine

    from .test_transformers import model

    return TransformersEngine(model(name), tokenizer, markers=True, fingerprint="f", batch_tokens=64)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_text_is_what_it_is_without_sharing(
    engine: Engine, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = nested()
    shared = engine.generate(prompts, sampling)
    assert (sum(each.shared_tokens for each in shared) > 400) == (engine.shared_tokens > 0)
    assert engine.asked_tokens == sum(map(len, prompts))
    monkeypatch.setattr(prefix_tree, "SHARED_SHARE", 1e9)
    monkeypatch.setattr(prefix_tree, "LONG_TOKENS", 1e9)
    cold = engine.generate(prompts, sampling)
    assert not any(each.shared_tokens for each in cold)
    assert [each.tokens.tolist() for each in shared] == [each.tokens.tolist() for each in cold]
    assert [each.prompt_tokens for each in shared] == list(map(len, prompts))
    if sampling == GREEDY:
        alone = [engine.generate([prompt], sampling)[0] for prompt in prompts]
        assert [each.tokens.tolist() for each in shared] == [each.tokens.tolist() for each in alone]
        for one, other in zip(shared, alone, strict=True):
            assert one.state_bytes in (None, other.state_bytes)


def test_likelihoods_are_what_they_are_without_sharing(engine: Engine) -> None:
    prefixes = nested()
    choices = [[draw(length, 50 * i + length) for length in (3, 1, 5)] for i in range(len(prefixes))]
    found = engine.score_many(prefixes, choices)
    saved = engine.shared_tokens
    for prefix, some, scored in zip(prefixes, choices, found, strict=True):
        for one, other in zip(scored, engine.score(prefix, some), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    takes_parts = isinstance(engine, NativeEngine) or engine.model.takes_parts  # type: ignore[attr-defined]
    assert (saved > 400) == takes_parts
    assert engine.shared_tokens == saved


def test_writing_and_scoring_in_one_call_is_both_and_shares_the_prompts(engine: Engine) -> None:
    prompts = nested()[:6]
    prefixes = [np.append(prompt, draw(4, 70 + i)) for i, prompt in enumerate(prompts)]
    choices = [[draw(1, 50 + i), draw(2, 60 + i)] for i in range(len(prefixes))]
    written, scores = engine.generate_and_score(prompts, GREEDY, prefixes, choices)
    saved, asked = engine.shared_tokens, engine.asked_tokens
    assert asked == sum(map(len, [*prompts, *prefixes]))
    for found, expected in zip(written, engine.generate(prompts, GREEDY), strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()
    for some, others in zip(scores, engine.score_many(prefixes, choices), strict=True):
        for one, other in zip(some, others, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    if saved:
        assert asked - saved < sum(map(len, prefixes)) < 0.6 * asked
    assert engine.generate_and_score(prompts[:1], GREEDY, [], [])[0][0].tokens.tolist() == written[0].tokens.tolist()
    assert engine.generate_and_score([], GREEDY, prefixes[:1], choices[:1])[1][0][0] == pytest.approx(
        scores[0][0], abs=1e-4
    )


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_shared_tokens_do_not_go_through_again(
    kind: str, tiny_model: Callable[..., LanguageModel], tiny_engine: Any, tokenizer: Tokenizer
) -> None:
    seen: list[int] = []
    if kind == "native":
        subject = tiny_engine(tiny_model("AM"))
        forward = subject._model.forward
        subject._model.forward = lambda t, *a, **k: (seen.append(t.numel()), forward(t, *a, **k))[1]
    else:
        subject = transformers_engine("granite", tokenizer)
        hidden = subject.model.hidden
        subject.model.hidden = lambda t, *a, **k: (seen.append(t.numel()), hidden(t, *a, **k))[1]
    prompts = [cut(draw(500, 0), context) for context in SWEEP]
    size = prefix_tree.prefix_tree(prompts).size
    assert size == sum(SWEEP) - 40 - 80 - 160
    written = subject.generate(prompts, Sampling(max_new_tokens=1, stop_at_boundary=False))
    assert sum(seen) == size
    assert [each.shared_tokens for each in written] == [0, 40, 80, 160]
    seen.clear()
    subject.score_many(prompts, [[draw(3, 5), draw(2, 6)]] * 4)
    # The last token of a prefix goes through with every continuation, padded to the longest.
    assert sum(seen) <= size - 4 + 4 * 2 * 3
    assert subject.shared_tokens == 2 * (40 + 80 + 160)
