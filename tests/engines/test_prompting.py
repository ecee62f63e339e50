"""Claims about prompts: a chat template gives the ids that transformers gives, and no text becomes a special token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longspan.engines.opening import Described, describe
from longspan.engines.source import ModelSource
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import write_json

transformers = pytest.importorskip("transformers")
SPECIAL = ["<s>", "<|user|>", "<|system|>", "<|end|>", "<|bot|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>\n{% if thinking %}hm{% endif %}{% endif %}"
)
TEXTS = ["The senate asks.", " spaces around ", "two\n\nparagraphs", "it reads <|end|> and <s> here", "", "<|bot|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as hubs have them: byte-level BPE, special tokens, a start token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    rust.train_from_iterator(["The senate asks the house.\n\nThe house answers the senate.\n"] * 20, trainer)
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    place = tmp_path_factory.mktemp("chat")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT
    )
    fast.save_pretrained(place)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, eos_token_id=[3, 4],
    )  # fmt: skip
    config.save_pretrained(place)
    return place


@pytest.fixture
def told(folder: Path) -> Callable[..., Described]:
    def say(**settings: Any) -> Described:
        return describe(ModelSource.parse({"pretrained": str(folder), "engine": "transformers", **settings}, ""))

    return say


def encode(described: Described, text: str, answer_prefix: str = "") -> list[int]:
    prompting = described.prompting()
    assert prompting is not None
    return list(prompting.encode(text, answer_prefix).tolist())


def test_a_chat_template_gives_the_ids_of_transformers(told: Callable[..., Described], folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:3]:
        wanted = theirs.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert encode(told(template="chat"), text) == wanted


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prefix", ["", "It is", "<|end|>"])
def test_the_question_is_text_and_the_start_token_stands_there_once(
    told: Callable[..., Described], text: str, prefix: str
) -> None:
    found = told(template="chat")
    ids = encode(found, text, prefix)
    # <s> <|user|> … <|end|> … <|bot|> …, and no other special token, whatever the texts read like.
    assert [i for i in ids if i < len(SPECIAL)] == [0, 1, 3, 4]
    asked = ids[ids.index(1) + 1 : ids.index(3)]
    assert found.tokenizer.decode(asked) == "\n" + text.strip()
    assert found.tokenizer.decode(ids[ids.index(4) + 1 :]) == "\n" + prefix


def test_what_a_template_takes_is_passed_on(told: Callable[..., Described]) -> None:
    found = told(template="chat", system="Be brief.", template_arguments={"thinking": True})
    ids = encode(found, "Who?")
    assert ids.count(2) == 1
    assert found.tokenizer.decode(ids) == "\nBe brief.\n\nWho?\n\nhm"


def test_a_form_of_the_users_own_begins_with_the_start_token_too(told: Callable[..., Described]) -> None:
    for form in ("Q: {prompt}<|end|>A:", "<s>Q: {prompt}<|end|>A:"):
        found = told(template="custom", custom_template=form)
        ids = encode(found, "Who <s>?", " The")
        assert [i for i in ids if i < len(SPECIAL)] == [0, 3]
        assert found.tokenizer.decode(ids) == "Q: Who <s>?A: The"


def test_two_start_tokens_are_refused(told: Callable[..., Described]) -> None:
    with pytest.raises(UserError, match="two BOS"):
        encode(told(template="custom", custom_template="<s><s>{prompt}"), "Who?")


def test_a_template_must_be_said_for_a_question_by_text(told: Callable[..., Described]) -> None:
    with pytest.raises(UserError, match="no `template`") as refused:
        encode(told(), "Who?")
    assert "template: chat" in refused.value.fix
    assert told(template="raw").prompting() is None


def test_templates_that_lose_or_change_the_question_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    source = ModelSource(pretrained=str(tmp_path), engine="transformers", template="chat")
    (tmp_path / "chat_template.jinja").write_text("nothing of it")
    with pytest.raises(UserError, match="shows the question 0 times"):
        describe(source).prompting()
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] | length }}: {{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="changes what stands around"):
        encode(describe(source), "Who?")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        describe(source).prompting()


def test_the_fingerprint_holds_all_that_determines_answers(
    told: Callable[..., Described], folder: Path, tmp_path: Path
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ways = [
        told(),
        told(template="raw"),
        told(template="chat"),
        told(template="chat", system="x"),
        told(dtype="bf16"),
        told(rope_scaling=yarn),
        told(context_limit=32),
        told(arguments={"attention": "eager"}),
    ]
    assert len({str(each.fingerprint) for each in ways}) == len(ways)
    config = {**transformers.LlamaConfig.from_pretrained(folder).to_dict(), "rms_norm_eps": 1e-3}
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        for file in folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    write_json(tmp_path / "other" / "config.json", config)
    same, other = (
        describe(ModelSource(pretrained=str(tmp_path / name), engine="transformers")) for name in ("same", "other")
    )
    assert same.fingerprint == told().fingerprint
    assert other.fingerprint != told().fingerprint
    assert "transformers" in told().fingerprint["versions"]


def test_rotary_settings_set_the_context_limit(told: Callable[..., Described]) -> None:
    assert told().context_limit == 64
    assert told(context_limit=48).context_limit == 48
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found = told(rope_scaling=yarn)
    assert found.context_limit == 256
    assert found.config.rope_parameters["rope_type"] == "yarn"
    assert found.config.rope_parameters["rope_theta"] == 10_000.0
    with pytest.raises(UserError, match="rope_type"):
        _ = told(rope_scaling={"factor": 2.0}).config
    assert told().end_tokens() == {3, 4}
