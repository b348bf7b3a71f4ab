"""The playground without a browser: controls are set, buttons are clicked, unreadable files are answered with a sentence."""
import io
import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from PIL import Image

from daco_nb import playground as pg
from daco_nb.mllm import MLLM
from daco_nb.steering import SETTINGS, load_kit, make_methods

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "10_playground.ipynb"


@pytest.fixture(scope="module")
def kit():
    return load_kit()


@pytest.fixture
def play(kit, monkeypatch):
    "A playground whose model says which method was asked, and counts how often."
    asked = []
    def answer(mllm, method, choice, max_new_tokens):
        asked.append(getattr(method, "name", "none"))
        if not choice.question and pg.picture_of(choice) is None:
            raise ValueError("Prompt 0 is empty ('') and has no picture: there is nothing to answer")
        return f"<b>{asked[-1]}</b> says $5$ and $6$"
    def firing(mllm, kit, choice, told):
        return pg.Firing(["[picture]", "How", "$"], torch.rand(3, len(kit.sae.W_dec), generator=torch.Generator().manual_seed(0)), 2)
    monkeypatch.setattr(pg, "answer", answer)
    monkeypatch.setattr(pg, "firing", firing)
    play = pg.Playground(mllm=object(), kit=kit)
    play.asked = asked
    return play


