"""The harness's own Hugging Face model (it needs `accelerate`) and ours, on the same weights: the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.lm_eval import LongspanLM
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel

PAIRS = [
    ("The senate", " asks"),
    ("The senate ", "asks"),
    ("", "The house"),
    ("The sen", "ate asks"),
    ("x " * 80, " house answers"),
    ("The house asks. ünï", " 🙂 yes"),
    ("Q\n\n", "A"),
]
TEXTS = ["The senate asks the other house. " * 12, "ünï 🙂", "The"]
PROMPTS = [
    ("The senate", {"until": ["."], "max_gen_toks": 20, "do_sample": False}),
    ("x " * 80, {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}),
]


@pytest.mark.parametrize(("pattern", "mlp"), [("A", "swiglu"), ("AM", "swiglu"), ("MM", "none")])
@pytest.mark.parametrize("markers", [False, True])
def test_answers_are_those_of_the_harness_own_model(
    pattern: str,
    mlp: str,
    markers: bool,
    tmp_path: Path,
    tiny_model: Callable[..., LanguageModel],
    tokenizer: Tokenizer,
) -> None:
    model = tiny_model(pattern, mlp=mlp)
    with torch.no_grad():
        model.embedding.weight *= 10  # so that contexts make a difference
    folder = tmp_path / "weights"
    write_folder(model, folder, context=64, tokenizer=tokenizer, markers=markers)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = HFLM(pretrained=loaded, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), max_length=64)
    ours = LongspanLM(str(folder), device="cpu")

    for (log_p, greedy), (expected, expected_greedy) in zip(
        ask(ours, "loglikelihood", PAIRS), ask(theirs, "loglikelihood", PAIRS), strict=True
    ):
        assert log_p == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    assert ask(ours, "generate_until", PROMPTS) == ask(theirs, "generate_until", PROMPTS)

    texts = [(text,) for text in TEXTS]
    rolled, expected_rolled = ask(ours, "loglikelihood_rolling", texts), ask(theirs, "loglikelihood_rolling", texts)
    if markers:
        # The harness lets the tokenizer put a marker behind the marker, and scores that too.
        assert (np.array(rolled) > np.array(expected_rolled)).all()
    else:
        np.testing.assert_allclose(rolled, expected_rolled, atol=1e-3)


def ask(model: Any, kind: Any, arguments: list[Any]) -> list[Any]:
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
    answers: list[Any] = getattr(model, kind)(requests, disable_tqdm=True)
    return answers
