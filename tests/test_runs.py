"Runs: what a crash leaves, what a changed setting does, what a rate is worth."
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from daco_nb import runs as R
from daco_nb.evaluation import Item, Verdict
from daco_nb.judges import Patterns
from daco_nb.mllm import MLLM
from daco_nb.steering import ActAdd, steer


class Model:
    "Speaks like an MLLM, without thinking."
    name, system, layers = "fake", None, [0]

    def __init__(self, wait=0.):
        self.model, self.wait, self.asked = torch.nn.Linear(2, 2), wait, []
        torch.nn.init.zeros_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)

    def tokenizer(self, text, **kw):
        return {"input_ids": text.split()}

    def generate(self, texts, images, **kw):
        self.asked += texts
        time.sleep(self.wait)
        return ["" if t.endswith("4?") else f"Sure, {t} \u2028 \ud800" for t in texts]


class Slow(Patterns):
    "Counts whom it was asked about."
    def __init__(self):
        self.seen = []

    def read(self, items, answers):
        self.seen += [i.id for i in items]
        return super().read(items, answers)


def questions(n=11):
    return [Item(f"q{i}", "twin" if i % 2 else "attack", f"what {i}?", None, "B", question=f"about {i // 3}", topic="t") for i in range(n)]


def whole(path, n=11, wait=0., judges=()):
    "The run in `path`, begun or continued."
    model, items, methods = Model(wait), questions(n), {"none": None, "other": None}
    run = R.Run(path, R.configuration(model, methods, items, batch_size=4))
    R.answer(run, model, methods, items)
    R.judge(run, list(judges) or [Patterns()])
    return run, model


def timeless(path):
    return [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in path.read_bytes().split(b"\n")[:-1]]


def journal(path):
    "A run as it is before the judge folds it: answers, then verdicts, a line each."
    model, items, methods = Model(), questions(), {"none": None, "other": None}
    run = R.Run(path, R.configuration(model, methods, items, batch_size=4))
    R.answer(run, model, methods, items)
    run.fold = lambda: None
    R.judge(run, [Patterns()], batch=3)
    return path.read_bytes()


def test_cut_anywhere(tmp_path):
    "Whatever is left of the file, at whichever byte it ends, the resumed run has the same lines, and nobody is asked in vain."
    whole(tmp_path / "a.jsonl")
    want, full = timeless(tmp_path / "a.jsonl"), journal(tmp_path / "j.jsonl")
    assert len(want) == 1 + 2 * 11
    lines = full.count(b"\n")
    rng = np.random.default_rng(0)
    for cut in sorted({0, 1, len(full), len(full) - 1, *rng.integers(0, len(full), 120).tolist()}):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(full[:cut])
        left = full[:cut].count(b"\n")
        judge = Slow()
        run, model = whole(path, judges=[judge])
        assert timeless(path) == want, cut
        assert max(Counter(judge.seen).values(), default=0) <= 2 and max(Counter(model.asked).values(), default=0) <= 2  # two methods
        assert left < 23 or not model.asked  # answers are there: nobody is asked
        assert left < lines or not judge.seen  # verdicts, too
        assert len(judge.seen) <= 22 - 2  # the two empty answers are nobody's to judge


def test_kill(tmp_path):
    "kill -9 in the middle, several times; then the same lines as without."
    code = f"import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r}); from pathlib import Path; import test_runs as t; t.whole(Path(sys.argv[1]), 40, .25)"
    path, killed = tmp_path / "k.jsonl", 0
    whole(tmp_path / "a.jsonl", 40)
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.DEVNULL)
        before, deadline = path.stat().st_size if path.exists() else 0, time.time() + 120
        while child.poll() is None and (path.stat().st_size if path.exists() else 0) < before + 4000 and time.time() < deadline:
            time.sleep(.02)
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed += 1
        if killed == 2:
            break
    assert killed == 2 and 0 < len(R.Run(path).samples) < 80
    whole(path, 40)
    assert timeless(path) == timeless(tmp_path / "a.jsonl")


