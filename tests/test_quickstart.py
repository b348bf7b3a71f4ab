"The console script, as a user calls it."
import json
import os
import subprocess
import sys

from daco_nb.quickstart import write_text


def call(*args, cwd):
    return subprocess.run([sys.executable, "-c", "from daco_nb.quickstart import main; main()", *args], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})


def test_quick_look(tmp_path):
    done = call("--limit", "2", "--utility", "3", "--json", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert [r["method"] for r in result["rows"]] == ["none", "Prompting", "ActAdd", "MOP", "DACO (paper)", "DACO"]
    keys = {"method", "safe_rate", "harmful_rate", "incoherent", "over_refusal", "utility", "fluency", "ms_per_token", "unparsed", "n", "se",
            "sensitive_refused", "plain_declined", "plain_twins_answered"}
    assert all(set(r) == keys and r["n"] == 2 for r in result["rows"])
    assert {"model", "rows", "config"} == set(result)
    page = (tmp_path / "quickstart_report.html").read_text()
    assert "<svg" in page and "data:image/png" in page and "DACO" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quickstart_report.html", "r.json"]


def test_unknown_model(tmp_path):
    done = call("--model", "nobody/nothing", cwd=tmp_path)
    assert done.returncode == 1
    assert "nobody/nothing" in done.stderr and "local folder" in done.stderr and "Traceback" not in done.stderr


def test_write_text_replaces_whole_files(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
