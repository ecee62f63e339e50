"""Study files: overrides, variants, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.foundation.errors import UserError
from longspan.study.budget_table import budget_table
from longspan.study.expand import expand
from longspan.study.overlay import resolve_key
from longspan.study.plan import make_plan
from longspan.study.run_folder import claim_study_folder
from longspan.study.schema import load_study

SMALL = """
question: Does it unfold?
corpus: {source: synthetic, max_documents: 50}
tokenizer: {kind: byte_bpe, vocab_size: 300}
model: {width: 32, heads: 2, state: 8, mamba_head_dim: 16, mlp_width: 64}
training: {context: 32, batch_tokens: 128, tokens: 512, peak_lr: 1.0e-3}
vary: {pattern: [AA, MM], seed: [0, 1]}
probes: [perplexity]
variants:
  wide: {model: {width: 64}}
  quiet: {probes: [], vary: {seed: [7]}}
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_study_is_the_product_of_what_varies(study_file: Path) -> None:
    subjects = expand(load_study(str(study_file))).subjects
    assert [(subject.label, subject.seed) for subject in subjects] == [("AA", 0), ("AA", 1), ("MM", 0), ("MM", 1)]
    assert subjects[2].config.model.pattern == "MM"
    assert subjects[3].config.training.seed == 1
    assert subjects[0].factors == {"pattern": "AA"}


def test_overrides_set_dotted_and_short_keys_and_lists_that_vary(study_file: Path) -> None:
    study = load_study(
        str(study_file), ["training.tokens=1e3", "width=48", "pattern=AM", "vary.isolation=[full, none]"]
    )
    subjects = expand(study).subjects
    assert {subject.config.training.tokens for subject in subjects} == {1000}
    assert {subject.config.model.width for subject in subjects} == {48}
    assert {subject.label for subject in subjects} == {"AM · full", "AM · none"}


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        ("pattern=AM", ["AM"]),
        ('pattern="[AM]"', ["[AM]"]),
        ("pattern=[A]", ["A"]),
        ('pattern=["AM"]', ["AM"]),
        ("pattern=[AM, MA]", ["AM", "MA"]),
        ('vary.pattern=["[AM]2", AM]', ["[AM]2", "AM"]),
    ],
)
def test_a_pattern_is_one_of_a_list_or_one_layer_of_two_mixers(
    study_file: Path, override: str, patterns: list[str]
) -> None:
    subjects = expand(load_study(str(study_file), [override, "seed=0"])).subjects
    assert [subject.config.model.pattern for subject in subjects] == patterns


def test_arms_that_are_the_same_run_are_listed_once(study_file: Path) -> None:
    study = load_study(
        str(study_file), ["vary.isolation=[full, attention, state, none]", "pattern=[AA, MM, AM]", "seed=0"]
    )
    expansion = expand(study)
    labels = [subject.label for subject in expansion.subjects]
    assert labels == ["AA · full", "AA · none", "MM · full", "MM · none"] + [
        f"AM · {isolation}" for isolation in ("full", "attention", "state", "none")
    ]
    assert [subject.config.packing.isolation for subject in expansion.subjects[:4]] == ["full", "none", "full", "none"]
    assert any("AA has one kind of layer only" in note and "`attention` is `full`" in note for note in expansion.merged)


def test_variants_overlay_and_can_be_stacked(study_file: Path) -> None:
    subjects = expand(load_study(str(study_file), ["variant=wide,quiet"])).subjects
    assert {subject.config.model.width for subject in subjects} == {64}
    assert {subject.seed for subject in subjects} == {7}
    assert subjects[0].config.probes == {}


def test_a_variant_can_be_what_varies(study_file: Path) -> None:
    subjects = expand(load_study(str(study_file), ["vary.variant=['', wide]", "pattern=AA", "seed=0"])).subjects
    assert [subject.config.model.width for subject in subjects] == [32, 64]
    # One alone is no layer of several mixers.
    subjects = expand(load_study(str(study_file), ["vary.variant=[wide]", "pattern=AA", "seed=0"])).subjects
    assert [subject.config.model.width for subject in subjects] == [64]