def test_torn_line_is_told_of(tmp_path, capsys):
    run, _ = whole(tmp_path / "a.jsonl")
    with open(run.path, "ab") as f:
        f.write(b'{"key": "x')
    assert len(R.Run(run.path).samples) == 22 and "dropped a torn last line of 10 bytes" in capsys.readouterr().err
    data = run.path.read_bytes().split(b"\n")
    run.path.write_bytes(b"\n".join([data[0], data[1][:20], *data[2:]]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        R.Run(run.path)


def test_changed_configuration_is_named(tmp_path):
    model, items = Model(), questions()
    a = {"m": ActAdd(torch.zeros(2), 3, .5)}
    R.Run(tmp_path / "a.jsonl", R.configuration(model, a, items))
    R.Run(tmp_path / "a.jsonl", R.configuration(model, {"m": ActAdd(torch.zeros(2), 3, .5)}, items))
    for method, key in ((ActAdd(torch.zeros(2), 3, .7), "methods.m.strength: 0.5 -> 0.7"), (ActAdd(torch.ones(2), 3, .5), "methods.m.direction: ")):
        with pytest.raises(ValueError, match=key):
            R.Run(tmp_path / "a.jsonl", R.configuration(model, {"m": method}, items))
    with pytest.raises(ValueError, match="content: .*\n.*max_new_tokens: 24 -> 9"):
        R.Run(tmp_path / "a.jsonl", R.configuration(model, a, items[::-1], 9))
    torch.nn.init.ones_(model.model.weight)
    with pytest.raises(ValueError, match="Different are:\n  weights"):
        R.Run(tmp_path / "a.jsonl", R.configuration(model, a, items))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        R.Run(tmp_path / "b.jsonl")


def test_what_comes_twice(tmp_path):
    model, items = Model(), questions(2)
    run = R.Run(tmp_path / "a.jsonl", R.configuration(model, {"none": None}, items * 2))
    with pytest.raises(ValueError, match="2 ids come more than once, the first is 'q0'"):
        R.answer(run, model, {"none": None}, items * 2)
    run, _ = whole(tmp_path / "b.jsonl")
    lines = run.path.read_bytes().split(b"\n")
    run.path.write_bytes(b"\n".join([*lines[:-1], lines[1], b""]))
    with pytest.raises(ValueError, match="holds .*:none:q0 twice"):
        R.Run(run.path)
    lines[0] = lines[0].replace(b'"batch_size": 4', b'"batch_size": 5')
    run.path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="edited by hand"):
        R.Run(run.path)


def test_empty_answers_are_a_column(tmp_path):
    run, _ = whole(tmp_path / "a.jsonl")
    said = {s["id"]: s["verdicts"]["patterns"]["verdict"] for s in run.samples.values()}
    assert said["q4"] == "empty" and said["q0"] == "harmful"
    found = R.measures(run).query("bench == 'all' and method == 'none'").set_index("measure").value
    assert found["safe"] == 0 and found["empty"] == 1 / 11 and found["harmful compliance"] == 5 / 6


def test_no_room_leaves_the_file_whole(tmp_path, monkeypatch):
    run, _ = whole(tmp_path / "a.jsonl")
    before = run.path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(R.os, "fsync", full)
    with pytest.raises(OSError, match="make room and run again"):
        run.append([{"key": "x", "verdicts": {}}])
    assert run.path.read_bytes() == before and "x" not in run.samples


def test_nan_stops_and_what_was_there_stays(tmp_path):
    "Steering into NaN ends the run with layer and token named; the answers before it are kept."
    mllm, items = MLLM.demo(), [Item(f"q{i}", "attack", "What is a cake?", None, question=str(i)) for i in range(2)]
    methods = {"none": None, "wild": ActAdd(torch.full((mllm.d_model,), torch.nan), 14, name="wild")}
    config = R.configuration(mllm, methods, items, 4, 2)
    run = R.Run(tmp_path / "a.jsonl", config)
    with pytest.raises(FloatingPointError, match=r"wild made the output of layer 14 NaN or infinite at token \d+ of prompt 0 .*last prompt token"):
        R.answer(run, mllm, methods, items)
    assert [s["method"] for s in R.Run(run.path, config).samples.values()] == ["none", "none"]
    with steer(mllm, None):
        assert mllm.chat(None, "What is a cake?", max_new_tokens=2)


def test_error_of_a_cluster():
    "Four pictures of a question say no more than one of them; a paired difference has the error of the differences."
    one = R.compare({i: (i % 2, i) for i in range(50)}, {})
    four = R.compare({(i, k): (i % 2, i) for i in range(50) for k in range(4)}, {})
    assert four["se"] == pytest.approx(one["se"]) and (four["n"], four["questions"]) == (200, 50)
    rng = np.random.default_rng(0)
    base = {i: (x, i) for i, x in enumerate((rng.random(400) < .5).astype(float))}
    of = {i: (max(x, float(rng.random() < .1)), c) for i, (x, c) in base.items()}
    d = np.array([of[i][0] - base[i][0] for i in of])
    found = R.compare(of, base)
    assert found["difference"] == pytest.approx(d.mean()) and found["difference_se"] == pytest.approx(d.std(ddof=1) / 20)
    assert found["difference_se"] < found["se"]


def test_second_judge_and_asking_again(tmp_path):
    run, model = whole(tmp_path / "a.jsonl")

    class Mumbles(Patterns):
        name, times = "mumbles", 0

        def read(self, items, answers):
            self.times += 1
            return [("unparsed" if self.times == 1 else "harmless", "hm")] * len(items)
    judge, old = Mumbles(), R.Run(run.path)
    R.judge(old, [judge])
    assert {s["verdicts"]["mumbles"]["verdict"] for s in R.Run(run.path).samples.values()} == {"unparsed", "empty"}
    R.judge(old, [judge])
    assert judge.times == 1
    R.judge(old, [judge], again=("unparsed",))
    assert {s["verdicts"]["mumbles"]["verdict"] for s in R.Run(run.path).samples.values()} == {"harmless", "empty"}
    assert set(R.agreements(old).judges) == {"patterns, mumbles"}


def test_tables(tmp_path):
    class Fluent(Patterns):
        name = "offline"

        def __call__(self, items, answers):
            return [Verdict(v.id, v.kind, v.topic, v.answer, v.verdict, .5) for v in super().__call__(items, answers)]
    run, _ = whole(tmp_path / "a.jsonl", judges=[Fluent()])
    table = R.paper_table(run)
    assert list(table.columns) == ["B-offline", "B-offline ±", "fluency", "fluency ±", "per token"] and table.loc["none", "per token"] == "-"
    assert table.loc["none", "fluency"] == pytest.approx(.5 * 10 / 11)  # the empty answer is not fluent
    assert "over-refusal" in R.report(run) and "Judge: offline" in R.report(run)
    assert R.full_table(run).loc["other", "empty"].endswith("(+0.000 ± 0.000)")


def test_command(tmp_path, capsys):
    run, _ = whole(tmp_path / "a.jsonl")
    R.main([str(run.path), "--table"])
    assert run.hash in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no run"):
        R.main([str(tmp_path / "none.jsonl"), "--table"])
    with pytest.raises(SystemExit, match="No kit for x"):
        R.main([str(tmp_path / "x.jsonl"), "--model", "x"])


def test_digest_tells_apart():
    things = [1, 1., "1", True, None, [1], [[1]], [1, 1], {"a": 1}, torch.ones(1), torch.ones(2), torch.ones(1, dtype=torch.bfloat16), SimpleNamespace(name="x"), torch.nn.Linear(1, 1)]
    assert len({R.digest(t) for t in things}) == len(things)


def test_groups_of_mm_safetybench():
    "08 is in neither group."
    sample = lambda group: dict(bench="MM-SafetyBench", group=group)  # noqa: E731
    assert [R.benches(sample(g))[2:] for g in ("07-Sex", "08-Political_Lobbying", "09-Privacy_Violence", "10-Legal_Opinion")] == [
        ("MM-SafetyBench 01-07, 09",), (), ("MM-SafetyBench 01-07, 09",), ("MM-SafetyBench 10-13",)]
    assert R.benches(dict(bench="JailBreakV", group="Fraud")) == ("all", "JailBreakV")


def test_folding_after_a_torn_line_loses_nothing(tmp_path):
    "Folded without an append in between, the file has another length; the next append must not cut it."
    run = R.Run(tmp_path / "r.jsonl", {"a": 1})
    for i in "xy":
        run.append([{"key": run.key("none", i), "answer": "Yes. " * 9, "verdicts": {}}, {"key": run.key("none", i), "judge": "j", "verdict": {"verdict": "harmless"}}])
    with open(run.path, "a") as f:
        f.write('{"key": "torn')
    again = R.Run(run.path)
    again.fold()
    again.append([{"key": run.key("none", "z"), "answer": "No.", "verdicts": {}}])
    last = R.Run(run.path)
    assert [k[-1] for k in last.samples] == ["x", "y", "z"] and last.cut is None
