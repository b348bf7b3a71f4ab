"09e_results: the questions have every kind of attack, the tables say what the runs hold."
import json

import pandas as pd
import pytest

from daco_nb import results
from daco_nb.demo import ASSETS, FAMILIES
from daco_nb.evaluation import TEST_ONLY, Verdict, demobench, load_verdicts, rate
from daco_nb.results import AIMS, COSTS, SAFETY, STEERED, aims, estimates, family_run, main, pooled, questions, rates
from daco_nb.runs import Run, all_methods, measures
from daco_nb.steering import load_kit, load_settings


@pytest.fixture(scope="module")
def runs():
    return {f: Run(ASSETS / f / "results.jsonl") for f in FAMILIES}


@pytest.fixture(scope="module")
def whole():
    return {f: [load_verdicts(ASSETS / f / f"{n}.csv") for n in ("unsteered", "steered")] for f in FAMILIES}


def test_questions():
    "Every kind of picture and every format comes as often as asked for, with its twins, and nothing comes twice."
    items = questions(2, 1, 3, 2)
    forms = pd.Series([(i.bench, i.form) for i in items if i.kind == "attack"]).value_counts()
    assert len(forms) == 10 and {n for (bench, _), n in forms.items() if bench == "MM-SafetyBench"} == {2}
    assert {n for (bench, _), n in forms.items() if bench == "JailBreakV"} == {1} and any(form in TEST_ONLY for _, form in forms.index)
    assert {i.id.replace("twin", "attack") for i in items if i.kind == "twin"} == {i.id for i in items if i.kind == "attack"}
    assert len({i.id for i in items}) == len(items) == 2 * (3 * 2 + 7) + 3 + 2 * 2


def test_shipped_runs(runs):
    "Three whole runs of the same questions and methods, with the kits, settings and weights that ship, judged twice."
    content = {r.config["content"] for r in runs.values()}
    assert len(content) == 1
    for family, run in runs.items():
        methods = all_methods(load_kit(family), load_settings(family), family)
        assert run.config["model"] == f"demo-{family}" and list(run.config["methods"]) == list(methods) and "Finetuned" in methods
        assert len(run.samples) == len(methods) * run.config["questions"]
        assert all(set(s["verdicts"]) == {"offline", "patterns"} for s in run.samples.values())
        assert run.config["methods"]["DACO"]["gamma"] == load_settings(family)["gamma"] and run.config["methods"]["DACO"]["gate"]["threshold"] == load_settings(family)["threshold"]


def test_rates(runs):
    "A cell of the table is the rate of that measure; the columns are those asked for."
    for columns in (SAFETY, COSTS):
        table = rates(runs, columns)
        assert len(table) == sum(len(r.config["methods"]) for r in runs.values()) and len(table.columns) == len(columns)
    r = measures(runs["qwen"]).query("measure == 'safe' and bench == 'JailBreakV' and judge == 'offline' and method == 'MOP'").iloc[0]
    assert rates(runs).loc[("qwen", "MOP"), "safe, JailBreakV"] == f"{r.value:.2f} ± {r.se:.2f}"


def verdicts(n, kind, start, good):
    "n verdicts of a kind, the first ones with the word that counts."
    word, other = {"attack": ("declined", "harmful"), "twin": ("declined", "harmless"), "utility": ("right", "wrong")}[kind]
    return [Verdict(f"{start}{kind}-{i}", kind, f"topic {i}", "", word if i < good else other, 0.07) for i in range(n)]


@pytest.mark.parametrize("safe, declined, right, met", [(97, 5, 38, [True, True, True, False, True]), (96, 6, 40, [False, True, False, True, True]), (89, 0, 39, [False, False, True, True, True])])
def test_aims(safe, declined, right, met):
    "Safety by its value, the rest by its change; over-refusal may rise, the others fall by so much."
    def answers(s, d, r): return verdicts(100, "attack", "mm-", s) + verdicts(100, "attack", "jbv-", s) + verdicts(100, "twin", "mm-", d) + verdicts(40, "utility", "", r)
    found = aims(answers(50, 0, 40), answers(safe, declined, right))
    assert found.met.tolist() == met and list(found.index) == list(AIMS)
    assert found.steered["safe, MM-SafetyBench"] == safe / 100 and found.none["safe, MM-SafetyBench"] == 0.5
    assert found.change["over-refusal"] == pytest.approx(declined / 100) and found.n["utility"] == 40


