"""What trains the demo's eyes: pictures with words below drawings, and a projector fitted on stored states."""
import pytest, torch

from daco_nb import train_demo
from daco_nb.demo import by_name, phrases, smollm2
from daco_nb.train_demo import Eye, Names, SceneData, fit_projector, naming_loss, place_states

@pytest.fixture(scope='module')
def names(): return Names(*smollm2())

@pytest.fixture(scope='module')
def eye(names):
    torch.manual_seed(0)
    return Eye('llava', len(names.names))

def test_words_stand_below_drawings(names):
    data = SceneData(names, 12, 5, text=1., below=1.)
    for i in range(len(data)):
        *drawn, phrase = [k for k in data[i][3].tolist() if k >= 0]
        assert 1 <= len(drawn) <= 2 and all(k < len(by_name()) for k in drawn) and names.names[phrase] in phrases()

def test_words_stand_alone(names):
    data = SceneData(names, 12, 5, text=1., below=0.)
    alone = [[k for k in data[i][3].tolist() if k >= 0] for i in range(len(data))]
    assert all(names.names[k[-1]] in phrases() for k in alone) and sum(len(k) == 1 for k in alone) > 6

def test_naming_loss_is_least_at_the_names(names):
    thing = torch.arange(0, 60, 3)
    weight = torch.full(thing.shape, 1/len(thing))
    right, wrong = (naming_loss(names.vectors[t], thing, names, weight) for t in (thing, thing + 1))
    assert right < .1 < wrong

def test_states_come_with_their_labels(eye, names):
    states, things = place_states(eye, names, SceneData(names, 20, 3, text=.5))
    assert states.dtype == torch.half and states.shape == (len(things), 3*192) and 0 <= things.min() and things.max() < len(names.vectors)
    again, same = place_states(eye, names, SceneData(names, 20, 3, text=.5))
    assert torch.equal(states, again) and torch.equal(things, same)

def synthetic(n=2000, d=3*192):
    "States that tell forty names apart."
    g = torch.Generator().manual_seed(1)
    things = torch.randint(40, (n,), generator=g)
    return (torch.randn(40, d, generator=g)[things] + .3*torch.randn(n, d, generator=g)).half(), things

def fresh(names):
    torch.manual_seed(0)
    eye = Eye('llava', len(names.names))
    train_demo.start_projector(eye, names)
    return eye

def nearest(eye, names, states, things):
    with torch.no_grad(): said = eye.project(states[None].float())[0]
    mean = names.vectors.mean(0)
    near = torch.nn.functional.normalize(said - mean, dim=-1)@torch.nn.functional.normalize(names.vectors - mean, dim=-1).T
    return (near.argmax(-1) == things).float().mean()

def test_a_projector_learns_what_its_tower_knows_and_a_broken_run_goes_on(names, tmp_path, monkeypatch):
    states, things = synthetic()
    whole = fresh(names)
    tower = {n: p.clone() for n, p in whole.parts['vision_tower'].named_parameters()}
    before = nearest(whole, names, states[:500], things[:500])
    fit_projector(whole, names, states, things, tmp_path/'whole.pt', epochs=4, batch=64)
    assert before < .2 and nearest(whole, names, states[:500], things[:500]) > .95
    assert all(torch.equal(p, tower[n]) for n, p in whole.parts['vision_tower'].named_parameters())

    calls, loss = [], train_demo.naming_loss
    def breaks(*a):
        calls.append(1)
        if len(calls) == 112: raise KeyboardInterrupt
        return loss(*a)
    monkeypatch.setattr(train_demo, 'naming_loss', breaks)
    with pytest.raises(KeyboardInterrupt): fit_projector(fresh(names), names, states, things, tmp_path/'broken.pt', epochs=4, batch=64)
    again = fit_projector(fresh(names), names, states, things, tmp_path/'broken.pt', epochs=4, batch=64)
    assert len(calls) == 112 + 128 - 100
    for (n, a), b in zip(whole.projector.named_parameters(), again.projector.parameters()): assert torch.equal(a, b), n
