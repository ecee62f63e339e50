"""The `longspan` command. Nothing heavy is imported before it is needed: `longspan --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan import __version__
from longspan.commands.ending import run_to_its_end
from longspan.commands.options import (
    Debug,
    Duplicates,
    Jobs,
    Json,
    Overrides,
    RecordedRun,
    RunOnly,
    Runs,
    Select,
    StudyName,
    Subject,
)
from longspan.foundation.files import DEFAULT_RUNS
from longspan.foundation.interrupts import hear_interrupts
from longspan.foundation.machine import follows, tune_allocator

if TYPE_CHECKING:
    from longspan.study.run import Stage

app = typer.Typer(
    name="longspan",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Begin with `longspan doctor` and `longspan run quickstart`, which takes a few minutes on two cores. A "
    "command ends with 0 (done), 1 (failed), 2 (wrong use), 3 (stopped by Ctrl-C) or 130 (the same, before anything "
    "began).",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"longspan {__version__}")
        raise typer.Exit


@app.callback()
def longspan(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """At this context length and this budget: attention, a state-space model, or a hybrid?"""


@app.command()
def run(
    study: StudyName,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    jobs: Jobs = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a whole study: prepare the corpus, train, probe, report. Run again: only what is missing runs."""
    _stages(study, overrides, runs, json, "report", jobs)


@app.command()
def prepare(
    study: StudyName, overrides: Overrides = None, runs: Runs = DEFAULT_RUNS, json: Json = False, debug: Debug = False
) -> None:
    """Prepare the corpus of a study. Download, clean, deduplicate, tokenize, store."""
    _stages(study, overrides, runs, json, "prepare")


@app.command()
def train(
    study: StudyName,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    jobs: Jobs = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the subjects of a study. Its corpus is prepared, if that is missing."""
    _stages(study, overrides, runs, json, "train", jobs)


@app.command()
def probe(
    study: StudyName,
    overrides: Overrides = None,
    runs: Runs = DEFAULT_RUNS,
    jobs: Jobs = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask the trained subjects of a study. What is missing before is done."""
    _stages(study, overrides, runs, json, "probe", jobs)


@app.command()
def report(
    study: StudyName, overrides: Overrides = None, runs: Runs = DEFAULT_RUNS, json: Json = False, debug: Debug = False
) -> None:
    """Write the report of a study from its records. Trains and asks nothing."""
    from longspan.study.shipped import find_study

    find_study(study)
    from longspan.study.run import report_only

    _print_outcome(report_only(study, overrides or [], runs), json)


@app.command()
def generate(
    run: Subject,
    select: Select = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="text to continue; - reads it from stdin")
    ] = None,
    prompt_file: Annotated[str | None, typer.Option("--prompt-file", help="file to continue; - is stdin")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="write at most so many tokens")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 writes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="keep so much probability")] = 1.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="keep so many tokens")] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the draws")] = 0,
    weights: Annotated[str, typer.Option("--weights", help="best or last, of a run")] = "best",
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; default fp32")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default cuda where there is one")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="branch, tag or commit of a hub id")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with a trained run or Hugging Face weights. Text goes to stdout as it is written."""
    from longspan.commands.generate import generate as write
    from longspan.commands.generate import read_prompt
    from longspan.engines.base import Sampling
    from longspan.engines.loading import default_device, load
    from longspan.engines.run_index import parse_selectors

    sampling = Sampling.parse(
        {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
        "generate",
    )
    text = read_prompt(prompt, prompt_file)
    engine = load(
        run,
        weights=weights,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        device=device or default_device(),
        revision=revision,
        select=parse_selectors(select or []),
    )
    write(engine, text, sampling, json=json)


@app.command()
def export(
    run: RunOnly,
    to: Annotated[Path, typer.Option("--to", help="a new or empty folder")],
    select: Select = None,
    weights: Annotated[str, typer.Option("--weights", help="best or last")] = "best",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16")] = "fp32",
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="tokens that servers may show; default the training context")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="compare logits with transformers too")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a trained run as a Hugging Face folder. Stock transformers loads it; what it computes is compared."""
    from longspan.commands.export import export as write
    from longspan.commands.export import find_trained_run
    from longspan.engines.run_index import parse_selectors

    write(
        find_trained_run(run, parse_selectors(select or [])),
        to.expanduser(),
        weights=weights,  # type: ignore[arg-type]
        dtype=dtype,
        context=context,
        check=check,
        replace=force,
        json=json,
    )