def test_the_chosen_variant_lies_over_the_varied_one_and_the_command_line_over_both(study_file: Path) -> None:
    text = study_file.read_text().replace("{width: 64}", "{width: 64, mlp_width: 96, state: 16}")
    study_file.write_text(text + "  small: {model: {mlp_width: 24, state: 4}}\n")
    given = ["vary.variant=['', wide]", "variant=small", "model.state=12", "pattern=AA", "seed=0"]
    models = [subject.config.model for subject in expand(load_study(str(study_file), given)).subjects]
    assert [(model.width, model.mlp_width, model.state) for model in models] == [(32, 24, 12), (64, 24, 12)]


@pytest.mark.parametrize(
    ("override", "given", "fix"),
    [
        ("training.tokns=5", "training.tokns", "did you mean `tokens`?"),
        ("model.witdh=5", "model.witdh", "did you mean `width`?"),
        ("isolaton=full", "isolaton", "did you mean `isolation`?"),
        ("variant=wid", "'wid'", "did you mean `wide`?"),
        ("tokens", "'tokens'", "put `=`"),
    ],
)
def test_a_wrong_override_names_the_nearest_key(study_file: Path, override: str, given: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(load_study(str(study_file), [override]))
    assert given in caught.value.given
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("trainin: {}", "training"),
        ("models: {}", "model"),
        ("probe: []", "probes"),
    ],
)
def test_an_unknown_study_key_names_the_nearest(study_file: Path, line: str, nearest: str) -> None:
    study_file.write_text(f"{SMALL}\n{line}\n")
    with pytest.raises(UserError, match=f"did you mean `{nearest}`"):
        load_study(str(study_file))


def test_a_key_that_stands_twice_is_refused(study_file: Path) -> None:
    study_file.write_text(f"{SMALL}\nquestion: Twice?\n")
    with pytest.raises(UserError, match="stands twice"):
        load_study(str(study_file))


def test_an_unknown_probe_names_the_nearest(study_file: Path) -> None:
    with pytest.raises(UserError, match="perplexity"):
        expand(load_study(str(study_file), ["probes.perplexty={}"]))


def test_a_wrong_value_names_its_path(study_file: Path) -> None:
    with pytest.raises(UserError, match=r"packing\.isolation"):
        expand(load_study(str(study_file), ["isolation=ful"]))


def test_numbers_may_be_written_as_people_write_them(study_file: Path) -> None:
    study = load_study(str(study_file), ["tokens=2e6", "peak_lr=4e-4", "batch_tokens=1_024"])
    training = expand(study).subjects[0].config.training
    assert (training.tokens, training.peak_lr, training.batch_tokens) == (2_000_000, 4e-4, 1024)


def test_a_varied_setting_is_overridden_under_any_of_its_names(study_file: Path) -> None:
    subjects = expand(load_study(str(study_file), ["model.pattern=AM", "training.seed=[3]"])).subjects
    assert [(subject.label, subject.seed) for subject in subjects] == [("AM", 3)]


def test_another_source_keeps_the_path_given_beside_it_in_any_order(study_file: Path) -> None:
    for overrides in (["corpus.path=x.txt", "corpus.source=text"], ["source=text", "path=x.txt"]):
        study = load_study(str(study_file), overrides)
        assert (study.base["corpus"]["source"], study.base["corpus"]["path"]) == ("text", "x.txt")


def test_probes_can_be_replaced_as_a_list(study_file: Path) -> None:
    study = load_study(str(study_file), ["probes=[perplexity, position_curve: {length: 64}]"])
    assert list(expand(study).subjects[0].config.probes) == ["perplexity", "position_curve"]


