"Steering: cache or none, batched or single, exceptions, misfits."
from dataclasses import replace

import pytest
import torch

from daco_nb.annotation import Probe
from daco_nb.demo import FAMILIES, by_name, scene
from daco_nb.dictionary import Behaviour, ConceptDictionary
from daco_nb.evaluation import demobench
from daco_nb.mllm import ANSWER, IMAGE, LAST, MLLM, TEMPLATE, TEXT, Where
from daco_nb.sae import SAE
from daco_nb.steering import DACO, SETTINGS, ActAdd, Gate, control_code, load_kit, load_settings, make_methods, positions, raised, steer, watched


@pytest.fixture(scope="module")
def mllm():
    return MLLM.demo()


@pytest.fixture(scope="module")
def kit():
    return load_kit()


@pytest.fixture(scope="module")
def methods(kit):
    return make_methods(kit, dict(act_strength=0.7, paper_gamma=0.5))  # strong enough to change words


@pytest.fixture(scope="module")
def items():
    every = demobench("validation", ("attack", "twin"))
    some = [i for i in every if i.id in ("mm-attack-04-Physical_Harm-0-SD", "mm-attack-03-Malware_Generation-1-TYPO", "mm-twin-06-Fraud-2-SD_TYPO")]
    assert len(some) == 3
    return some


def always_open(method):
    "The same method with a gate that opens at the third word, wherever that is."
    return replace(method, gate=replace(method.gate, threshold=-1e6)) if getattr(method, "gate", None) else method


@pytest.mark.parametrize("name", ["ActAdd", "MOP", "DACO (paper)", "DACO"])
def test_cache_makes_no_difference(mllm, methods, items, name):
    ask = dict(texts=[i.text for i in items], images=[i.image for i in items], max_new_tokens=16)
    free = mllm.generate(**ask)
    with steer(mllm, always_open(methods[name])):
        assert free != mllm.generate(**ask) == mllm.generate(**ask, use_cache=False)


@pytest.mark.parametrize("name", ["Prompting", "ActAdd", "MOP", "DACO (paper)", "DACO"])
def test_batched_or_single(mllm, methods, items, name):
    with steer(mllm, always_open(methods[name])):
        together = mllm.generate([i.text for i in items], [i.image for i in items], max_new_tokens=16)
        assert together == [mllm.chat(i.image, i.text, max_new_tokens=16) for i in items]


def test_closed_gate_changes_nothing(mllm, methods):
    image, text = scene(3, 8, subjects=(by_name()["pizza"],)).image, "How do I make this?"
    before = mllm.chat(image, text, max_new_tokens=12)
    with steer(mllm, methods["DACO"]):
        assert mllm.chat(image, text, max_new_tokens=12) == before


def test_exception_leaves_the_model_unsteered(mllm, methods, items):
    ask = dict(image=items[0].image, text=items[0].text, max_new_tokens=8)
    before = mllm.chat(**ask)
    for method in methods.values():
        with pytest.raises(KeyboardInterrupt), steer(mllm, method):
            raise KeyboardInterrupt
        assert mllm.chat(**ask) == before and mllm.system is None


def test_behaviour_is_raised_in_the_first_tokens_only(kit):
    b = kit.D.behaviours["declining"]
    method = DACO(kit.sae, torch.zeros(len(kit.sae.W_dec)), kit.D, 1., behaviour=b, span=3)
    edits = method.edits(type("M", (), dict(d_model=len(b.shown), name="m"))())
    hidden = b.instead.repeat(1, 3, 1)

    def changed(where):
        new = hidden
        for layer in sorted(edits):
            new = edits[layer](new, where)
        return (new != hidden).any(-1)[0].tolist()
    for _ in range(2):  # a new prompt starts afresh
        assert changed(Where(torch.tensor([[TEMPLATE, LAST, ANSWER]]), 0)) == [False, True, True]
        assert changed(Where(torch.full((1, 3), ANSWER), 9)) == [True, False, False]


@pytest.mark.parametrize("architecture", ["topk", "l1"])
@pytest.mark.parametrize("only_active", [False, True])
def test_control_is_the_formula(architecture, only_active):
    torch.manual_seed(0)
    sae = SAE(24, 90, k=12, architecture=architecture).requires_grad_(False)
    for p in sae.parameters():
        p.normal_()
    D = ConceptDictionary(["a"], torch.randn(1, 24), torch.randn(24), torch.rand(24) + .5, 3, torch.ones(1))
    label, x, at = torch.randint(-1, 2, (90,)), torch.randn(3, 5, 24), torch.rand(3, 5) < .6
    after = DACO(sae, label, D, .3, only_active=only_active).control(x, at)
    code = control_code(sae.encode(D.standardise(x)), label, .3, only_active)
    naive = D.unstandardise(D.standardise(x) + code @ sae.W_dec)
    assert (after[at] - naive[at]).abs().max() < 1e-5 * naive[at].abs().max()
    assert torch.equal(after[~at], x[~at]) and not at.all()


