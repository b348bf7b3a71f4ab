"Steering: cache or none, batched or single, exceptions, misfits."
import pytest
import torch

from daco_nb.demo import by_name, scene
from daco_nb.dictionary import Behaviour, ConceptDictionary
from daco_nb.evaluation import attacks
from daco_nb.mllm import ANSWER, IMAGE, LAST, MLLM, TEMPLATE, Where
from daco_nb.sae import SAE
from daco_nb.steering import DACO, ActAdd, Gate, control_code, load_kit, make_methods, raised, steer


@pytest.fixture(scope="module")
def mllm():
    return MLLM.demo()


@pytest.fixture(scope="module")
def kit():
    return load_kit()


@pytest.fixture(scope="module")
def methods(kit):
    return make_methods(kit)


@pytest.fixture(scope="module")
def items():
    return [i for i in attacks("validation") if i.id.endswith(("attack-0-0", "attack-4-1", "twin-1-0"))]


@pytest.mark.parametrize("name", ["ActAdd", "MOP", "DACO (paper)", "DACO"])
def test_cache_makes_no_difference(mllm, methods, items, name):
    ask = dict(texts=[i.text for i in items], images=[i.image for i in items], max_new_tokens=6)
    with steer(mllm, methods[name]):
        assert mllm.generate(**ask) == mllm.generate(**ask, use_cache=False)


@pytest.mark.parametrize("name", ["Prompting", "ActAdd", "MOP", "DACO (paper)", "DACO"])
def test_batched_or_single(mllm, methods, items, name):
    with steer(mllm, methods[name]):
        together = mllm.generate([i.text for i in items], [i.image for i in items], max_new_tokens=8)
        assert together == [mllm.chat(i.image, i.text, max_new_tokens=8) for i in items]


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
    method = DACO(kit.sae, torch.zeros(len(kit.sae.W_dec)), kit.D, 1., behaviour=b, span=2)
    edit = method.edits(type("M", (), dict(d_model=len(b.shown), name="m"))())[b.layer]
    hidden = b.instead.repeat(1, 3, 1)
    roles = torch.tensor([[TEMPLATE, LAST, ANSWER]])
    changed = lambda where: (edit(hidden, where) != hidden).any(-1)[0].tolist()
    assert changed(Where(roles, 0)) == [False, True, True]
    assert changed(Where(torch.full((1, 3), ANSWER), 9, before=1)) == [True, False, False]


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


def test_gate_without_pictures_stays_closed(kit):
    gate = Gate(kit.D, torch.arange(len(kit.D)) < 3, threshold=-1.5)
    hidden, roles = torch.randn(2, 7, len(kit.D.mean)), torch.full((2, 7), TEMPLATE)
    roles[1, 3:5] = IMAGE
    score = gate.score(hidden, Where(roles, 0))
    assert score[0] == -2 and score[1] > -2  # the second has two patches, fewer than `top`


def test_misfits_are_named(mllm, kit):
    with pytest.raises(ValueError, match="width 99.*width 576"), steer(mllm, ActAdd(torch.zeros(99), 3)):
        pass
    b = Behaviour(2, *torch.zeros(2, 576))
    with pytest.raises(ValueError, match="gate reads layer 14, above layer 2"):
        DACO(kit.sae, torch.zeros(len(kit.sae.W_dec)), kit.D, 1., Gate(kit.D, torch.arange(len(kit.D)) < 3, 0.), b).edits(mllm)
    with pytest.raises(ValueError, match="Layer 77 does not exist"), steer(mllm, ActAdd(torch.zeros(576), 77)):
        pass