@app.command()
def budget(
    study: StudyName,
    overrides: Overrides = None,
    contexts: Annotated[
        str, typer.Option("--contexts", help="where state bytes are counted, tokens")
    ] = "512,4k,32k,128k",
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", min=1, help="rows of a pretrained tokenizer that is not at hand")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a study costs before anything runs. Parameters, FLOPs, state bytes, time and match of its subjects."""
    from longspan.study.shipped import find_study

    find_study(study)
    from longspan.study.budget_table import budget_table, parse_contexts
    from longspan.study.schema import load_study
    from longspan.terminal import print_json, print_table

    where = parse_contexts(contexts)
    table = budget_table(load_study(study, overrides or []), runs, contexts=where, vocab_size=vocab_size)
    if json:
        print_json(table.to_json())
        return
    for columns, rows in table.tables():
        print_table(columns, rows)
    for note in table.notes:
        print(f"note: {note}")


@app.command()
def bench(
    patterns: Annotated[
        str | None,
        typer.Option("--patterns", help="layers, with commas; default AAAA,MMMM,AMAM, on a GPU A12,M12,(AM)6"),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option("--contexts", help="tokens, with commas; default 256,1k, on a GPU 4k,32k")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option("--parameters", help="of each model, about; default 1M, on a GPU 110M")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default cuda where there is one")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; default what is fast here")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=1, help="for all of it, about; default 60, on a GPU 240")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", min=258, help="rows of the embedding; default 2048, on a GPU 32768")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", min=1, help="of a training step; default 2048, on a GPU 32768")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=2, help="decoded after each prompt; default 16, on a GPU 64")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="measure other packages too, if installed")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure training, prefill, decoding and memory here. The last line is one JSON object."""
    tune_allocator()
    from longspan.commands.bench.run import bench as measure
    from longspan.commands.bench.setting import read_setting

    setting = read_setting(
        patterns=patterns,
        contexts=contexts,
        parameters=parameters,
        device=device,
        dtype=dtype,
        seconds=seconds,
        vocab_size=vocab_size,
        batch_tokens=batch_tokens,
        new_tokens=new_tokens,
    )
    measure(setting, peers=peers, json_only=json)


@app.command()
def rescore(
    run: RecordedRun,
    scorer: Annotated[str | None, typer.Option("--scorer", help="official, robust, earlier, first_pass, …")] = None,
    duplicates: Duplicates = "first",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score stored answers again under another rule, without a model."""
    from longspan.commands.rescore import rescore as score_again

    score_again(run, scorer, duplicates, json=json)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="files with answers", metavar="FILE...")],
    form: Annotated[str, typer.Option("--format", help="longbench, lm-eval or ssm-experiment")],
    to: Annotated[Path, typer.Option("--to", help="folder of the records; they are added to what is there")],
    subject: Annotated[
        str | None, typer.Option("--subject", help="whose answers; default from the file's name")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="tokens of prompt and reply; default from the file's name")
    ] = None,
    duplicates: Duplicates = "all",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make records of answers that were recorded elsewhere. They are scored and compared like any other."""
    from longspan.commands.import_answers import import_answers

    import_answers(files, form, to, subject=subject, context=context, duplicates=duplicates, json=json)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="folders or files with records", metavar="RUN...")],
    metric: Annotated[str | None, typer.Option("--metric", help="only this one, e.g. accuracy")] = None,
    scorer: Annotated[str | None, typer.Option("--scorer", help="which rule reads the answers")] = None,
    across: Annotated[
        bool, typer.Option("--across-contexts", help="compare each context of a subject with the others too")
    ] = False,
    duplicates: Duplicates = "first",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare subjects on the items that both answered. Paired differences, McNemar, Holm, detectable difference."""
    from longspan.commands.compare import compare as compare_runs

    compare_runs(runs, metric=metric, scorer=scorer, duplicates=duplicates, across=across, json=json)


@app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with `--model longspan`. All that follows goes to it unchanged."""
    from longspan.commands.lm_eval import run_harness

    run_harness(context.args)


@app.command()
def studies(json: Json = False, debug: Debug = False) -> None:
    """List the shipped studies and the question each one answers."""
    from longspan.study.shipped import list_studies
    from longspan.terminal import print_json, print_table

    rows = list_studies()
    if json:
        print_json({"studies": rows})
    else:
        print_table(
            ("<study", "<question", "<variants"), [(row["study"], row["question"], row["variants"]) for row in rows]
        )
        print("`longspan run STUDY`, or `longspan run STUDY variant=NAME`; what one costs: `longspan budget STUDY`")


@app.command()
def doctor(runs: Runs = DEFAULT_RUNS, json: Json = False, debug: Debug = False) -> None:
    """Show what this machine has and what extras would bring."""
    from longspan.study.environment import doctor as examine
    from longspan.terminal import print_json, print_table

    rows = examine(runs)
    if json:
        print_json({"findings": [dict(zip(("topic", "finding", "advice"), row, strict=True)) for row in rows]})
    else:
        print_table(("<", "<here", "<advice"), rows)


def _stages(study: str, overrides: list[str] | None, runs: Path, json: bool, until: Stage, jobs: int = 1) -> None:
    from longspan.study.shipped import find_study

    # A misspelt name is answered before anything heavy is imported.
    find_study(study)
    tune_allocator()
    if follows():
        from longspan.study.executors.torchrun import follow

        follow()
        return
    from longspan.study.run import run_study
    from longspan.terminal import Terminal

    with Terminal() as terminal:
        outcome = run_study(study, overrides or [], runs, until=until, terminal=terminal, side_by_side=jobs)
    _print_outcome(outcome, json)


def _print_outcome(outcome: Any, json: bool) -> None:
    from longspan.terminal import print_json, print_summary

    if json:
        print_json(outcome.to_json())
    else:
        print_summary(outcome)
    if outcome.error is not None:
        raise outcome.error


def main() -> None:
    """Entry point: exits 0 (done), 1 (failed), 2 (wrong use), 3 (stopped by Ctrl-C) or 130 (before anything began)."""
    hear_interrupts()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    run_to_its_end(app)


if __name__ == "__main__":
    main()