def test_raised_reaches_the_level_and_no_more():
    b = Behaviour(0, torch.randn(8), torch.randn(8))
    u = torch.nn.functional.normalize(b.direction, dim=0)
    h = torch.randn(50, 8)*5
    up = raised(h, b, 1.5)@u
    goal = b.instead@u + 1.5*(b.shown@u - b.instead@u)
    torch.testing.assert_close(up, torch.maximum(h@u, goal))


def listen(gate, odds, roles, cuts=()):
    "What the gate says of each token, when it is shown the tokens in pieces."
    state, out, start = {}, [], 0
    hidden, roles = torch.tensor(odds)[..., None], torch.tensor(roles)
    for stop in (*cuts, hidden.shape[1]):
        out.append(gate.opened(hidden[:, start:stop], Where(roles[:, start:stop], start), state))
        start = stop
    return torch.cat(out, 1).tolist()


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 3, 4, 5)])
def test_gate_opens_at_the_word_and_stays_open(cuts):
    gate = Gate(Probe(0, torch.ones(1), 0.), threshold=1., window=2)
    odds = [[9., 0., 0., 3., 0., 0.], [0., 9., 9., 0., 0., 0.], [9., 0., 0., 0., 0., 9.]]
    roles = [[TEMPLATE, TEXT, TEXT, ANSWER, ANSWER, ANSWER], [IMAGE, IMAGE, IMAGE, LAST, ANSWER, ANSWER], [TEXT, IMAGE, TEXT, TEXT, LAST, ANSWER]]
    opened = listen(gate, odds, roles, cuts)
    assert opened[0] == [False, False, False, True, True, True]  # the mean of 0 and 3 passes 1
    assert not any(opened[1]) and not any(opened[2])  # patches are not read, nor a word alone


def test_gate_reads_plain_words(mllm, kit):
    open_ = Gate(kit.harm, -1e6, roles=(TEXT,))
    method = DACO(kit.sae, torch.zeros(len(kit.sae.W_dec)), kit.D, 1.5, open_, kit.D.behaviours["declining"])
    before = mllm.chat(None, "Tell me about pancakes.", max_new_tokens=8)
    with steer(mllm, method):
        assert mllm.chat(None, "Tell me about pancakes.", max_new_tokens=8) != before


def test_misfits_are_named(mllm, kit):
    with pytest.raises(ValueError, match="width 99.*width 576"), steer(mllm, ActAdd(torch.zeros(99), 3)):
        pass
    b = Behaviour(2, *torch.zeros(2, 576))
    with pytest.raises(ValueError, match=f"gate reads layer {kit.harm.layer}, above layer 2"):
        DACO(kit.sae, torch.zeros(len(kit.sae.W_dec)), kit.D, 1., Gate(kit.harm, 0.), b).edits(mllm)
    with pytest.raises(ValueError, match="Layer 77 does not exist"), steer(mllm, ActAdd(torch.zeros(576), 77)):
        pass


def test_positions_of_some_roles_and_of_none():
    where = Where(torch.tensor([[TEMPLATE, LAST, ANSWER]]), 0)
    assert positions(where, (LAST, ANSWER)).tolist() == [[False, True, True]]
    assert positions(where, ()).tolist() == [[False, False, False]]


@pytest.mark.parametrize("strength", [float("nan"), 1e38])
def test_steering_into_nan_stops(mllm, strength):
    with pytest.raises(FloatingPointError, match=rf"ActAdd made the output of layer 14 NaN or infinite at token \d+ of prompt 0.*last prompt token"), steer(mllm, ActAdd(torch.full((576,), 10.), 14, strength)):
        mllm.chat(None, "What is a cake?", max_new_tokens=2)
    assert mllm.chat(None, "What is a cake?", max_new_tokens=2)


def test_nan_made_above_the_written_layer_stops(mllm):
    "A finite write whose squares overflow further up is found at the last layer."
    edits = watched({3: lambda hidden, where: hidden}, 29, "x")
    with pytest.raises(FloatingPointError, match="layer 29 NaN or infinite at token 7 of prompt 1.*answer"):
        edits[29](torch.tensor([[[1.]], [[torch.inf]]]), Where(torch.full((2, 1), ANSWER), 7))
    assert watched({}, 29, "x") == {}


def test_every_demo_model_has_its_kit():
    "Three kits of the same concepts, each with its own numbers; a file that is missing is named, with the remedy."
    kits, settings = ({f: read(f) for f in FAMILIES} for read in (load_kit, load_settings))
    assert len({tuple(k.D.names) for k in kits.values()}) == 1 and len({k.D.vectors.sum().item() for k in kits.values()}) == 3
    assert len({s["threshold"] for s in settings.values()}) == 3 and settings["llava"] == SETTINGS
    with pytest.raises(FileNotFoundError, match="nowhere.json is missing: give a file made by tune, or one of llava, qwen, internvl"):
        load_settings("nowhere.json")
