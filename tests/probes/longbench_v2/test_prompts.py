"""Prompts and cuts: word for word and token for token what the official code makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.foundation.errors import DataError
from longspan.probes.longbench_v2.prompts import TEMPLATES, render, retrieved_document
from longspan.probes.longbench_v2.truncation import fit, middle_cut

ROW = {
    "_id": "1",
    "question": " Who came first? ",
    "choice_A": "the cat ",
    "choice_B": " the dog",
    "choice_C": "both",
    "choice_D": "neither\n",
    "answer": "B",
    "context": "\n The dog came in. Then the cat came.\n\n",
}
PLACES = {"$DOC$": "context", "$Q$": "question"} | {f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}


def upstream_prompt(template: str, row: dict[str, Any]) -> str:
    """Every place replaced one after the other, as the official code does it."""
    text = TEMPLATES[template]
    for place, field in PLACES.items():
        text = text.replace(place, row[field].strip())
    return text


def upstream_cut(tokenizer: Any, prompt: str, max_len: int) -> str:
    """What the official code sends to the chat template."""
    ids = tokenizer.encode(prompt)
    if len(ids) > max_len:
        ids = ids[: max_len // 2] + ids[-max_len // 2 :]
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
    return prompt


def test_the_templates_are_the_official_files() -> None:
    sizes = {"direct": 262, "cot": 212, "cot_answer": 383, "no_context": 224, "rag": 279}
    for name, size in sizes.items():
        assert len(TEMPLATES[name].encode()) == size
    assert hashlib.sha256(TEMPLATES["direct"].encode()).hexdigest() == DIRECT
    # The apostrophe is the typographic one.
    assert TEMPLATES["cot"].endswith("Let’s think step by step:")


DIRECT = hashlib.sha256(
    b"Please read the following text and answer the question below.\n\n<text>\n$DOC$\n</text>\n\n"
    b"What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
    b'Format your response as follows: "The correct answer is (insert answer here)".'
).hexdigest()


@pytest.mark.parametrize("template", ["direct", "cot", "no_context", "rag"])
def test_a_prompt_is_the_official_one(template: str) -> None:
    rendered = render(template, ROW)
    assert rendered.text == upstream_prompt(template, ROW)
    assert not rendered.differs
    if rendered.document is not None:
        first, last = rendered.document
        assert rendered.text[first:last] == "The dog came in. Then the cat came."


def test_a_document_that_looks_like_a_place_stays_as_it_is_and_is_told() -> None:
    row = {**ROW, "context": "It costs $Q$ and $C_A$."}
    rendered = render("direct", row)
    assert "It costs $Q$ and $C_A$." in rendered.text
    assert rendered.differs
    assert "It costs Who came first? and the cat." in upstream_prompt("direct", row)


def test_a_choice_that_names_an_earlier_place_changes_nothing_upstream_either() -> None:
    row = {**ROW, "choice_B": "the $Q$ of $DOC$"}
    rendered = render("direct", row)
    assert not rendered.differs
    assert rendered.text == upstream_prompt("direct", row)


def test_the_second_prompt_of_cot_holds_the_reasoning_and_no_document() -> None:
    text = render("cot_answer", ROW, reasoning=" First the dog. \n").text
    assert "The text is too long and omitted here." in text
    assert "step by step: First the dog.\n\nBased on the above" in text
    assert "The dog came in" not in text


def test_retrieved_chunks_stand_in_the_order_of_the_document() -> None:
    chunks = [{"content": "late", "c_idx": 9}, {"content": "early", "c_idx": 2}, {"content": "left out", "c_idx": 0}]
    assert retrieved_document({**ROW, "retrieved_context": chunks}, 2) == (
        "Retrieved chunk 1: early\n\nRetrieved chunk 2: late"
    )
    with pytest.raises(DataError, match="no retrieved chunks"):
        retrieved_document(ROW, 2)


@pytest.mark.parametrize("most", range(2, 12))
def test_the_cut_is_the_official_slice_at_odd_budgets_too(most: int) -> None:
    ids = list(range(10))
    expected = ids if len(ids) <= most else ids[: most // 2] + ids[-most // 2 :]
    assert middle_cut(np.array(ids), most).tolist() == expected
    assert len(expected) == min(most, 10)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """One tokenizer with a marker at the beginning: ours, and as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    texts = [render("direct", ROW).text, "The dog came in. Then the cat came. Éa déjà vu."] * 3
    trained = train_tokenizer(TokenizerConfig(vocab_size=330, min_frequency=1), texts)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(trained.tokenizer_json()))
    theirs.add_special_tokens(["<s>"])
    marker = theirs.token_to_id("<s>")
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", marker)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    theirs.save(str(path))
    ours = train_tokenizer(TokenizerConfig(pretrained=str(path), boundary="<s>"), ())
    return ours, PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>")


