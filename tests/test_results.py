"09e_results: the questions have every kind of attack, the tables say what the runs hold."
import json

import pandas as pd
import pytest

from daco_nb.demo import ASSETS, FAMILIES
from daco_nb.evaluation import TEST_ONLY
from daco_nb.results import AIMS, COSTS, SAFETY, aims, family_run, main, pooled, questions, rates
from daco_nb.runs import Run, all_methods, measures
from daco_nb.steering import load_kit, load_settings


@pytest.fixture(scope="module")
def runs():
    return {f: Run(ASSETS / f / "results.jsonl") for f in FAMILIES}


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
        assert len(table) == sum(len(r.config["methods"]) for r in runs.values()) and len(table.columns) == len(columns) + 1
    r = measures(runs["qwen"]).query("measure == 'safe' and bench == 'JailBreakV' and judge == 'offline' and method == 'MOP'").iloc[0]
    assert rates(runs).loc[("qwen", "MOP"), "safe, JailBreakV"] == f"{r.value:.2f} ± {r.se:.2f}"


def test_aims(runs):
    "An aim is met exactly if the measured number is on its side of the bound."
    for run in runs.values():
        found = aims(run)
        assert set(AIMS) < set(found.index)
        for what, r in found.iterrows():
            below = what.startswith(("over-refusal", "safe, behind"))
            assert r.met == (r.measured <= r.aim if below else r.measured >= r.aim), what
    strictest = aims(runs["llava"], "none")
    assert strictest.measured["utility, change"] == 0 and strictest.met["over-refusal, change"]


def test_pooled(runs):
    "One model alone keeps its number; a second, less sure one moves it by little."
    one = pooled({"a": runs["llava"]}, "harmful compliance")
    r = measures(runs["llava"]).query("measure == 'harmful compliance' and bench == 'all' and judge == 'offline' and method == 'DACO'").iloc[0]
    assert one.difference["DACO"] == pytest.approx(r.difference) and one.se["DACO"] == pytest.approx(r.difference_se)
    both = pooled({"a": runs["llava"], "b": runs["llava"]}, "harmful compliance")
    assert both.difference["DACO"] == pytest.approx(r.difference) and both.se["DACO"] == pytest.approx(r.difference_se / 2**0.5)


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
    ask = [str(tmp_path), "--families", "qwen", "--methods", "none,DACO", "--mm", "1", "--jbv", "1", "--utility", "1", "--other", "1"]
    main(ask)
    said, file = capsys.readouterr().out, tmp_path / "qwen" / "results.jsonl"
    assert "safe, MM-SafetyBench" in said and "over-refusal, change" in said
    before = file.read_bytes()
    main(ask)
    assert file.read_bytes() == before and json.loads(before.splitlines()[0])["config"]["model"] == "demo-qwen"
