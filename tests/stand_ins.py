"""What stands in for a user's own texts, for what would come over the network, and for trained runs."""

from __future__ import annotations

import bz2
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from longspan.corpus.sources import SyntheticSource
from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.engines.run_index import ListedRun, list_runs
from longspan.engines.trained_run import TrainedRun, describe_run
from longspan.foundation.files import write_json
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.training.checkpoint import TrainingState, save_checkpoint

PATTERNS = ("AAAA", "MMMM", "AMAM")
TINY_MODEL = {"width": 16, "heads": 2, "state": 4, "mamba_head_dim": 8, "mlp_width": 16}


def stories(count: int) -> list[tuple[str, str]]:
    source = SyntheticSource(num_documents=count, min_words=80, max_words=200)
    return [(d.title, d.text) for d in source.documents(Path("unused"))]


def write_texts(path: Path) -> None:
    path.mkdir(parents=True)
    for number, (_, text) in enumerate(stories(30)):
        (path / f"{number:02d}.txt").write_text(text, encoding="utf-8")


def write_jsonl(path: Path) -> None:
    rows = [{"id": str(i), "title": title, "text": text} for i, (title, text) in enumerate(stories(30))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_wikitext(path: Path) -> None:
    articles = stories(20) if "valid" in path.name else stories(60)[30:] if "train" in path.name else stories(30)[20:]
    path.write_text("".join(f" \n = {title} = \n \n {text} \n" for title, text in articles), encoding="utf-8")


def write_dump(path: Path) -> None:
    pages = "".join(
        f"<page><title>{title}</title><ns>0</ns><id>{number}</id><revision><id>{number}</id>"
        f'<model>wikitext</model><format>text/x-wiki</format><text xml:space="preserve">{text}</text>'
        "</revision></page>"
        for number, (title, text) in enumerate(stories(30), start=1)
    )
    path.write_bytes(bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode()))


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": write_texts, "jsonl": write_jsonl, "wikitext": write_wikitext, "wikipedia": write_dump,
}  # fmt: skip


def provide(source: str, value: object) -> None:
    """Write the input that a documented path names."""
    for path in map(Path, value.values() if isinstance(value, dict) else [str(value)]):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            WRITERS[source](path)


def provide_runs(study: Path) -> None:
    """A study's folder as `longspan run quickstart` leaves it, with the runs of untrained tiny models."""
    if study.exists():
        return
    texts = [text for _, text in stories(30)]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), texts)
    listed = []
    for pattern in PATTERNS:
        model = LanguageModel(ModelConfig.parse({**TINY_MODEL, "pattern": pattern}, "model"), tokenizer.vocab_size)
        folder = study.parent / "jobs" / f"train-{pattern}"
        described = model.config.model_dump(mode="json")
        describe_run(
            folder, name=pattern, model=described, tokenizer=tokenizer, markers=True, isolation="full", context=64
        )
        save_checkpoint(folder / "training" / "checkpoints" / "best", {}, TrainingState(), model)
        write_json(folder / "training" / "result.json", {})
        listed.append(ListedRun(pattern, {"pattern": pattern}, 0, folder))
    list_runs(study, listed)


def provide_exports(folders: Iterable[str | None]) -> None:
    """The exports that a study names, as `longspan export runs/quickstart pattern=... --to FOLDER` writes them."""
    for folder in map(Path, filter(None, folders)):
        if folder.name in PATTERNS and not folder.exists():
            pytest.importorskip("transformers")
            provide_runs(Path("runs/quickstart"))
            run = TrainedRun.open(Path("runs/jobs") / f"train-{folder.name}")
            write_folder(run.load_model(), folder, tokenizer=run.tokenizer, markers=run.markers, context=64)