@pytest.mark.parametrize("room", [90, 91, 120, 121, 257, 10_000])
def test_a_cut_prompt_is_the_official_one(room: int, both: tuple[Tokenizer, Any], writing: Callable[..., Any]) -> None:
    ours, theirs = both
    row = {**ROW, "context": "The dog came in, déjà vu. " * 60}
    rendered = render("direct", row)
    fitted = fit(writing(lambda prompt: "", tokenizer=ours), rendered, room)
    assert fitted is not None
    budget = fitted.ledger.get("budget", room)
    assert fitted.text == upstream_cut(theirs, upstream_prompt("direct", row), budget)
    assert fitted.ids.tolist() == theirs.encode(fitted.text)
    assert len(fitted.ids) <= room
    # Where encoding again gives as many tokens, nothing of the budget is lost.
    assert budget == room or len(theirs.encode(upstream_cut(theirs, rendered.text, room))) > room


def test_the_ledger_counts_what_was_seen(both: tuple[Tokenizer, Any], writing: Callable[..., Any]) -> None:
    ours, _ = both
    engine = writing(lambda prompt: "", tokenizer=ours)
    document = "The dog came in. " * 60
    rendered = render("direct", {**ROW, "context": document})
    ids = ours.encode(rendered.text)
    whole = fit(engine, rendered, 10_000)
    assert whole is not None
    total = whole.ledger["doc_tokens_total"]
    assert whole.ledger["fully_visible"]
    assert whole.ledger["kept_fraction"] == 1.0
    assert abs(total - len(ours.encode(document.strip()))) <= 2
    cut = fit(engine, rendered, 200)
    assert cut is not None
    lost = len(ids) + 1 - cut.ledger["budget"]
    assert cut.ledger["doc_tokens_kept"] == total - lost
    assert not cut.ledger["fully_visible"]
    assert 0 < cut.ledger["kept_fraction"] < 1


def test_a_template_around_the_message_counts_in_the_room(
    both: tuple[Tokenizer, Any], writing: Callable[..., Any]
) -> None:
    ours, _ = both
    engine = writing(lambda prompt: "", tokenizer=ours)
    around = ours.encode("[user]"), ours.encode("[model]")
    engine.encode_prompt = lambda text, answer_prefix="": np.concatenate(
        [engine.document_prefix, around[0], ours.encode(text), around[1], ours.encode(answer_prefix)]
    )
    rendered = render("direct", {**ROW, "context": "The dog came in. " * 60})
    for prefix in ("", " The correct answer is ("):
        fitted = fit(engine, rendered, 150, prefix)
        assert fitted is not None
        assert 140 < len(fitted.ids) <= 150
        assert ours.decode(fitted.ids).startswith("[user]Please read")
        assert ours.decode(fitted.ids).endswith(f"[model]{prefix}")


def test_no_room_for_two_tokens_is_no_prompt(both: tuple[Tokenizer, Any], writing: Callable[..., Any]) -> None:
    engine = writing(lambda prompt: "", tokenizer=both[0])
    assert fit(engine, render("direct", ROW), 2) is None
