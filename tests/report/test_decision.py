from __future__ import annotations

from dataclasses import replace

from longspan.records.observation import Comparison, Measurement, Metric, Summary
from longspan.report.data import ProbeSection, ReportInput, Reproduce, SubjectFacts
from longspan.report.decision import decide, value_text

BPB = Metric("bits_per_byte", "Bits per byte", "bits/byte", "ratio", "lower")

SHARES = (("AA", 0.25), ("MM", 0.12))


def measurement(subject: str, value: float, half: float | None = 0.01) -> Measurement:
    low, high = (None, None) if half is None else (value - half, value + half)
    return Measurement("bits_per_byte", subject, None, value, low, high, 120, 1, 120)


def comparison(
    a: str, b: str, difference: float, half: float | None, p: float | None, needed: int | None
) -> Comparison:
    low, high = (None, None) if half is None else (difference - half, difference + half)
    mde = None if half is None else 1.43 * half
    return Comparison("bits_per_byte", None, a, b, difference, low, high, p, p, mde, 120, 1, needed, "paired", "")


def report(
    measurements: list[Measurement], comparisons: list[Comparison], seeds: tuple[int, ...] = (0, 1, 2)
) -> ReportInput:
    section = ProbeSection("perplexity", "Perplexity", "", (BPB,), Summary(tuple(measurements), tuple(comparisons), ()))
    subjects = [SubjectFacts(m.subject, m.subject, seeds=seeds) for m in measurements]
    return ReportInput("s", "q?", "2026", subjects, [section], Reproduce("longspan run s", ""))


def test_a_clear_winner_is_named_with_effect_size_and_interval() -> None:
    found = decide(report([measurement("AA", 1.25), measurement("MM", 1.2)],
                          [comparison("AA", "MM", 0.05, 0.006, 0.0002, None)]))  # fmt: skip
    assert found.verdict == "winner"
    assert found.answer.startswith("MM has the lowest bits per byte, 1.200 ± 0.010: −0.050 [−0.056, −0.044]")
    assert "p < 0.001" in found.answer
    assert "4.0 %" in found.answer
    assert found.groups == [["MM"], ["AA"]]


def test_a_small_bounded_difference_is_a_tie() -> None:
    found = decide(report([measurement("AA", 1.201), measurement("MM", 1.2)],
                          [comparison("AA", "MM", 0.001, 0.003, 0.5, 1_000)]))  # fmt: skip
    assert found.verdict == "tie"
    assert "within 0.33 %" in found.answer


def test_nobody_looks_best_where_all_have_the_same_value() -> None:
    found = decide(report([measurement("AA", 1.2, 0.5), measurement("MM", 1.2, 0.5)],
                          [comparison("AA", "MM", 0.0, 0.7, 1.0, None)]))  # fmt: skip
    assert found.verdict == "undecided"
    assert found.answer.endswith("cannot be decided with this data: both have 1.2 ± 0.5.")


def test_an_open_question_says_how_many_documents_would_decide_it() -> None:
    found = decide(report([measurement("AA", 1.23), measurement("MM", 1.2)],
                          [comparison("AA", "MM", 0.03, 0.05, 0.3, 681)]))  # fmt: skip
    assert found.verdict == "undecided"
    assert "cannot be decided with this data" in found.answer
    assert "would need about 690 documents; this study had 120" in found.certainty


def test_where_nothing_tells_how_many_would_decide_it_is_said_why() -> None:
    def strings(difference: float, mde: float | None) -> str:
        exactly = replace(comparison("AA", "MM", difference, 0.2, 1.0, None), mde=mde)
        asked = report([measurement("AA", 0.2 + difference), measurement("MM", 0.2)], [exactly])
        section = replace(asked.probes[0], metrics=(replace(BPB, counted="strings"),))
        return decide(replace(asked, probes=[section])).certainty

    alike = "Too few of the 120 strings differ between MM and AA to say how many more would decide. Intervals"
    assert strings(0.1, None).startswith(alike)
    assert strings(0.0, 0.3).startswith("Differences below about 0.30 bits/byte are invisible here. Intervals")


def test_no_difference_of_shares_above_all_of_them_is_spoken_of() -> None:
    exactly = replace(comparison("AA", "MM", 0.2, 0.9, 0.3, None), mde=1.39)
    asked = report([measurement("AA", 0.7), measurement("MM", 0.5)], [exactly])
    section = replace(asked.probes[0], metrics=(replace(BPB, kind="proportion", better="higher"),))
    found = decide(replace(asked, probes=[section])).certainty
    assert "no difference of shares, however large" in found
    assert " pp are invisible" not in found


