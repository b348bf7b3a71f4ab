"Baselines: answering again, finetuning, several methods at once; and one concept switched."
from dataclasses import replace

import pytest
import torch

from daco_nb import baselines as B
from daco_nb import specificity as S
from daco_nb.demo import by_name, scene
from daco_nb.evaluation import demobench
from daco_nb.mllm import LAST, MLLM, TEXT
from daco_nb.steering import ActAdd, Prompting, load_kit, make_methods, steer
from daco_nb.stimuli import DemoCorpus, load_stimuli


@pytest.fixture(scope="module")
def mllm():
    return MLLM.demo()


@pytest.fixture(scope="module")
def kit():
    return load_kit()


class Fake:
    "Answers what it was asked, so that questions can be read."
    system, layers, name = None, [0], "fake"

    def __init__(self):
        self.asked = []

    def intervene(self, edits):
        from contextlib import nullcontext
        return nullcontext()

    def generate(self, texts, images=None, **kw):
        images = images or [None] * len(texts)
        self.asked.append((texts, images, kw))
        return [f"<{t.splitlines()[0]}{'+' if im else ''}>" for t, im in zip(texts, images)]


def bad(texts, answers):
    return ["bad" in t for t in texts]


def test_requery_asks_only_the_harmful_again():
    fake = Fake()
    with steer(fake, B.Requery(bad, "reminder")):
        said = fake.generate(["good", "bad", "fine"], ["i", "j", None], max_new_tokens=3)
    assert said == ["<good+>", "<bad+>", "<fine>"] and "generate" not in vars(fake)
    again = fake.asked[1]
    assert again[0] == [f"bad\n{B.REMINDER}"] and again[1] == ["j"] and again[2] == {"max_new_tokens": 3, "system": None, "batch_size": 16}
    with steer(fake, B.Requery(lambda t, a: [False] * len(t))):
        fake.asked.clear()
        fake.generate(["bad"], ["i"])
    assert len(fake.asked) == 1


def test_requery_without_the_picture():
    fake = Fake()
    with steer(fake, B.Requery(bad)):
        said = fake.generate(["bad one", "good", "bad two"], ["i", "j", None])
    assert fake.asked[1][:2] == ([B.DESCRIBE], ["i"]) and fake.asked[2][1] == [None, None]
    assert fake.asked[2][0][0].startswith(f"A picture is described like this: <{B.DESCRIBE}+>\nbad one") and fake.asked[2][0][1].startswith("bad two")
    assert said[1] == "<good+>"


def test_requery_leaves_nothing_behind():
    fake = Fake()
    with pytest.raises(KeyError), steer(fake, B.Joint([B.Requery(bad), B.Requery(bad, "reminder")], "two")):
        raise KeyError
    assert "generate" not in vars(fake)


def test_joint_is_both(mllm):
    one, two, both = (ActAdd(torch.ones(mllm.d_model), l, .3) for l in (3, 5, 3))
    ask = dict(image=scene(0, 1, (by_name()["pizza"],)).image, text="What is it?", max_new_tokens=8)
    with steer(mllm, B.Joint([one, two, both], "j")):
        a = mllm.chat(**ask)
    with steer(mllm, one), steer(mllm, two), steer(mllm, both):
        assert mllm.chat(**ask) == a
    j = B.Joint([Prompting("Be kind."), one, Prompting("Be brief.")], "p")
    assert j.system == "Be kind.\nBe brief." and B.Joint([one], "x").system is None and set(B.Joint([one, two], "x").edits(mllm)) == {3, 5}


def test_finetuning_learns_and_comes_off(mllm):
    "A few steps on a few lessons: the loss falls, the model declines while it is on, and is as before afterwards."
    data = [(*B.train_case(i, False, 5), "I'm sorry, but I can't help with that.") for i in range(2)]
    before = mllm.chat(data[0][0], data[0][1], max_new_tokens=6)
    weights = [p.clone() for p in list(mllm.model.parameters())[-4:]]
    lora, losses = B.finetune(mllm, data, steps=16, batch=2, lr=1e-2, first=24)
    assert losses[-1] < .5 * losses[0] and all(v.requires_grad is False for v in lora.values())
    with steer(mllm, B.Finetuned(lora)):
        assert "sorry" in mllm.chat(data[0][0], data[0][1], max_new_tokens=6)
    assert mllm.chat(data[0][0], data[0][1], max_new_tokens=6) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, list(mllm.model.parameters())[-4:]))
    fresh = B.fresh(mllm, 4, range(len(mllm.layers)), torch.Generator())
    assert sum(v.numel() for v in fresh.values()) * 2 < 1.5e6  # bytes in half precision
    with steer(mllm, B.Finetuned(fresh)):
        assert mllm.chat(data[0][0], data[0][1], max_new_tokens=6) == before
    with pytest.raises(ValueError, match="does not fit"), steer(mllm, B.Finetuned({"0.q_proj.A": torch.zeros(4, 9), "0.q_proj.B": torch.zeros(9, 4)})):
        pass


