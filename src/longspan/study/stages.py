"""What a job does: prepare a corpus, train a subject, ask it. Each stage reads and writes job directories only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longspan.corpus.packing import PackingConfig
from longspan.corpus.prepare import CorpusConfig, PreparedCorpus, TrainingBatches, prepare
from longspan.corpus.tasks.corpus import TaskCorpus, prepare_task
from longspan.corpus.tokenizer import TokenizerConfig
from longspan.engines.base import Engine
from longspan.engines.oracle import check_equivalence, sample_tokens
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import TRAINING, TrainedRun, describe_run
from longspan.foundation.errors import DataError, LongspanError, SubjectError
from longspan.foundation.files import sha256_file
from longspan.foundation.plugins import load_file
from longspan.foundation.progress import Progress, Report
from longspan.models.config import ModelConfig
from longspan.models.language_model import LanguageModel
from longspan.probes.base import ProbeData, make_probe
from longspan.records.store import RECORDS, Record, RecordStore
from longspan.study.asked import asked_engine, held_engine, imported_engine
from longspan.study.examined import import_model
from longspan.study.failures import failure, remembering
from longspan.study.jobs import DOWNLOADS, Job, finished_job
from longspan.training.checkpoint import read_state
from longspan.training.config import TrainingConfig
from longspan.training.loop import train
from longspan.training.ranks import ALONE, Ranks
from longspan.training.trackers import TrackingConfig, make_trackers

CORPUS = "corpus"
WORTH_SAYING = 0.1
"""Share of the prompt tokens that must have been saved for a line on the screen; the report has them all."""
ITEMS_SEED = 0
"""Items are the same for every subject and every training seed."""


Train = Callable[[Job, Path, Path, Report], dict[str, Any]]
"""How a training job is done in its folder, under the folder of all runs."""


def execute(job: Job, runs: Path, report: Report, device: str, train_with: Train | None = None) -> dict[str, Any]:
    """Do one job in its directory, unless it is done, and return its result.

    Args:
        job: what is to be done; what it needs is done.
        runs: folder of all runs.
        report: told of the progress; it may raise `Stopped`.
        device: what it runs on, e.g. `cuda:0`.
        train_with: trains in place of this process alone.

    Raises:
        SubjectError: the job failed, now or before in the same way that it would now.
    """
    if job.is_done(runs):
        return job.result(runs)
    if reason := failure(job, runs):
        raise SubjectError(reason)
    for plugin in job.details.get("plugins", ()):
        load_file(plugin)
    with job.claim(runs) as folder:
        if job.is_done(runs):
            return job.result(runs)
        with remembering(job, folder):
            if job.kind == "train" and train_with is not None:
                result = train_with(job, folder, runs, report)
            else:
                result = STAGES[job.kind](job, folder, runs, report, device)
        job.finish(folder, result)
        return result


def prepare_stage(job: Job, folder: Path, runs: Path, report: Report, device: str) -> dict[str, Any]:
    """Raw text → cleaned, deduplicated, split, tokenized shards."""
    tokenizer = TokenizerConfig.parse(job.details["tokenizer"], "tokenizer")
    settings = job.details["corpus"]
    if settings["source"] == "task":
        prepared = prepare_task(TaskCorpus.parse(settings, "corpus"), tokenizer, folder / CORPUS, report)
    else:
        corpus = CorpusConfig.parse(settings, "corpus")
        prepared = prepare(corpus, tokenizer, folder / CORPUS, runs / DOWNLOADS, report)
    vocab_size = prepared.tokenizer.vocab_size
    return {
        "tokenizer": prepared.tokenizer.name,
        "vocab_size": vocab_size,
        "splits": {
            name: {"documents": shards.num_documents, "tokens": shards.num_tokens, "bytes": shards.num_bytes}
            for name, shards in prepared.shards.items()
        },
    }


def open_corpus(folder: Path, *, verify: bool = True) -> PreparedCorpus:
    """The corpus that a finished job left; see `PreparedCorpus.open`."""
    with finished_job(folder):
        return PreparedCorpus.open(folder / CORPUS, verify=verify)


def train_stage(
    job: Job, folder: Path, runs: Path, report: Report, device: str, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Shards → weights, metrics and the cost of getting them.

    Args:
        ranks: this process among those that do this together, each on a device of its own.

    Returns:
        the job's result on rank 0; nothing on the others.
    """
    specification = job.specification
    prepared = open_corpus(runs / "jobs" / job.details["prepare"])
    vocab_size = prepared.tokenizer.vocab_size
    if vocab_size != specification["vocab_size"]:
        raise LongspanError(
            f"{job.title}: the tokenizer has {vocab_size} entries, the plan expected {specification['vocab_size']}"
        )
    how = {"graph": job.details.get("graph", "auto")}
    training = TrainingConfig.parse({**specification["training"], **how}, "training")
    packing = PackingConfig.parse(specification["packing"], "packing")
    model = LanguageModel(ModelConfig.parse(specification["model"], "model"), vocab_size, seed=training.seed)
    tracking = TrackingConfig.parse(job.details["tracking"], "tracking")
    shape = {"context": training.context, "rows": training.rows}
    # Whether there is something to validate on is found out before training.
    prepared.validation_batches(packing, **shape)
    batches: list[TrainingBatches] = []
    if ranks.is_first:
        end = None if prepared.task is None else prepared.task.vocabulary().end
        describe_run(
            folder,
            name=job.title.removeprefix("train "),
            model=specification["model"],
            tokenizer=prepared.tokenizer,
            markers=packing.markers if prepared.task is None else prepared.task.marked,
            isolation=packing.isolation,
            context=training.context,
            plugins=job.details.get("plugins", ()),
            ends=() if end is None else (end,),
        )

    def make_batches() -> TrainingBatches:
        batches.append(prepared.training_batches(packing, **shape, seed=training.seed))
        return batches[-1]

    result = train(
        model,
        training,
        make_batches=make_batches,
        validation=lambda: prepared.validation_batches(packing, **shape),
        isolation=packing.isolation,
        token_bytes=prepared.tokenizer.token_bytes,
        directory=folder / TRAINING,
        configuration={"job": job.key},
        device=device,
        report=report,
        trackers=make_trackers(tracking, job.title) if ranks.is_first else (),
        ranks=ranks,
    )
    if not ranks.is_first:
        return {}
    if not batches:
        # A process before this one wrote everything but the completion marker.
        make_batches().load_state_dict(read_state(folder / TRAINING / "checkpoints" / "last")["state"]["data"])
    weights = {
        name: sha256_file(folder / TRAINING / "checkpoints" / name / "model.safetensors")
        for name in ("best", "last")
        if (folder / TRAINING / "checkpoints" / name / "model.safetensors").exists()
    }
    return {"training": result.to_json(), "packing": batches[-1].ledger(), "weights": weights}