def test_a_further_probe_without_a_difference_is_told_from_its_lowest_to_its_highest_value() -> None:
    share = Metric("accuracy", "Accuracy", "", "proportion", "higher")
    found = [Measurement("accuracy", name, None, value, 0.0, 0.5, 40, 1, 40) for name, value in SHARES]
    section = ProbeSection("task", "Copying", "", (share,), Summary(tuple(found), (), ()))
    asked = report([measurement("AA", 1.2), measurement("MM", 1.3)], [comparison("AA", "MM", -0.1, 0.01, 0.001, None)])
    (also,) = decide(replace(asked, probes=[*asked.probes, section])).also
    assert also.startswith("Copying: accuracy is 12 %")
    assert "(MM) to 25 %" in also


def test_leaders_that_tie_are_named_together_and_the_rest_behind_them() -> None:
    found = decide(report(
        [measurement("AA", 1.3), measurement("MM", 1.201), measurement("AM", 1.2)],
        [comparison("AA", "MM", 0.099, 0.01, 0.001, None), comparison("AA", "AM", 0.1, 0.01, 0.001, None),
         comparison("MM", "AM", 0.001, 0.01, 0.8, 50_000)],
    ))  # fmt: skip
    assert found.verdict == "tie"
    assert "AM and MM lead" in found.answer
    assert "AA is behind AM by 0.100 [0.090, 0.110]" in found.answer
    assert found.groups == [["AM", "MM"], ["AA"]]


def test_whom_the_best_one_beats_is_said_where_the_rest_is_open() -> None:
    # AA is behind both others, yet only from one of them is it told apart: nobody leads.
    found = decide(report(
        [measurement("AA", 1.3), measurement("MM", 1.25), measurement("AM", 1.2)],
        [comparison("AA", "MM", 0.05, 0.08, 0.4, 500), comparison("AA", "AM", 0.1, 0.05, 0.015, None),
         comparison("MM", "AM", 0.05, 0.06, 0.3, 400)],
    ))  # fmt: skip
    assert found.verdict == "undecided"
    told = "AM looks best at 1.200 ± 0.010, and is told apart from AA (−0.10 [−0.15, −0.05], Holm-adjusted p = 0.015)"
    assert found.answer.endswith(f"{told}, but not from MM.")
    assert "(AM against MM) would need about 400 documents" in found.certainty


def test_one_seed_is_said_to_leave_training_luck_unmeasured() -> None:
    one = decide(report([measurement("AA", 1.3)], [], seeds=(0,)))
    assert "seed to seed is unmeasured" in one.certainty
    assert "paired" not in one.certainty
    three = decide(report([measurement("AA", 1.3)], [], seeds=(0, 1, 2)))
    assert "3 seeds were trained per subject" in three.certainty


def test_missing_intervals_and_missing_results_are_said_not_hidden() -> None:
    few = replace(comparison("AA", "MM", 0.1, None, None, None), note="3 documents are too few")
    bare = decide(report([measurement("AA", 1.3, None), measurement("MM", 1.2, None)], [few]))
    assert bare.verdict == "undecided"
    assert "no interval" in bare.answer
    assert "3 documents are too few. Intervals" in bare.certainty
    assert decide(report([], [])).verdict == "nothing"
    nan = decide(report([measurement("AA", float("nan")), measurement("MM", 1.2)], []))
    assert nan.verdict == "single"


def test_the_clearest_main_effect_is_named(leakage_report: ReportInput) -> None:
    answer = decide(leakage_report).answer
    assert "the clearest factor is isolation: with full it is" in answer
    assert "lower than with none" in answer


def test_one_seed_never_decides_between_architectures() -> None:
    measured = [measurement("AA", 1.25), measurement("MM", 1.2)]
    clear = [comparison("AA", "MM", 0.05, 0.006, 0.0002, None)]
    one = decide(report(measured, clear, seeds=(0,)))
    assert one.verdict == "provisional"
    assert one.answer.startswith("In one training run each, MM has the lowest bits per byte")
    assert "seed=[0,1,2]" in one.certainty
    assert decide(report(measured, clear, seeds=(0, 1, 2))).verdict == "winner"


def test_one_run_is_a_number_without_quartiles() -> None:
    metric = Metric("first_token", "Time to first token", "ms", "median", "lower")
    one, five = (
        Measurement("first_token", "a", 8.0, value, value, value, n, 1, n) for value, n in ((5393.9, 1), (7, 5))
    )
    assert value_text(metric, one) == "5394"
    assert value_text(metric, replace(one, value=344.0)) == "344"
    assert value_text(metric, five) == "7.000 ± 0"