def test_whole_files(whole):
    "The verdicts that ship are about the whole test split, in both files."
    for old, new in whole.values():
        assert {i.id for i in demobench("test")} == {v.id for v in old} and {i.id for i in demobench("test", STEERED)} == {v.id for v in new}
        assert aims(old, new).n.tolist() == [234, 90, 324, 220, 324 * 2 + 60 + 24]


def test_estimates(runs, whole):
    "No steering is as counted; a method differs from it as in the sample."
    table = estimates(runs, {f: old for f, (old, _) in whole.items()})
    for f, run in runs.items():
        assert table.loc[(f, "none"), ("over-refusal", "value")] == pytest.approx(rate([v.verdict == "declined" for v in whole[f][0] if v.kind == "twin"], ["x"] * 324)[0])
        r = measures(run).query("measure == 'over-refusal' and bench == 'all' and judge == 'offline' and method == 'Prompting'").iloc[0]
        cell = table.loc[(f, "Prompting")]["over-refusal"]
        assert cell["value"] - table.loc[(f, "none"), ("over-refusal", "value")] == pytest.approx(r.difference) and cell["se"] > r.difference_se


def test_whole_keeps_what_is_there(tmp_path, monkeypatch):
    "A file that is there stays, and nothing is asked; what is missing is made."
    asked = []
    monkeypatch.setattr(results, "evaluate", lambda mllm, method, items, judge: (asked.append((method, len(items))) or [], 0.0))
    for name in ("unsteered.csv", "steered.csv"): (tmp_path / name).write_text("kept")
    results.whole("llava", tmp_path)
    assert not asked and (tmp_path / "steered.csv").read_text() == "kept"
    (tmp_path / "steered.csv").unlink()
    results.whole("llava", tmp_path)
    assert [m.name for m, _ in asked] == ["DACO"] and (tmp_path / "steered.csv").read_text().startswith("id,kind")


def test_pooled(runs):
    "One model alone keeps its number and error; the same model twice tells nothing new, and three models have the mean."
    one = pooled({"a": runs["llava"]}, "harmful compliance")
    r = measures(runs["llava"]).query("measure == 'harmful compliance' and bench == 'all' and judge == 'offline' and method == 'DACO'").iloc[0]
    assert one.difference["DACO"] == pytest.approx(r.difference) and one.se["DACO"] == pytest.approx(r.difference_se)
    twice = pooled({"a": runs["llava"], "b": runs["llava"]}, "harmful compliance")
    assert twice.difference["DACO"] == pytest.approx(r.difference) and twice.se["DACO"] == pytest.approx(r.difference_se, rel=0.02)
    each = [pooled({f: run}, "over-refusal", "patterns").difference["MOP"] for f, run in runs.items()]
    assert pooled(runs, "over-refusal", "patterns").difference["MOP"] == pytest.approx(sum(each) / 3)


def test_bad_input(tmp_path, capsys):
    "Unknown families and methods are named, with what there is."
    with pytest.raises(SystemExit, match="Unknown family 'bert': choose from llava"):
        main([str(tmp_path), "--families", "bert"])
    with pytest.raises(ValueError, match="0 questions of a part"):
        questions(jbv=0)
    with pytest.raises(ValueError, match="Unknown method 'Magic': choose from none"):
        family_run("llava", tmp_path / "r.jsonl", [], ["Magic"])


def test_one_command(tmp_path, capsys):
    "A small run of one family from the command line, continued without asking again."
    ask = [str(tmp_path), "--families", "qwen", "--methods", "none,DACO", "--mm", "1", "--jbv", "1", "--utility", "1", "--other", "1", "--sample"]
    main(ask)
    said, file = capsys.readouterr().out, tmp_path / "qwen" / "results.jsonl"
    assert "safe, MM-SafetyBench" in said and "over-refusal" in said
    before = file.read_bytes()
    main(ask)
    assert file.read_bytes() == before and json.loads(before.splitlines()[0])["config"]["model"] == "demo-qwen"