def import_stage(job: Job, folder: Path, runs: Path, report: Report, device: str) -> dict[str, Any]:
    """A model from elsewhere → a run's folder, so that it is asked like a trained one."""
    source = ModelSource.parse(job.details["source"], "subjects")
    import_model(source, folder, job.title.removeprefix("import "))
    run = TrainedRun.open(folder)
    return {
        "weights": {"best": run.weights_sha256()},
        **_checked(imported_engine(run, source, device), job, runs, report),
    }


def check_stage(job: Job, folder: Path, runs: Path, report: Report, device: str) -> dict[str, Any]:
    """A model that another engine runs → whether the ways of asking it agree, before any number of it is believed."""
    engine = held_engine(ModelSource.parse(job.details["source"], "subjects"), device, report)
    return {"weights": {"best": engine.fingerprint}, **_checked(engine, job, runs, report)}


def _checked(engine: Engine, job: Job, runs: Path, report: Report) -> dict[str, Any]:
    corpus = open_corpus(runs / "jobs" / job.details["prepare"])
    tokens = sample_tokens(
        next(corpus.shards[name] for name in ("test", "validation", "train") if name in corpus.shards)
    )
    checks = check_equivalence(engine, tokens, report)
    return {"oracle": [asdict(check) for check in checks], "notes": list(engine.notes)}


def probe_data(job: Job, prepared: PreparedCorpus) -> ProbeData:
    """What the items of a probe job are drawn from."""
    if "test" not in prepared.shards:
        raise DataError("the corpus has no test split", "a test split for the probes", "raise corpus.splits.test")
    return ProbeData(
        shards=prepared.shards["test"],
        tokenizer=prepared.tokenizer,
        context=job.specification["context"],
        trained_context=job.specification["trained_context"],
        packing=PackingConfig.parse(job.specification["packing"], "packing"),
        seed=ITEMS_SEED,
        task=prepared.task,
    )


def probe_stage(job: Job, folder: Path, runs: Path, report: Report, device: str) -> dict[str, Any]:
    """A subject and a probe → records, appended batch by batch; known records are not asked again."""
    specification = job.specification
    name, label, seed = job.details["name"], job.details["subject"], specification["seed"]
    probe = make_probe(name, job.details["settings"])
    engine, weights = asked_engine(job, runs, device, report)
    data = probe_data(job, open_corpus(runs / "jobs" / job.details["prepare"]))
    items = probe.items(data)
    protocol = probe.protocol()
    before = engine.asked_tokens, engine.shared_tokens
    with RecordStore(folder / RECORDS) as store:
        missing = [item for item in items if Record.make_key(name, protocol, item.id, engine.fingerprint) not in store]
        done = len(items) - len(missing)
        report(Progress(name, done, len(items), "items"))
        for answers in probe.ask(engine, missing, data):
            store.append(
                [
                    Record.make(
                        probe=name,
                        protocol=protocol,
                        item=answer.item,
                        subject=label,
                        seed=seed,
                        fingerprint=engine.fingerprint,
                        answer=answer.content,
                        seconds=answer.seconds,
                    )
                    for answer in answers
                ]
            )
            done += len(answers)
            report(Progress(name, done, len(items), "items"))
    asked, shared = engine.asked_tokens - before[0], engine.shared_tokens - before[1]
    if shared > WORTH_SAYING * asked:
        text = f"{shared:,} of {asked:,} prompt tokens were computed once for several prompts"
        report(Progress(name, done, len(items), "items", message=text))
    return {
        "items": len(items),
        "fingerprint": engine.fingerprint,
        "weights": weights,
        "asked_tokens": asked,
        "shared_tokens": shared,
    }


STAGES: dict[str, Callable[[Job, Path, Path, Report, str], dict[str, Any]]] = {
    "prepare": prepare_stage,
    "train": train_stage,
    "import": import_stage,
    "check": check_stage,
    "probe": probe_stage,
}
