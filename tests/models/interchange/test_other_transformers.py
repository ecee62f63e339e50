"""The same files in the last transformers before version 5, installed for this test beside the present torch."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.models.interchange import write_folder
from longspan.models.interchange.tokenizer_files import write_tokenizer

from .conftest import CASES, CONTEXT, batch, case, logits

VERSION = "4.57.6"
NAMES = [name for name, (architecture, _) in CASES.items() if architecture != "NemotronHForCausalLM"]
"""Nemotron-H came with version 5."""
LENGTH, MORE = 53, 24

SCRIPT = """
import json, torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
job = json.load(open("job.json"))
tokens = load_file("tokens.safetensors")["tokens"]
answers = {}
for name, folder in job["folders"].items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        answers[f"{name}: logits"] = model(input_ids=tokens, use_cache=False).logits
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=job["more"], do_sample=False, eos_token_id=-1,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )
    answers[f"{name}: written"] = written.sequences
    answers[f"{name}: generated"] = torch.stack(written.logits, dim=1).float()
save_file({name: tensor.contiguous() for name, tensor in answers.items()}, "answers.safetensors")
ids = transformers.AutoTokenizer.from_pretrained("tokenizer")(job["texts"])["input_ids"]
json.dump({"version": transformers.__version__, "torch": torch.__version__, "ids": ids}, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the other transformers, and this environment's packages behind it."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip("uv is not installed here")
    place = tmp_path_factory.mktemp("other") / "venv"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, place], check=True)
    found = place / "bin" / "python"
    subprocess.run([uv, "pip", "install", "-q", "--python", found, f"transformers=={VERSION}"], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "zz_present.pth").write_text(sysconfig.get_paths()["purelib"])
    return found


@pytest.mark.slow
@pytest.mark.network
def test_the_last_version_4_computes_the_same(python: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = ["The senate asks the house.", "ünï 🙂 <|endoftext|>", ""]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=270, min_frequency=1), texts)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tokenizer, tmp_path / "tokenizer", markers=True, context=CONTEXT)
    folders = {name: str(tmp_path / str(number)) for number, name in enumerate(NAMES)}
    for name, folder in folders.items():
        write_folder(case(name), Path(folder), context=CONTEXT)
    tokens_BT = batch(2, LENGTH)
    save_file({"tokens": tokens_BT}, tmp_path / "tokens.safetensors")
    (tmp_path / "job.json").write_text(json.dumps({"folders": folders, "more": MORE, "texts": texts}))
    subprocess.run([python, "-c", SCRIPT], cwd=tmp_path, check=True)

    said, answers = json.loads((tmp_path / "said.json").read_text()), load_file(tmp_path / "answers.safetensors")
    assert said["version"] == VERSION != transformers.__version__
    assert said["torch"] == torch.__version__
    assert said["ids"] == [[tokenizer.special.boundary, *tokenizer.encode(text).tolist()] for text in texts]
    for name in NAMES:
        there = answers[f"{name}: logits"]
        present = transformers.AutoModelForCausalLM.from_pretrained(folders[name]).eval()
        with torch.no_grad():
            here = present(input_ids=tokens_BT, use_cache=False).logits
        # Version 5 adds up Mamba-2 in another order.
        assert (there - here).abs().max() <= (2e-5 if "M" in name.split()[0] else 0.0), name
        assert (logits(case(name), tokens_BT) - there).abs().max() <= 1e-4, name
        written_BT = answers[f"{name}: written"]
        assert written_BT.shape == (2, LENGTH + MORE)
        ours = logits(case(name), written_BT)[:, LENGTH - 1 : -1]
        assert (ours - answers[f"{name}: generated"]).abs().max() <= 1e-4, name
