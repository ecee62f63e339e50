"""A written folder computes in stock transformers what the model computes here: whole, cached, padded, generating."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.engines.base import Sampling
from longspan.engines.native import NativeEngine
from longspan.models.interchange import read_folder, read_tokenizer, write_folder
from longspan.models.language_model import LanguageModel

from .conftest import CASES, CONTEXT, TINY, batch, build, case, logits

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LENGTH = 75
CALLS = (20, 33, *[1] * 22)
"""A prompt, more of it that begins inside a chunk, and tokens one by one."""
WITHOUT_CACHE = {"MM"}
"""GraniteMoeHybrid without attention: transformers 5.23 asks its cache for keys that it does not have."""


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def theirs(model, tokens_BT, *lengths):
    if not lengths:
        return model(input_ids=tokens_BT).logits
    parts, cache = [], {}
    for part_BT in tokens_BT.split(list(lengths), dim=1):
        out = model(input_ids=part_BT, use_cache=True, **cache)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        cache = {name: out[name]}
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def assert_close(ours, others):
    assert others.abs().max() > 3
    assert (ours - others).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_logits_and_cached_logits_are_those_of_transformers(name, written):
    model, other = case(name), load(written(name))
    assert type(other).__name__ == CASES[name][0]
    tokens_BT = batch(2, LENGTH)
    expected = theirs(other, tokens_BT)
    assert_close(logits(model, tokens_BT), expected)
    assert_close(logits(model, tokens_BT, *CALLS), expected)
    if name not in WITHOUT_CACHE:
        # Mamba-1 of transformers starts from an empty state wherever a call has several tokens.
        calls = (53, *CALLS[2:]) if name.startswith("m") else CALLS
        assert_close(theirs(other, tokens_BT, *calls), expected)


@pytest.mark.parametrize("name", ["AA", "MAM", "MM", "MM bare", "mm", "MAMA bare"])
def test_padding_on_the_left_changes_nothing(name, written):
    other, tokens_BT = load(written(name)), batch(2, 30)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, :11] = 0
    with torch.no_grad():
        padded = other(input_ids=tokens_BT, attention_mask=mask_BT).logits[1, 11:]
    assert_close(logits(case(name), tokens_BT[1:, 11:])[0], padded)


def random_patterns(count):
    draw = random.Random(5)
    while count:
        pattern = "".join(draw.choice("AM") for _ in range(draw.randint(2, 6)))
        if len(set(pattern)) == 2:
            count -= 1
            yield pattern


@pytest.mark.parametrize("pattern", list(random_patterns(10)))
def test_any_order_of_attention_and_mamba2(pattern, tmp_path):
    model = build(pattern)
    assert write_folder(model, tmp_path / "out", context=CONTEXT).architecture == "GraniteMoeHybridForCausalLM"
    other, tokens_BT = load(tmp_path / "out"), batch(2, 40)
    assert_close(logits(model, tokens_BT), theirs(other, tokens_BT))
    assert_close(logits(model, tokens_BT, 17, *[1] * 23), theirs(other, tokens_BT, 17, *[1] * 23))


def test_a_model_without_attention_says_that_it_needs_no_cache_to_generate(written, tmp_path):
    notes = write_folder(case("MM"), tmp_path / "out", context=CONTEXT).notes
    assert "use_cache: false" in " ".join(notes)
    other, tokens_BT = load(written("MM")), batch(1, 5)
    more_BT = other.generate(tokens_BT, max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert more_BT[0, -1] == logits(case("MM"), more_BT[:, :-1])[0, -1].argmax()


@pytest.mark.parametrize("name", ["AA", "MAM", "MM bare", "mm"])
def test_rounded_weights_load_as_such(name, tmp_path):
    write_folder(case(name), tmp_path / "out", context=CONTEXT, dtype=torch.bfloat16)
    assert load(tmp_path / "out").dtype == torch.bfloat16
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens_BT = batch(2, 40)
    assert_close(logits(read_folder(tmp_path / "out", dtype=torch.float32), tokens_BT), theirs(other, tokens_BT))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AA", "AA without positions", "MAM", "MM", "MM bare", "mm", "MAMA bare", "AA bare"])
def test_200_tokens_of_text_are_the_same(name, tmp_path):
    texts = [f"The {noun} {verb} the other {noun}." for noun in ("senate", "house") for verb in ("asks", "answers")]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=270, min_frequency=1), texts)
    config = case(name).config
    model = LanguageModel(config, tokenizer.vocab_size, 7)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    write_folder(model, tmp_path, context=CONTEXT, tokenizer=tokenizer, markers=True)
    read, begins = read_tokenizer(tmp_path)
    engine = NativeEngine(read_folder(tmp_path), read, markers=begins, isolation="full", fingerprint="")
    prompts = ["The senate asks the other house.", "The 🙂 <|endoftext|>"]
    sampling = Sampling(max_new_tokens=200, stop_at_boundary=False)
    expected = engine.generate([np.append(engine.document_prefix, read.encode(each)) for each in prompts], sampling)

    theirs_tokenizer, other = transformers.AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    inputs = theirs_tokenizer(prompts, return_tensors="pt", padding=True)
    other.generation_config.eos_token_id = None
    out = other.generate(**inputs, max_new_tokens=200, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert [each.tolist() for each in out] == [each.tokens.tolist() for each in expected]
    assert theirs_tokenizer.batch_decode(out, skip_special_tokens=True) == [each.text for each in expected]
    assert len({tuple(each.tokens) for each in expected}) == 2


def test_the_sizes_of_the_cases_tell_settings_apart():
    sizes = [TINY["width"], TINY["mlp_width"], TINY["state"], TINY["heads"], TINY["kv_heads"], TINY["width"] * 2]
    assert len(set(sizes)) == len(sizes)
