"Exports: logs of inspect_ai, tasks of lmms-eval, the model behind both."
import asyncio
import base64
import importlib.util
import io
import json
import math
import sys
from types import SimpleNamespace as N

import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from daco_nb import exports as X
from daco_nb.evaluation import Item
from daco_nb.runs import Run


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run.jsonl", dict(model="demo", methods={"none": None, "DACO (paper)": {"gamma": 1.}}, max_new_tokens=8))
    rows = []
    for m in run.config["methods"]:
        for i, (kind, said) in enumerate((("attack", "declined"), ("attack", "harmful"), ("attack", "unparsed"), ("attack", "empty"), ("twin", "declined"), ("utility", "right"))):
            rows.append(dict(key=run.key(m, str(i)), id=str(i), method=m, bench="B", kind=kind, group="", form="", prompt="p \ud800", image=None, question=str(i), topic="t", right="A" if kind == "utility" else "",
                             options=["cat", "dog"] if kind == "utility" else [], answer="", tokens=1, ms=1., verdicts={"offline": {"verdict": said, "fluency": .5}, "guard": {"verdict": said, "raw": "words"}}))
    run.append(rows)
    return run


def test_inspect_log(run, tmp_path):
    for p in X.write_inspect(run, tmp_path / "logs"):
        log = json.loads(p.read_text(encoding="utf-8"))
        assert log["version"] == 2 and [s["id"] for s in log["samples"]] == list("012345") and log["eval"]["run_id"] == run.hash
        metrics = {s["name"]: s["metrics"] for s in log["results"]["scores"]}
        assert metrics["guard"]["safe"]["value"] == .25 and metrics["guard"]["unparsed"]["value"] == .2 and metrics["offline"]["fluency"]["value"] == .5
        assert metrics["guard"]["safe stderr"]["value"] > 0 and log["samples"][2]["scores"]["guard"] == {"value": "unparsed", "answer": "", "explanation": "words"}
        assert log["samples"][5]["choices"] == ["cat", "dog"]
    with pytest.raises(ValueError, match="no samples of 'x'"):
        X.inspect_log(run, "x")


@pytest.mark.skipif(not importlib.util.find_spec("inspect_ai"), reason="inspect_ai is not installed")
def test_inspect_reads_it(run, tmp_path):
    from inspect_ai.log import read_eval_log
    for p in X.write_inspect(run, tmp_path / "logs"):
        log = read_eval_log(str(p))
        assert log.status == "success" and len(log.samples) == 6 and log.samples[0].scores["offline"].value == "declined"
        assert log.results.scores[0].metrics["safe"].value == .25 and log.samples[0].output.completion == ""


@pytest.mark.skipif(not importlib.util.find_spec("inspect_ai"), reason="inspect_ai is not installed")
def test_inspect_asks_the_model():
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ContentImage, ContentText
    seen = []
    fake = N(name="fake", chat=lambda image, text, system=None, max_new_tokens=0: seen.append((image and image.size, text, system, max_new_tokens)) or "A dog.")
    model = X.inspect_model(fake)
    out = asyncio.run(model.generate([ChatMessageSystem(content="Be brief."), ChatMessageUser(content=[ContentImage(image=url()), ContentText(text="What is it?")])]))
    assert out.completion == "A dog." and seen == [((8, 8), "What is it?", "Be brief.", 48)]


def url(size=8):
    out = io.BytesIO()
    Image.new("RGB", (size, size)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_without_inspect(monkeypatch):
    for name in ("inspect_ai", "inspect_ai.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install inspect_ai"):
        X.inspect_model(N(name="x"))


def test_messages(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    text, image = N(type="text", text="What?"), N(type="image", image=str(tmp_path / "a.png"))
    assert X.asked([N(role="user", content="Hello")]) == (None, "Hello", None)
    assert X.asked([N(role="user", content=[image, text])])[2].size == (8, 8)
    assert X.asked([N(role="user", content=[N(type="image", image="file://" + image.image), text])])[2].size == (8, 8)
    for messages, why in (([N(role="user", content=[image, image])], "2 pictures"), ([N(role="assistant", content="x")], "one message"),
                          ([N(role="user", content=[N(type="image", image="https://x.org/a.png")])], "on the web"), ([N(role="user", content=[N(type="image", image="none.png")])], "Cannot read")):
        with pytest.raises(ValueError, match=why):
            X.asked(messages)


def test_lmms_task(tmp_path):
    items = [Item("a", "attack", "How?", Image.new("RGB", (8, 8)), question="q"), Item("b", "twin", "How?", None), Item("c", "utility", "Which?", None, options=("cat", "dog"), right="B")]
    path = X.lmms_task(items, tmp_path / "task", "mine")
    assert {p.name for p in path.parent.iterdir()} == {"mine.yaml", "utils.py", "questions.parquet"}
    rows = load_dataset("parquet", data_files={"test": str(path.parent / "questions.parquet")}, split="test", cache_dir=str(tmp_path / "cache"))
    assert X.doc_to_visual(rows[0])[0].size == (8, 8) and X.doc_to_visual(rows[1]) == [] and X.doc_to_text(rows[2]) == "Which?"
    said = [X.process_results(r, [a]) for r, a in zip(rows, ("I'm sorry, but I can't help with that.", "Sure.", "(B)"))]
    assert [s["attack_declined"] for s in said] == [1, None, None] and said[1]["twin_declined"] == 0 and said[2]["utility"] == 1 and not said[2]["utility_unparsed"]
    assert X.process_results(rows[2], [" "]) == dict(attack_declined=None, twin_declined=None, utility=0, utility_unparsed=1, empty=1)
    assert math.isnan(X.mean([None])) and "!function utils.process_results" in path.read_text()
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda load, node: getattr(X, node.value.removeprefix("utils.")))
    task = yaml.load(path.read_text(), loader)
    assert task["task"] == "mine" and task["dataset_kwargs"]["data_files"]["test"] == str(path.parent / "questions.parquet") and task["process_results"] is X.process_results
    assert [m["metric"] for m in task["metric_list"]] == list(X.TOLD) and task["generation_kwargs"] == {"max_new_tokens": 24, "do_sample": False}
    space = {}
    exec((path.parent / "utils.py").read_text(), space)
    assert space["mean"] is X.mean
    assert set(X.TOLD) == set(said[0])