def png(size=(40, 30), mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    return out.getvalue()


def upload(play, data, name="x.png"):
    "What a browser does when a file is chosen."
    play.upload.value = ({"name": name, "type": "image/png", "size": len(data), "content": memoryview(data), "last_modified": datetime.now(timezone.utc)},)
    return play.status.value


def test_ask(play):
    play.go.click()
    assert play.asked == ["none", "DACO (paper)", "DACO"] and not play.go.disabled
    assert "&lt;b&gt;DACO&lt;/b&gt;" in play.table.value and "<b>DACO" not in play.table.value
    assert Image.open(io.BytesIO(play.map.value)).width > 400 and Image.open(io.BytesIO(play.picture.value)).size == (256, 256)
    assert play.figure().width > 400 and "Answered in" in play.status.value


def test_sliders_ask_again_only_what_depends_on_them(play):
    play.sliders["gamma"].value = 3.0
    assert play.asked == []  # nothing was asked before
    play.go.click()
    play.asked.clear()
    play.sliders["gamma"].value = 1.0
    assert play.asked == ["DACO"] and dict(play.choice.settings)["gamma"] == 1.0
    play.sliders["paper_eta"].value = .6
    assert play.asked == ["DACO", "DACO (paper)"]
    play.sliders["gamma"].value = 3.0  # said before
    assert len(play.asked) == 2


def test_gamma_and_eta_reach_the_methods(play):
    play.sliders["gamma"].value, play.sliders["eta"].value = 1.25, .6
    found = pg.methods_of(play.kit, play.choice)
    assert found["DACO"].gamma == 1.25
    assert torch.equal(found["DACO"].label, make_methods(play.kit, {"eta": .6})["DACO"].label)
    assert not torch.equal(found["DACO"].label, make_methods(play.kit)["DACO"].label)
    assert torch.equal(found["DACO (paper)"].label, make_methods(play.kit)["DACO (paper)"].label)


def test_sliders_start_at_the_settings(play):
    assert {k: s.value for k, s in play.sliders.items()} == {k: pytest.approx(SETTINGS[k]) for k in play.sliders}


def test_switch_an_atom(play):
    play.go.click()
    play.asked.clear()
    play.find.value = "guitar"
    atom = play.found.value
    assert "guitar" in play.atoms.nearest[atom]
    names, cosines = zip(*play.kit.D.nearest(play.kit.sae.W_dec[atom], 5))
    assert all(f"{n} {c:.2f}" in play.near.value for n, c in zip(names, cosines)) and cosines[0] == pytest.approx(play.atoms.cosine[atom].item(), abs=1e-4)
    play.switch.value = "drop"
    assert play.choice.switched == ((atom, -1),) and play.asked == ["DACO (paper)", "DACO"] and f"atom {atom}" in play.hand.value
    assert all(pg.methods_of(play.kit, play.choice)[n].label[atom] == -1 for n in ("DACO", "DACO (paper)"))
    play.find.value = "7"
    assert play.found.value == 7 and play.switch.value == "as labelled"
    play.find.value = "guitar"
    assert play.switch.value == "drop"
    play.switch.value = "as labelled"
    assert play.choice.switched == () and play.hand.value == "No atom is set by hand."


def test_search_that_finds_nothing(play):
    play.find.value = "no such concept"
    assert play.found.options == () and play.switch.disabled and play.near.value == ""
    play.find.value = "99999"
    assert play.found.options == ()
    play.find.value = ""
    assert len(play.found.options) == min(12, int((play.atoms.label == -1).sum())) > 5 and not play.switch.disabled
    assert all(play.atoms.label[i] == -1 for _, i in play.found.options)


@pytest.mark.parametrize("data, why", [
    (b"", "it is empty"), (b"hello", "it is no picture"), (png((900, 900), "L")[:200], "truncated"),
    (png((9000, 9000), "1"), "9000 x 9000"), (png((20000, 20000), "1"), "exceeds limit"), (b"\0" * (pg.MOST_BYTES + 1), "scale it down"),
    (b"GIF89a\1\0\1\0", "")], ids=["empty", "text", "truncated", "many pixels", "bomb", "many bytes", "gif head"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_uploads(play, data, why):
    "The status line says what is wrong with a file; the playground goes on with what it had."
    said = upload(play, data, "my <file>.png")
    assert "cannot be shown" in said and why in said and "#b00020" in said and "my &lt;file&gt;.png" in said
    assert play.file == b"" and play.upload.value == () and play.forget.disabled  # the button counts nothing
    play.go.click()
    assert "Answered in" in play.status.value
    assert "takes the place" in upload(play, png(), "good.png")


def test_upload_and_back(play):
    upload(play, png((40, 30)))
    assert pg.picture_of(play.choice).size == (40, 30) and not play.forget.disabled
    upload(play, b"nothing")
    assert pg.picture_of(play.choice).size == (40, 30)  # the good one stays
    play.forget.click()
    assert play.file == b"" and pg.picture_of(play.choice).size == (64, 64)


def test_choices_that_cannot_be_answered(play):
    play.drawing.value = "botle"
    play.go.click()
    assert "no drawing called" in play.status.value and "#b00020" in play.status.value and not play.go.disabled
    play.drawing.value, play.words.value = "", " ".join(["so"] * 11)
    play.go.click()
    assert "at most 10" in play.status.value
    play.words.value, play.methods.value = "", ()
    play.go.click()
    assert "mark at least one" in play.status.value
    play.methods.value, play.question.value = ("none",), " "
    play.go.click()
    assert "nothing to answer" in play.status.value
    play.question.value = "What is this?"
    play.go.click()
    assert "Answered in" in play.status.value and play.picture.layout.display == "none"


def test_figure_before_anything_was_asked(play):
    with pytest.raises(ValueError, match="call ask"):
        play.figure()


def test_pure_functions(kit):
    with pytest.raises(ValueError, match="Unknown method 'DACO 2'.*choose from none, Prompting"):
        pg.methods_of(kit, pg.Choice(methods=("DACO 2",)))
    with pytest.raises(ValueError, match="There is no atom 872: choose 0 to 871"):
        pg.methods_of(kit, pg.Choice(switched=((872, 1),)))
    a, b = (pg.Choice(settings=(("gamma", g), ("eta", .4)), switched=((3, 1),)) for g in (1., 2.))
    assert pg.relevant("ActAdd", a) == pg.relevant("ActAdd", b) and pg.relevant("DACO (paper)", a) == pg.relevant("DACO (paper)", b)
    assert pg.relevant("DACO", a) != pg.relevant("DACO", b)
    c = pg.Choice(settings=(("act_strength", .7),))
    assert pg.relevant("ActAdd", c) != pg.relevant("ActAdd", pg.Choice())
    quiet = pg.Firing(["a"], torch.zeros(1, 5), 1)
    assert pg.telling(quiet) == []
    assert pg.wrapped("") == "(nothing)" and "$" not in pg.wrapped("a $ b").replace(r"\$", "")


def test_real_firing(kit):
    "Columns are the picture, the words of the question and those of the answer, with the codes of the autoencoder."
    mllm = MLLM.demo()
    for drawing, extra in (("cat", 1), ("", 0)):
        f = pg.firing(mllm, kit, pg.Choice(drawing=drawing, question="Name a fruit."), "An apple.")
        assert f.tokens[extra:f.answer] == ["Name", "a", "fruit", "."] and f.tokens[f.answer:] == ["An", "apple", "."]
        assert f.codes.shape == (len(f.tokens), len(kit.sae.W_dec)) and ((f.codes[1:] > 0).sum(1) <= kit.sae.k).all()


def test_committed_outputs_are_static():
    "The site and a plain export can't run widgets: the notebook holds figures, and no output that needs a kernel."
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    data = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
    assert sum("image/png" in d for d in data) >= 3
    assert not any("application/vnd.jupyter.widget-view+json" in d for d in data)