def test_lessons_are_of_the_train_split():
    "No test or validation topic, and no test or validation wording."
    other = {i.topic for split in ("validation", "test") for i in demobench(split, ("attack", "twin"))} | {i.text for split in ("validation", "test") for i in demobench(split, ("attack",))}
    asks = {B.train_case(i, twin, 5)[1] for i in range(0, 400, 7) for twin in (False, True)}
    assert not asks & other and not any(t in a for a in asks for t in other if len(t) > 12)


def test_ablations_change_one_thing(mllm, kit):
    rows = B.ablations(mllm, kit)
    full = rows["DACO"]
    assert rows["none"] is None and rows["no gate"].gate is None and rows["atoms only"].behaviour is None and not rows["behaviour only"].label.any()
    assert rows["MOP, question too"].roles == (TEXT, LAST, *full.roles[1:]) and rows["gate hears single words"].gate.window == 1
    assert rows["no gate"].gamma == full.gamma and len(rows) == len({id(m) for m in rows.values()})
    names = B.make_baselines(make_methods(kit), bad, None)
    assert list(names) == ["Requery (caption)", "Requery (reminder)", "DACO + Requery"]


def test_kits_of_several_layers(mllm, kit, tmp_path):
    stimuli, labels = load_stimuli(), kit.labels()
    names = [next(c for c in stimuli["concept"] if labels.get(c) == word) for word in ("undesirable", "desirable")]
    some = stimuli.select([i for i, c in enumerate(stimuli["concept"]) if c in names])
    kits = B.read_kits(mllm, kit, [13, 14], tmp_path, some.select(range(0, len(some), 3)), steps=5, k=2, corpus=DemoCorpus())
    with pytest.raises(ValueError, match="need their corpus"):
        B.read_kits(mllm, kit, [13, 14], tmp_path, some)
    assert [k.D.layer for k in kits] == [13, 14] and kits[0].D.names == kits[1].D.names
    for name in ("MOP", "DACO"):
        joint = B.jointly(kits, name, {})
        assert {13, 14} <= set(joint.edits(mllm)) and joint.name == f"{name}, layers 13+14"
        with steer(mllm, joint):
            mllm.chat(None, "What is a cake?", max_new_tokens=2)
    with pytest.raises(ValueError, match="Unknown method 'ActAdd'"):
        B.jointly(kits, "ActAdd", {})


def test_switch(kit):
    label = S.switch(kit, "dog", "DACO").label
    assert label.sum() < 0 and set(label.tolist()) == {0., -1.} and S.switch(kit, "dog", "DACO", 2.).label.max() == 1
    assert S.switch(kit, "dog", "MOP").undesirable.sum() == 1
    with pytest.raises(ValueError, match="MOP takes concepts away"):
        S.switch(kit, "dog", "MOP", 1.)
    with pytest.raises(ValueError, match="Unknown method 'x'"):
        S.switch(kit, "dog", "x")
    with pytest.raises(KeyError, match="unicornish"):
        S.switch(kit, "unicornish", "DACO")
    with pytest.raises(ValueError, match="No drawing is called"):
        S.pictures_of("unicornish", 1)


def test_switch_moves_its_own_entry_most(mllm, kit):
    "On every ruler the switched entry moves further than the mean of the others."
    kit = S.calibrate(mllm, replace(kit), ["dog", "pizza"], 2)
    pictures = S.pictures_of("dog", 2)
    before = S.codes(kit, S.content(mllm, kit, pictures))
    for method in ("ActAdd", "MOP", "DACO"):
        after = S.codes(kit, S.content(mllm, kit, pictures, S.switch(kit, "dog", method)))
        own, others = S.moved(before["projections"], after["projections"], torch.tensor([kit.D.row("dog")]))
        assert own.mean() < 0 and abs(own.mean()) > others.mean(), method
    after = S.codes(kit, S.content(mllm, kit, pictures, S.switch(kit, "dog", "DACO")))
    own, _ = S.moved(before["atoms"], after["atoms"], S.atoms_of(kit, "dog"))
    assert own.mean() < 0
