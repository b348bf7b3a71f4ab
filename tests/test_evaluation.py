"Loaders of the field's benchmarks, on tiny folders of the same shape."
import csv
import json
import shutil

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from daco_nb import evaluation as E


@pytest.fixture
def mm(tmp_path):
    "A tiny folder in the shape of MM-SafetyBench: two scenarios, two questions each."
    row = {"Question": "plain?", "Changed Question": "changed?", "Key Phrase": "apples", "Phrase Type": "product",
           "Rephrased Question": "typo?", "Rephrased Question(SD)": "sd?"}
    for s in E.SCENARIOS[:2]:
        path = tmp_path / "data/processed_questions" / f"{s}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"0": row, "7": row}))
        for form in E.FORMS:
            for i in (0, 7):
                picture = tmp_path / "data/imgs" / s / form / f"{i}.jpg"
                picture.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(picture)
    return tmp_path


def test_mm_safetybench(mm):
    items = E.mm_safetybench(mm, E.SCENARIOS[:2])
    assert len(items) == 2 * 2 * 3 and len({i.id for i in items}) == 12
    assert {i.form: i.text for i in items} == {"SD": "sd?", "TYPO": "typo?", "SD_TYPO": "typo?"}
    assert all(i.kind == "attack" and i.question == "plain?" and i.names == ("apples",) and i.image.exists() for i in items)
    plain = E.mm_safetybench(mm, E.SCENARIOS[:1], ("Text_only",))
    assert [(i.text, i.image) for i in plain] == [("plain?", None)] * 2


def test_mm_safetybench_refuses(mm):
    with pytest.raises(ValueError, match="Unknown scenario '01-Weather'.*01-Illegal_Activitiy"):
        E.mm_safetybench(mm, ["01-Weather"])
    with pytest.raises(ValueError, match="kind of picture 'GIF'"):
        E.mm_safetybench(mm, forms=["GIF"])
    with pytest.raises(FileNotFoundError, match="13-Gov_Decision.json is missing"):
        E.mm_safetybench(mm, ["13-Gov_Decision"])
    shutil.rmtree(mm / "data/imgs" / E.SCENARIOS[0] / "TYPO")
    with pytest.raises(FileNotFoundError, match="2 of 6 pictures are missing"):
        E.mm_safetybench(mm, E.SCENARIOS[:1])


def write_table(path, columns):
    with open(path, "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(columns)
        for i in "34":
            w.writerow([i, "long story", "short request", "Template", "Fraud", "a.jpg", "x", "True", "y"][:len(columns)])


def test_jailbreakv(tmp_path):
    columns = ["id", "jailbreak_query", "redteam_query", "format", "policy", "image_path", "from", "selected_mini", "transfer_from_llm"]
    write_table(tmp_path / "JailBreakV_28K.csv", columns)
    with pytest.raises(FileNotFoundError, match="2 of 2 pictures"):
        E.jailbreakv(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    item, same = E.jailbreakv(tmp_path)
    assert item.id != same.id and item.id.rsplit("-", 1)[0] == same.id.rsplit("-", 1)[0]  # one text, one cluster
    assert (item.text, item.question, item.form, item.group) == ("long story", "short request", "Template", "Fraud")
    write_table(tmp_path / "JailBreakV_28K.csv", columns[:5])
    with pytest.raises(ValueError, match="no column image_path"):
        E.jailbreakv(tmp_path)


def test_mmmu(tmp_path):
    rows = [dict(id="a", question="What is in <image 1>?", options="['fox', 'red fox']", answer="B", question_type="multiple-choice", subfield="animals", image_1=Image.new("RGB", (8, 8))),
            dict(id="b", question="Why?", options="[]", answer="because", question_type="open", subfield="animals", image_1=None)]
    Dataset.from_list(rows, features=Features({k: ImageFeature() if k == "image_1" else Value("string") for k in rows[0]})).to_parquet(str(tmp_path / "t.parquet"))
    item, = E.mmmu(tmp_path / "t.parquet")
    assert item.text.startswith("What is in the picture?\n\n(A) fox\n(B) red fox\n\n") and item.image.size == (8, 8)
    assert E.judge(item, "(B)", .1).right and E.judge(item, "It is a red fox.", .1).right
    assert not E.judge(item, "(A)", .1).right and not E.judge(item, "No idea.", .1).right
    for k, answer in enumerate(("?", "", "C")):
        Dataset.from_list([rows[0] | {"answer": answer, "image_1": None}]).to_parquet(str(tmp_path / f"hidden{k}.parquet"))
        with pytest.raises(ValueError, match="whose answers are published"):
            E.mmmu(tmp_path / f"hidden{k}.parquet")
    with pytest.raises(FileNotFoundError, match="no.parquet is missing"):
        E.mmmu(tmp_path / "no.parquet")
    Dataset.from_list([{"id": "a"}]).to_parquet(str(tmp_path / "u.parquet"))
    with pytest.raises(ValueError, match="no column answer, image_1"):
        E.mmmu(tmp_path / "u.parquet")


@pytest.mark.parametrize("answer, letter", [("(C)", "C"), ("I think (A), no, (B)", "B"), ("D", "D"), ("Answer: B.", "B"), ("red fox", "B"), ("fox", "A"), ("", ""), ("nothing", "")])
def test_letters(answer, letter):
    assert E.chosen_letter(answer, ("fox", "red fox", "owl", "bee")) == letter


def test_pictures_may_be_paths(mm):
    "The model takes the items as they are, and the judge reads the answers."
    items = E.mm_safetybench(mm, E.SCENARIOS[:1], ("SD",))
    mllm = E.MLLM.demo()
    verdicts, ms = E.evaluate(mllm, None, items, E.Reader(), max_new_tokens=4)
    assert [v.id for v in verdicts] == [i.id for i in items] and ms > 0