def test_a_primary_metric_that_nothing_measures_is_refused(study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean `perplexity\.bits_per_byte`"):
        make_plan(load_study(str(study_file), ["primary=perplexity.bits_per_bite"]), tmp_path / "runs")
    with pytest.raises(UserError, match=r"did you mean `perplexity\.bits_per_byte`"):
        budget_table(load_study(str(study_file), ["primary=perplexity.bits_per_bite"]), tmp_path / "runs")


def test_no_variant_is_named_by_nothing(study_file: Path) -> None:
    study_file.write_text(SMALL + "variant: wide\n")
    assert load_study(str(study_file)).variant == "wide"
    for nothing in ("", "null"):
        assert load_study(str(study_file), [f"variant={nothing}"]).variant == ""


def test_the_folder_of_a_report_says_what_it_is_the_report_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the file in it"):
        load_study(str(tmp_path))
    (tmp_path / "report.json").write_text('{"reproduce": {"command": "longspan run quickstart width=64"}}')
    with pytest.raises(UserError, match="the report of `longspan run quickstart width=64`: name that study"):
        load_study(str(tmp_path))


def test_a_boolean_is_no_learning_rate(study_file: Path) -> None:
    with pytest.raises(UserError, match=r"training\.peak_lr = true"):
        expand(load_study(str(study_file), ["peak_lr=true"]))
    assert expand(load_study(str(study_file), ["peak_lr='2e-3'"])).subjects[0].config.training.peak_lr == 2e-3


def test_a_plugin_is_part_of_what_a_job_is(study_file: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    study_file.write_text(f"{SMALL}plugins: [mine.py]\n")
    keys = []
    for code in ("A = 1\n", "A = 2\n"):
        plugin.write_text(code)
        keys.append(make_plan(load_study(str(study_file)), tmp_path / "runs").subjects[0].train.key)
    assert keys[0] != keys[1]


def test_resolve_key_finds_the_section() -> None:
    assert resolve_key("isolation") == ("packing", "isolation")
    assert resolve_key("pattern") == ("model", "pattern")
    assert resolve_key("seed") == ("training", "seed")
    assert resolve_key("packing.method") == ("packing", "method")


@pytest.mark.parametrize("name", ["quickstart", "wikitext-baseline", "wiki-leakage"])
def test_every_shipped_study_and_variant_unfolds(name: str) -> None:
    study = load_study(name)
    assert expand(study).subjects
    for variant in study.variants:
        assert expand(load_study(name, [f"variant={variant}"])).subjects


def test_an_overlap_of_the_whole_context_is_refused_before_anything_runs(study_file: Path) -> None:
    with pytest.raises(UserError, match=r"overlap = 32"):
        expand(load_study(str(study_file), ["overlap=32"]))


def test_runs_that_are_a_file_are_refused(study_file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        claim_study_folder(load_study(str(study_file)), tmp_path / "taken" / "small")


@pytest.mark.parametrize(
    ("overrides", "given", "allowed", "fix"),
    [
        (["foo=5"], "unknown key `foo`", "docs/write-a-study.md", "remove it"),
        (["variant=x"], "no variant is called 'x'", "wide, quiet", "name one of these"),
        (["vary=5"], "override `vary`", "one varied key each", "vary.KEY=[...]"),
        (["width=[16, 32]"], "model.width = [16, 32]", "a whole number", "`vary.model.width=[...]`"),
        (["peak_lr=.inf"], "training.peak_lr = inf", "a finite number", "change"),
        (["vocab_size=100"], "vocab_size = 100", "at least 258", "raise"),
        (["positions=learned", "max_positions=8"], "model.max_positions = 8", "every token of a row", "to 32"),
        (["probes.perplexity.foo=1"], "unknown key `probes.perplexity.foo`", "stride", "remove"),
        (["state=0"], "model.state = 0", "1 or more", "change `model.state`"),
        (["probes.perplexity=3"], "probes.perplexity = 3", "a mapping", "perplexity: {"),
        (["corpus.path=x"], "`corpus.path` is no setting of the source `synthetic`", "num_documents", "text or jsonl"),
        (["study=../away"], "study = '../away'", "no slash", "rename"),
        (["study=jobs"], "study = 'jobs'", "not downloads and jobs", "rename"),
        (["study="], "study = null", "a name", "rename"),
        (["probe_context=true"], "probe_context = true", "at least 1", "change it"),
        (["probe_context=0"], "probe_context = 0", "at least 1", "change it"),
        (["question="], "has no `question`", "one sentence", "question"),
        (["tokens=[1"], "a bracket of line 1 is not closed", "a YAML value", "for the shell"),
        (["pattern=[AM]"], "override 'pattern=[AM]'", "one layer with AM side by side", """'pattern="[AM]"'"""),
        (["vary.pattern=[ AMM ]"], "[ AMM ]", "the pattern AMM", """'vary.pattern="[AMM]"'"""),
        (["model.pattern=[AM]"], "override 'model.pattern=[AM]'", "one layer", "write model.pattern=AM, or"),
        (["patterns=[*.txt]"], "`*` begins an alias", "a YAML value", """'patterns=["*.txt"]'"""),
    ],
)
def test_a_wrong_override_is_explained(
    study_file: Path, overrides: list[str], given: str, allowed: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        expand(load_study(str(study_file), overrides))
    assert given in caught.value.given
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix
    assert "study." not in caught.value.given


@pytest.mark.parametrize(
    ("text", "given", "fix"),
    [
        ("question: x\ncorpus: {source: sotu\nmodel: {}\n", "line 3", "close the bracket"),
        ("question: x\ncorpus:\n\tsource: sotu\n", "a tab where the indentation should be", "spaces"),
        ("question: what: this\n", "a second `: ` on the line", "quotes"),
        (
            "question: x\ncorpus:\n  source: sotu\n  source: text\n",
            "line 4: the key `source` stands twice, first on line 3",
            "keep one",
        ),
        ("", "holds nothing", "docs/write-a-study.md"),
        ("- a\n", "holds a list", "docs/write-a-study.md"),
        (f"{SMALL}plugins: mine.py\n", "plugins = 'mine.py'", "[FILE.py]"),
        (f"{SMALL}modl: {{}}\n", "unknown key `modl`", "did you mean `model`?"),
        (
            SMALL.replace("probes: [perplexity]", "probes: [perplexity, perplexity]"),
            "`perplexity` stands twice",
            "kind",
        ),
        (SMALL.replace("probes: [perplexity]", "probes: [{perplexity: 3}]"), "probes.perplexity = 3", "{name: ...}"),
        (SMALL.replace("vary: {pattern: [AA, MM], seed: [0, 1]}", "vary: [AA]"), "vary = ['AA']", "vary: {"),
        (SMALL.replace("wide: {model: {width: 64}}", "wide: 3"), "variants.wide = 3", "variants.wide: {"),
        (SMALL.replace("corpus: {", "corpsu: {"), "unknown key `corpsu`", "`corpus`"),
        (SMALL.replace("tokenizer: {kind: byte_bpe, vocab_size: 300}", ""), "no `tokenizer` section", "add"),
        (SMALL.replace("source: synthetic", "sorce: synthetic"), "unknown key `corpus.sorce`", "`source`"),
    ],
)
def test_a_wrong_study_file_is_explained(tmp_path: Path, text: str, given: str, fix: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        expand(load_study(str(path)))
    assert given in caught.value.given
    assert fix in caught.value.fix


def test_a_line_that_is_not_yaml_is_shown_with_its_place(study_file: Path) -> None:
    study_file.write_text("question: x\nmodel: {width: 8}}\n")
    with pytest.raises(UserError) as caught:
        load_study(str(study_file))
    assert caught.value.given.endswith("\n    model: {width: 8}}\n                     ^")


def test_a_variant_of_a_study_without_variants_is_refused_as_that(study_file: Path) -> None:
    study_file.write_text(SMALL[: SMALL.index("variants:")])
    with pytest.raises(UserError, match="this study has none"):
        load_study(str(study_file), ["variant=cpu"])


def test_several_seeds_vary_also_where_the_study_has_one(study_file: Path) -> None:
    study_file.write_text(SMALL.replace(", seed: [0, 1]", ""))
    subjects = expand(load_study(str(study_file), ["seed=[0,1,2]", "pattern=AA"])).subjects
    assert [subject.seed for subject in subjects] == [0, 1, 2]


def test_the_later_of_two_overrides_wins_also_over_a_list_that_varies(study_file: Path) -> None:
    widths = ["vary.width=[16, 32]", "width=64"]
    for overrides, wanted in ((widths, {64}), (widths[::-1], {16, 32})):
        subjects = expand(load_study(str(study_file), overrides)).subjects
        assert {subject.config.model.width for subject in subjects} == wanted


def test_steps_take_the_place_of_tokens(study_file: Path) -> None:
    training = expand(load_study(str(study_file), ["steps=7"])).subjects[0].config.training
    assert (training.steps, training.tokens) == (7, None)
    study_file.write_text(SMALL + "  short: {training: {steps: 3}}\n")
    training = expand(load_study(str(study_file), ["variant=short"])).subjects[0].config.training
    assert (training.steps, training.tokens) == (3, None)


def test_another_kind_of_tokenizer_takes_the_settings_of_the_old_one_away(study_file: Path) -> None:
    given = ["tokenizer.pretrained=gpt2.json", "tokenizer.kind=pretrained"]
    assert load_study(str(study_file), given).base["tokenizer"] == {"kind": "pretrained", "pretrained": "gpt2.json"}
