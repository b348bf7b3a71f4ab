"Sparse autoencoders: exactness, faults, files, a killed run."
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from daco_nb import sae as module
from daco_nb.sae import SAE, alignment, evaluate_sae, frac_alive, fve, geometric_median, l0, superposition

quick = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def world():
    "A dictionary, standardised activations made of it, and the raw ones, with huge dimensions."
    truth = normalize(torch.randn(24, 12, generator=seeded(0)), dim=1)
    Z, _ = superposition(600, truth, 2, .05, seeded(1))
    Z = (Z - Z.mean(0))/Z.std(0)
    mean, std = 5*torch.randn(12, generator=seeded(2)), torch.rand(12, generator=seeded(3))*40 + .1
    return SimpleNamespace(Z=Z, raw=Z*std + mean, D=SimpleNamespace(vectors=3*truth, mean=mean, std=std))


def randomised(d_in=6, d_sae=10, k=3, architecture='topk', seed=0):
    "An SAE whose every weight is random."
    sae, g = SAE(d_in, d_sae, k, architecture), seeded(seed)
    for p in sae.parameters(): p.data = torch.randn(p.shape, generator=g)
    sae.mean, sae.std = torch.randn(d_in, generator=g), torch.rand(d_in, generator=g) + .2
    return sae


# ---- metrics

def test_fve_by_hand():
    z = torch.tensor([[0., 0.], [2., 0.]])
    assert fve(z, z) == 1
    assert fve(z, torch.tensor([[1., 0.], [1., 0.]])) == 0
    assert fve(z, torch.tensor([[0., 0.], [2., 1.]])) == .5
    assert fve(z, -z) == -7.


def test_l0_and_frac_alive_by_hand():
    acts = torch.tensor([[1., 0., 0., 0.], [2., 3., 0., 0.]])
    assert l0(acts) == 1.5 and frac_alive(acts) == .5
    assert SAE.fve is fve and SAE.l0 is l0 and SAE.frac_alive is frac_alive


# ---- forward

@quick
@given(seeds, st.integers(1, 10))
def test_topk_keeps_the_largest_positive_ones(seed, k):
    sae = randomised(k=k, seed=seed)
    z = torch.randn(5, 6, generator=seeded(seed))
    for pre, code in zip(sae.pre_acts(z).detach(), sae.encode(z).detach()):
        want = torch.zeros(10)
        for i in pre.argsort(descending=True)[:k]: want[i] = max(pre[i], 0)
        assert torch.equal(code, want)


def test_l1_is_a_relu_and_shapes_are_free():
    sae = randomised(architecture='l1')
    z = torch.randn(2, 4, 6, generator=seeded(0))
    assert torch.equal(sae.encode(z), sae.pre_acts(z).relu()) and sae(z).shape == z.shape
    assert torch.allclose(sae(z)[1, 2], sae(z[1, 2]), atol=1e-5)
    assert sae(z[:0]).shape == (0, 4, 6)
    assert sae.encode(z.bfloat16()).dtype == torch.float32


@quick
@given(seeds, st.sampled_from(['batchtopk', 'jumprelu']))
def test_latents_fire_above_their_threshold(seed, architecture):
    "Above the threshold, never at or below it; a row has the same code alone and in a batch."
    sae, z = randomised(architecture=architecture, seed=seed), torch.randn(7, 6, generator=seeded(seed))
    sae.threshold.data = torch.rand(10, generator=seeded(seed))
    pre = sae.pre_acts(z).detach()
    code = sae.encode(z).detach()
    assert torch.equal(code, torch.where(pre > sae.threshold, pre, 0.)) and (code >= 0).all()
    assert torch.allclose(torch.cat([sae.encode(row[None]) for row in z]), code, atol=1e-5)
    sae.threshold.data += 1
    assert ((sae.encode(z) > 0).sum() <= (code > 0).sum())


def test_the_ramp_under_a_threshold():
    "Gradients of JumpReLU by hand: the codes' as of a mask, the threshold's from entries within half a width."
    pre = torch.tensor([[1.1, 3.], [.85, .2], [1.4, 1.9]], requires_grad=True)
    threshold = torch.tensor([1., 2.], requires_grad=True)
    code, on = module._Jump.apply(pre, threshold, .4)
    assert torch.equal(code.detach(), torch.tensor([[1.1, 3.], [0., 0.], [1.4, 0.]])) and torch.equal(on, (code > 0).float())
    (2*code.sum() + on.sum()).backward()
    assert torch.equal(pre.grad, 2*on) # the count gives none
    assert torch.allclose(threshold.grad, -torch.tensor([2*(2*1. + 1)/.4, 1*(2*2. + 1)/.4])) # near: 1.1 and .85; 1.9


@quick
@given(seeds, st.integers(1, 10), st.booleans())
def test_the_sparse_step_is_the_dense_one(seed, k, batch):
    "Reconstruction and every gradient, against dense matrices; atoms of length 1 get no gradient along themselves."
    sae, z = randomised(k=k, seed=seed), torch.randn(9, 6, generator=seeded(seed))
    sae.W_dec.data = normalize(sae.W_dec.data, dim=1)
    pre = sae.pre_acts(z)
    top = pre.flatten().topk(9*k).indices if batch else (torch.arange(9)[:, None]*10 + pre.topk(k).indices).flatten()
    dense = (pre.relu()*torch.zeros(90).index_fill(0, top, 1.).view(9, 10))@sae.W_dec + sae.b_dec
    sparse, latent, code = module._Sparse.apply(z, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, k, batch)
    assert torch.allclose(sparse, dense, atol=1e-4) and len(latent) == len(code) == 9*k
    grads = [torch.autograd.grad((z - out).square().sum(), list(sae.parameters())) for out in (sparse, dense)]
    W, b = sae.W_dec.detach(), grads[1][1]
    grads[1] = [grads[1][0], b - (b*W).sum(1, keepdim=True)*W, *grads[1][2:]]
    for a, b in zip(*grads): assert (a - b).abs().max() <= 1e-4*b.abs().max().clamp_min(1e-2)


# ---- beginnings

def test_from_dictionary_below_equal_above(world):
    U = normalize(world.D.vectors, dim=1)
    for m in (10, None, 40):
        sae = SAE.from_dictionary(world.D, m, k=2, data=world.Z, generator=seeded(0))
        n = min(m or 24, 24)
        assert sae.d_sae == (m or 24) and torch.equal(sae.W_dec[:n], U[:n]) and torch.equal(sae.W_enc, sae.W_dec.T)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-6)
        assert sae.concept_index.tolist() == list(range(n)) + (sae.d_sae - n)*[-1]
        assert torch.equal(sae.mean, world.D.mean) and torch.equal(sae.std, world.D.std)


def test_residual_atoms_are_not_in_the_dictionary(world):
    "They are orthogonal to the atoms that explained the activation they come from."
    short = SimpleNamespace(vectors=world.D.vectors[:6], mean=world.D.mean, std=world.D.std)
    rest = SAE.from_dictionary(short, 30, k=6, data=world.Z, generator=seeded(0)).W_dec[6:]
    blind = SAE.from_dictionary(short, 30, k=6, extra='random', generator=seeded(0)).W_dec[6:]
    U = normalize(short.vectors, dim=1)
    assert (rest@U.T).abs().max() < 1e-4 < (blind@U.T).abs().max()


def test_the_generator_decides(world):
    make = lambda s: SAE.random(12, 20, k=2, generator=seeded(s)).W_dec
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))
    train = lambda s: SAE.from_dictionary(world.D, k=2).fit(world.Z, seeded(s), bar=False, steps=5, batch=32).W_dec
    assert torch.equal(train(1), train(1)) and not torch.equal(train(1), train(2))


def test_atoms_from_data(world):
    sae = SAE.from_data(world.Z, 24, k=2, mean=world.D.mean, std=world.D.std, generator=seeded(0))
    off = normalize(world.Z - world.Z.mean(0), dim=1)
    assert torch.allclose((sae.W_dec@off.T).max(1).values, torch.ones(24), atol=1e-5) # each points at a row
    assert torch.equal(sae.W_enc, sae.W_dec.T) and torch.equal(sae.std, world.D.std) and sae.concept_index.max() == -1
    assert torch.equal(sae.W_dec, SAE.from_data(world.Z, 24, k=2, generator=seeded(0)).W_dec)


def test_a_tensor_is_a_dictionary_too():
    sae = SAE.from_dictionary(torch.eye(4), k=2)
    assert torch.equal(sae.mean, torch.zeros(4)) and torch.equal(sae.std, torch.ones(4))


# ---- training

@pytest.mark.parametrize('architecture', ['topk', 'l1', 'batchtopk', 'jumprelu'])
def test_training_improves_and_atoms_stay_unit(world, architecture):
    sae = SAE.random(12, 24, k=2, architecture=architecture, generator=seeded(0))
    out = sae.fit(world.Z, seeded(0), bar=False, steps=150, batch=64, lr=1e-2)
    assert out is sae and sae.history[-1]['fve'] > sae.history[0]['fve'] + .1
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(24), atol=1e-5)
    assert [h['step'] for h in sae.history] == [0, 50, 100, 150]
    assert set(sae.history[0]) == {'step', 'fve', 'l0', 'frac_alive', 'dead', 'loss'}


@pytest.mark.parametrize('architecture', ['batchtopk', 'jumprelu'])
def test_l0_on_average(world, architecture):
    "On new rows the mean count is near k, and the thresholds are those of the training's end."
    sae = SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, seeded(0), bar=False, steps=200, batch=64, lr=5e-3)
    h = sae.history[-1]
    assert abs(h['l0'] - 2) < .5 and h['fve'] > sae.history[0]['fve'] and (sae.threshold >= 0).all() and sae.threshold.any()
    assert (sae.threshold == sae.threshold[0]).all() == (architecture == 'batchtopk')


def test_watch_joins_the_measurements(world):
    sae = SAE.from_dictionary(world.D, k=2).fit(world.Z, seeded(0), bar=False, steps=10, every=5, watch=lambda s: {'norm': s.W_dec.norm().item()})
    assert [h['step'] for h in sae.history] == [0, 5, 10] and all(abs(h['norm'] - 24**.5) < 1e-3 for h in sae.history)


class Stream:
    "Batches made while they are read; counts how many are alive at once."
    alive = most = 0
    def __iter__(self):
        for i in range(60):
            z = torch.randn(300, 12, generator=seeded(i))
            Stream.alive += 1
            Stream.most = max(Stream.most, Stream.alive)
            weakref.finalize(z, self.gone)
            yield z
    @staticmethod
    def gone(): Stream.alive -= 1


def test_a_stream_is_not_kept_in_memory():
    "Only the first few thousand rows are ever together, to find the centre."
    sae = SAE.random(12, 24, k=2, generator=seeded(0)).fit(Stream(), bar=False, steps=100, every=50)
    assert len(sae.history) == 3 and Stream.most <= 20


def test_projected_gradients_are_orthogonal_to_atoms(world):
    sae = SAE.from_dictionary(world.D, k=2)
    (sae(world.Z) - world.Z).square().sum().backward()
    module._project_gradient(sae)
    assert (sae.W_dec.grad*sae.W_dec).sum(1).abs().max() < 1e-2 < sae.W_dec.grad.abs().max()


def test_aux_k_trains_dead_latents_only(world):
    sae = SAE.from_dictionary(world.D, k=2)
    dead = torch.arange(24) >= 20
    module._aux_k(sae, world.Z, sae(world.Z), dead, 4).backward()
    moved = sae.W_dec.grad.abs().sum(1) > 0
    assert not moved[~dead].any() and moved[dead].any() and sae.b_dec.grad is None
    assert (sae.W_enc.grad.abs().sum(0) > 0)[~dead].sum() == 0


def test_a_store_on_disk_trains(tmp_path):
    "Every token of every shard comes once per pass, standardised and mixed; at most `mix` shards are read between two batches."
    from test_activations import make
    store = make(tmp_path/'store')
    mean, std = store.stats(3)
    D = SimpleNamespace(layer=3, standardise=lambda z: (z - mean)/std)
    batches = list(module.Stream(D, store, batch=64, mix=3))
    assert {len(z) for z in batches[:-1]} == {64} and sorted(torch.cat(batches).tolist()) == sorted(D.standardise(store.tokens(3)[0]).tolist())
    sae = SAE.random(8, 16, k=2, generator=seeded(0)).fit(module.Stream(D, store, batch=64, mix=3), seeded(1), bar=False, steps=200, lr=1e-2)
    assert sae.history[-1]['fve'] > sae.history[0]['fve'] + .05
    with pytest.raises(ValueError, match='batch = 0'): module.Stream(D, store, batch=0)
    with pytest.raises(ValueError, match='Layer 2 was not|no .2.tokens'): next(iter(module.Stream(SimpleNamespace(layer=2, standardise=D.standardise), store)))


def test_silent_latents_are_counted(world):
    sae = SAE.from_dictionary(world.D, k=2)
    sae.b_enc.data[:6] = -1e3
    sae.fit(world.Z, bar=False, steps=10, batch=50, dead_after=100, aux=0, every=5)
    assert sae.history[0]['dead'] == 0 and sae.history[-1]['dead'] >= .25


def test_held_out_rows_are_never_trained_on(world):
    test, batches = module._split(torch.arange(100.)[:, None], .2, 16, seed=3)
    seen = [next_ for _, next_ in zip(range(50), batches(0))]
    assert len(test) == 20 and not set(test[:, 0].tolist()) & set(torch.cat(seen)[:, 0].tolist())
    assert all(torch.equal(a, b) for a, b in zip(seen[7:], batches(7)))


def test_batches_and_a_tensor_of_half_precision_both_train(world):
    parts = list(world.Z.split(100))
    sae = SAE.from_dictionary(world.D, k=2).fit(parts, bar=False, steps=8)
    assert len(sae.history) == 2
    SAE.from_dictionary(world.D, k=2).fit(world.Z.half(), bar=False, steps=3)


def test_geometric_median_is_better_than_the_mean():
    X = torch.cat([torch.randn(50, 3, generator=seeded(0)), 100*torch.ones(5, 3)])
    cost = lambda c: (X - c).norm(dim=1).sum()
    best = geometric_median(X, 100)
    assert cost(best) < cost(X.mean(0))
    for _ in range(20): assert cost(best) <= cost(best + .05*torch.randn(3, generator=seeded(_))) + 1e-3


@pytest.mark.parametrize('architecture', ['l1', 'topk', 'batchtopk', 'jumprelu'])
def test_names_that_hold(world, architecture):
    "No named atom leaves its cone, nameless ones are free, atoms stay unit; a cosine of 1 freezes the names."
    n, longer = len(world.D.vectors), RECIPE | dict(steps=120, lr=.03)
    def start(seed=0): return SAE.from_dictionary(world.D, n + 8, k=2, architecture=architecture, data=world.Z, generator=seeded(seed))
    held = start().fit(world.Z, seeded(1), **longer, hold=.98)
    cosine, _ = alignment(held, world.D.vectors)
    assert len(cosine) == n and cosine.min() > .98 - 1e-5 and torch.allclose(held.W_dec.norm(dim=1), torch.ones(n + 8), atol=1e-5)
    free = start().fit(world.Z, seeded(1), **longer)
    assert alignment(free, world.D.vectors)[0].min() < .98
    assert (start().W_dec[n:]*held.W_dec[n:]).sum(1).min() < .98 # no name, no cone
    frozen = start().fit(world.Z, seeded(1), **longer, hold=1.)
    assert torch.allclose(frozen.W_dec[:n], start().W_dec[:n], atol=1e-5)


def test_hold_needs_something_to_hold_to(world):
    for sae in (SAE.random(12, 24, k=2), SAE.from_data(world.Z, 16, k=2)):
        with pytest.raises(ValueError, match=r'hold = 0\.9.*from_dictionary'): sae.fit(world.Z[:, :sae.d_in], **RECIPE | dict(hold=.9))
    with pytest.raises(ValueError, match='hold = 1.5: choose a cosine'): SAE.from_dictionary(world.D, k=2).fit(world.Z, **RECIPE | dict(hold=1.5))


def test_alignment_by_hand():
    sae = SAE.from_dictionary(torch.eye(3), k=1)
    sae.W_dec.data[0] = normalize(torch.tensor([1., 2., 0.]), dim=0)
    cosine, unchanged = alignment(sae, torch.eye(3))
    assert torch.allclose(cosine, torch.tensor([5**-.5, 1., 1.])) and unchanged.tolist() == [False, True, True]


# ---- folding and files

@quick
@given(seeds, st.sampled_from(['topk', 'l1', 'batchtopk', 'jumprelu']))
def test_fold_is_exact_and_unfold_undoes_it(seed, architecture):
    sae = randomised(architecture=architecture, seed=seed)
    x = 3*torch.randn(20, 6, generator=seeded(seed))
    folded = sae.fold()
    assert torch.allclose(folded.encode(x), sae.encode(sae.standardise(x)), atol=1e-3, rtol=1e-4)
    assert torch.allclose(folded(x), sae.unstandardise(sae(sae.standardise(x))), atol=1e-3, rtol=1e-3)
    for p, q in zip(sae.parameters(), folded.unfold().parameters()): assert torch.allclose(p, q, atol=1e-5)
    assert folded.fold() is folded and sae.unfold() is sae and not sae.folded


@pytest.mark.parametrize('architecture', ['batchtopk', 'jumprelu'])
def test_thresholds_are_saved(world, tmp_path, architecture):
    sae = SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, bar=False, steps=20)
    back = SAE.load(sae.save(tmp_path/'sae'))
    assert back.architecture == architecture and back.k == 2 and torch.equal(back.threshold, sae.threshold)
    assert torch.allclose(back.encode(world.raw), sae.encode(world.Z), atol=1e-4)


@pytest.mark.parametrize('architecture', ['topk', 'l1'])
def test_save_and_load(world, tmp_path, architecture):
    sae = SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, bar=False, steps=20)
    back = SAE.load(sae.save(tmp_path/'sae', model_name='demo', hook_name='layer 6'))
    assert back.folded and torch.allclose(back.encode(world.raw), sae.encode(world.Z), atol=1e-5)
    assert torch.allclose(back(world.raw), sae.unstandardise(sae(world.Z)), atol=1e-3)
    assert torch.allclose(back.unfold().W_dec, sae.W_dec, atol=1e-6) and torch.equal(back.concept_index, sae.concept_index)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['sae']
    cfg, w = json.loads((tmp_path/'sae/cfg.json').read_text()), load_file(tmp_path/'sae/sae_weights.safetensors')
    assert cfg['architecture'] == {'topk': 'topk', 'l1': 'standard'}[architecture] and cfg['metadata']['model_name'] == 'demo'
    assert int(cfg['metadata']['sae_lens_version'].split('.')[0]) >= 6 and set(w) == {'W_enc', 'W_dec', 'b_enc', 'b_dec'}
    pre = ((world.raw - w['b_dec'])@w['W_enc'] + w['b_enc']).relu() # what SAELens computes
    if architecture == 'topk':
        top = pre.topk(cfg['k'])
        pre = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    assert torch.allclose(pre, sae.encode(world.Z), atol=1e-5)


def test_options_of_saelens_are_moved_into_the_weights(tmp_path):
    sae = randomised()
    folder = sae.save(tmp_path/'a')
    w, cfg = load_file(folder/'sae_weights.safetensors'), json.loads((folder/'cfg.json').read_text())
    (folder/'cfg.json').write_text(json.dumps(cfg | {'apply_b_dec_to_input': False, 'rescale_acts_by_decoder_norm': True}))
    x, norm = torch.randn(9, 6, generator=seeded(1)), w['W_dec'].norm(dim=1)
    top = ((x@w['W_enc'] + w['b_enc'])*norm).relu().topk(3)
    code = torch.zeros(9, 10).scatter(-1, top.indices, top.values)
    back = SAE.load(folder)
    assert torch.allclose(back.encode(x), code, atol=1e-4)
    assert torch.allclose(back(x), (code/norm)@w['W_dec'] + w['b_dec'], atol=1e-4)


def test_an_sae_without_our_side_file_loads(tmp_path):
    folder = randomised().save(tmp_path/'a')
    (folder/'standardisation.safetensors').unlink()
    back = SAE.load(folder)
    assert torch.equal(back.unfold().W_enc, back.W_enc)


def test_save_never_destroys(tmp_path, monkeypatch):
    sae = randomised()
    folder = sae.save(tmp_path/'a')
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match='overwrite=True'): sae.save(folder)
    monkeypatch.setattr(module, 'save_file', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): sae.save(folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    other = randomised(seed=5)
    assert torch.allclose(SAE.load(other.save(folder, overwrite=True)).W_enc, other.fold().W_enc) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('name', ['sae_weights.safetensors', 'cfg.json', 'standardisation.safetensors'])
def test_truncated_files_are_named(tmp_path, name):
    folder = randomised().save(tmp_path/'a')
    (folder/name).write_bytes((folder/name).read_bytes()[:-20])
    with pytest.raises(ValueError, match='damaged'): SAE.load(folder)


def test_folders_that_do_not_fit(tmp_path):
    folder = randomised().save(tmp_path/'a')
    cfg = json.loads((folder/'cfg.json').read_text())
    for change, message in (({'architecture': 'gated'}, "'gated'"), ({'d_sae': 11}, 'do not belong together'), ({'normalize_activations': 'layer_norm'}, 'layer_norm')):
        (folder/'cfg.json').write_text(json.dumps(cfg | change))
        with pytest.raises(ValueError, match=message): SAE.load(folder)
    (folder/'cfg.json').unlink()
    with pytest.raises(FileNotFoundError, match='cfg.json'): SAE.load(folder)


# ---- checkpoints

RECIPE = dict(bar=False, steps=30, batch=32, save_every=7, every=10)

@pytest.mark.parametrize('architecture', ['topk', 'batchtopk', 'jumprelu'])
@pytest.mark.parametrize('hold', [0., .999])
def test_resuming_gives_the_same_bits(world, tmp_path, architecture, hold):
    recipe = RECIPE | dict(hold=hold)
    class Stop(Exception): pass
    def stop(real, after):
        def step(*a, **k):
            if (after := stop.left) == 0: raise Stop
            stop.left = after - 1
            return real(*a, **k)
        stop.left = after
        return step
    file, real = tmp_path/'run', module._step
    module._step = stop(real, 17)
    try:
        with pytest.raises(Stop): SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, seeded(0), file, **recipe)
    finally: module._step = real
    assert module._read_file(file)[1]['step'] == 14
    resumed = SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, seeded(99), file, **recipe)
    straight = SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, seeded(0), **recipe)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), straight.state_dict().values()))
    assert resumed.history == straight.history
    again = SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, seeded(0), file, **recipe) # finished: nothing left to do
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), straight.parameters())) and again.history[-1]['step'] == 30


@pytest.mark.parametrize('change', [dict(k=3), dict(architecture='l1'), dict(d_sae=20)])
def test_a_checkpoint_of_another_architecture(world, tmp_path, change):
    SAE.from_dictionary(world.D, k=2).fit(world.Z, None, tmp_path/'run', **RECIPE)
    other = SAE.from_dictionary(world.D, **{'k': 2} | change)
    with pytest.raises(ValueError, match=f'{next(iter(change))} = .* there, .* here'): other.fit(world.Z, None, tmp_path/'run', **RECIPE)


@pytest.mark.parametrize('content', [b'', b'hello', None])
def test_a_damaged_checkpoint(world, tmp_path, content):
    file = tmp_path/'run'
    SAE.from_dictionary(world.D, k=2).fit(world.Z, None, file, **RECIPE)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match='run is no checkpoint, or it is damaged'): SAE.from_dictionary(world.D, k=2).fit(world.Z, None, file, **RECIPE)


def test_a_foreign_safetensors_file_is_no_checkpoint(world, tmp_path):
    save_file({'x': torch.zeros(1)}, tmp_path/'run')
    with pytest.raises(ValueError, match='no checkpoint'): SAE.from_dictionary(world.D, k=2).fit(world.Z, None, tmp_path/'run', **RECIPE)


KILLED = '''
import sys, torch
from daco_nb.sae import SAE
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
Z = torch.randn(400, 12, generator=g)
SAE.random(12, 24, k=2, generator=g).fit(Z, g, sys.argv[1], bar=False, steps=int(sys.argv[2]), batch=32, save_every=1, every=100, warmup=0, decay=0)
'''

def test_kill_9_then_resume(tmp_path):
    "A process is killed while it writes checkpoints as fast as it can; the file is whole, and going on gives the same bits."
    file, steps = tmp_path/'run', 700
    process = subprocess.Popen([sys.executable, '-c', KILLED, str(file), str(steps)], env=os.environ | {'OMP_NUM_THREADS': '1'})
    deadline = time.time() + 240
    while not (file.exists() and module._read_file(file)[1]['step'] >= 5):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= module._read_file(file)[1]['step'] < steps
    def run(checkpoint):
        Z = torch.randn(400, 12, generator=(g := seeded(0)))
        recipe = dict(bar=False, steps=steps, batch=32, save_every=500, every=100, warmup=0, decay=0)
        return SAE.random(12, 24, k=2, generator=g).fit(Z, g, checkpoint, **recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: resumed, straight = run(file), run(None)
    finally: torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters()))


# ---- several processes, lower precision

SEVERAL = """
import os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from daco_nb.sae import SAE
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ.get('RANK', 0))
Z = torch.randn(330, 12, generator=torch.Generator().manual_seed(0))
def run(architecture, checkpoint=None):
    g = torch.Generator().manual_seed(rank) # process 0 decides
    sae = SAE.random(12, 24, k=2, architecture=architecture, generator=g)
    return sae.fit(Z, g, checkpoint, bar=False, steps=60, batch=31, every=30, save_every=20, lr=1e-2, dead_after=300)
for architecture in ('topk', 'batchtopk', 'l1', 'jumprelu'):
    sae = run(architecture, folder/f'{architecture}-{sys.argv[2]}')
    save_file({k: v.detach().contiguous() for k, v in sae.state_dict().items()}, folder/f'{architecture}-{sys.argv[2]}-{rank}')
"""
ARCHITECTURES = ['topk', 'batchtopk', 'l1', 'jumprelu']


@pytest.fixture(scope='module')
def several(tmp_path_factory):
    "Weights and checkpoints after training in one process and in two, which `accelerate launch` started."
    folder = tmp_path_factory.mktemp('several')
    (folder/'work.py').write_text(SEVERAL)
    launch = ['-m', *'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0'.split()]
    for name, how in (('one', []), ('two', launch)):
        done = subprocess.run([sys.executable, *how, str(folder/'work.py'), str(folder), name], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_two_processes_share_the_batches_of_one(several, architecture):
    "Both end with the same bits, and with the weights of one process but for rounding. Batchtopk and jumprelu look at a whole batch, here at that of a process: they end nearby."
    one, two, other = (load_file(several/f'{architecture}-{x}') for x in ('one-0', 'two-0', 'two-1'))
    assert all(torch.equal(two[k], other[k]) for k in one)
    if architecture in ('topk', 'l1'): assert all((one[k] - two[k]).abs().max() <= 2e-3 for k in one)
    Z, explained = torch.randn(330, 12, generator=seeded(0)), []
    for weights in (one, two):
        sae = SAE(12, 24, 2, architecture)
        sae.load_state_dict(weights)
        explained.append(evaluate_sae(sae, Z)['fve'])
    assert abs(explained[0] - explained[1]) < .02
    start = SAE.random(12, 24, k=2, architecture=architecture, generator=seeded(0))
    assert (start.W_dec - one['W_dec']).abs().max() > .2 # training went far, so that agreeing says something


def test_a_checkpoint_of_two_processes_is_not_for_one(several):
    Z = torch.randn(330, 12, generator=seeded(0))
    with pytest.raises(ValueError, match='processes = 2 there, 1 here'):
        SAE.random(12, 24, k=2, generator=seeded(0)).fit(Z, seeded(0), several/'topk-two', bar=False, steps=60, batch=31, every=30, lr=1e-2, dead_after=300)


def test_two_processes_resume_to_the_same_bits(several, tmp_path):
    "Two processes that were stopped after 20 of 60 steps go on to the weights of those that were not."
    text = SEVERAL.replace("('topk', 'batchtopk', 'l1', 'jumprelu')", "('topk',)")
    stop = text.replace("lr=1e-2", "watch=lambda sae: sys.exit() if stopped() else {}, lr=1e-2")
    stop = stop.replace("def run(", "stopped = lambda: (folder/'topk-two').exists()\ndef run(") # at the measurement of step 30; the checkpoint is that of step 20
    launch = ['-m', *'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0'.split()]
    for program in (stop, text):
        (tmp_path/'work.py').write_text(program)
        done = subprocess.run([sys.executable, *launch, str(tmp_path/'work.py'), str(tmp_path), 'two'], capture_output=True, text=True, timeout=300)
        if program is stop: assert module._read_file(tmp_path/'topk-two')[1]['step'] == 20 and not (tmp_path/'topk-two-0').exists()
    assert done.returncode == 0, done.stderr[-2000:]
    straight = load_file(several/'topk-two-0')
    for rank in (0, 1): assert all(torch.equal(v, straight[k]) for k, v in load_file(tmp_path/f'topk-two-{rank}').items())


def test_every_row_is_taken_once():
    for n in (1, 2, 5, 8):
        z, parts = torch.arange(float(n))[:, None], [module._share(torch.arange(float(n))[:, None], rank, 3) for rank in range(3)]
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert sorted(x for rows, share in parts if share for x in rows[:, 0].tolist()) == z[:, 0].tolist()


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_products_in_bfloat16(world, architecture):
    "Weights stay float32, and what is explained stays nearly the same."
    full, half = (SAE.from_dictionary(world.D, k=2, architecture=architecture).fit(world.Z, seeded(0), bar=False, steps=200, lr=3e-3, precision=p) for p in ('float32', 'bfloat16'))
    assert all(p.dtype == torch.float32 for p in half.parameters()) and not torch.equal(full.W_dec, half.W_dec)
    assert abs(full.history[-1]['fve'] - half.history[-1]['fve']) < .02


# ---- bad input

bad = [
    (lambda w: SAE(12, 24, 2).fit(w.Z, precision='float8'), "precision = 'float8'"),
    (lambda w: SAE(4, 8, 9), 'k = 9'),
    (lambda w: SAE(4, 8, 0), 'k = 0'),
    (lambda w: SAE(4, 8, 2, 'gated'), "'gated'"),
    (lambda w: SAE(4, 8, 2).encode(torch.zeros(1, 5)), 'width 5'),
    (lambda w: SAE.from_dictionary(torch.eye(4)*torch.nan, k=1), r'rows \[0, 1, 2, 3\] are zero or have NaN'),
    (lambda w: SAE.from_dictionary(torch.cat([torch.eye(4), torch.zeros(1, 4)]), k=1), r'rows \[4\]'),
    (lambda w: SAE.from_dictionary(w.D, 100, k=2), 'pass data'),
    (lambda w: SAE.from_dictionary(w.D, 100, k=2, data=w.Z[:5]), 'at least 76 .* got 5'),
    (lambda w: SAE.from_dictionary(w.D, 100, k=2, extra='zeros'), "'zeros'"),
    (lambda w: SAE.from_dictionary(w.D, 0, k=2), 'k = 2'),
    (lambda w: SAE.from_dictionary(SimpleNamespace(vectors=torch.eye(2), mean=torch.zeros(2), std=torch.tensor([1., 0.])), k=1), r'std is not positive in dimensions \[1\]'),
    (lambda w: SAE.from_data(w.Z[:5], 24, k=2), 'at least 24 activations, got 5'),
    (lambda w: SAE.from_data(torch.ones(30, 12), 24, k=2), '24 of 24 activations lie at the mean'),
    (lambda w: SAE.from_data(torch.full((30, 12), torch.nan), 24, k=2), 'not finite'),
    (lambda w: SAE.random(12, 24, k=2).fit(w.Z[:, :5], bar=False), 'width 5'),
    (lambda w: SAE.random(12, 24, k=2).fit(w.Z[0], bar=False), 'matrix'),
    (lambda w: SAE.random(12, 24, k=2).fit(w.Z/0, bar=False), 'NaN or infinity'),
    (lambda w: SAE.random(12, 24, k=2).fit(iter([w.Z]), bar=False), 'only once'),
    (lambda w: SAE.random(12, 24, k=2).fit([w.Z], bar=False), 'two batches'),
    (lambda w: SAE.random(12, 24, k=2).fit([], bar=False), 'two batches'),
    (lambda w: SAE.random(12, 24, k=2).fit([w.Z, w.Z[:0], w.Z[:0]], bar=False), 'two batches'),
    (lambda w: SAE.random(12, 24, k=2).fit(w.Z[:0], bar=False), 'at least two rows'),
    (lambda w: SAE.random(12, 24, k=2).fit(w.Z, bar=False, rate=1), 'Unknown setting rate'),
    (lambda w: SAE.random(12, 24, k=2).fit(w.Z, bar=False, centre='mode'), "'mode'"),
    (lambda w: SAE.random(12, 24, k=2).fold().fit(w.Z, bar=False), 'folded'),
    (lambda w: alignment(SAE.random(12, 24, k=2), w.D.vectors), 'No atom'),
    (lambda w: alignment(SAE.from_dictionary(w.D, k=2), w.D.vectors[:3]), 'another one'),
]

@pytest.mark.parametrize('call,message', bad)
def test_bad_input_names_the_value_and_the_remedy(world, call, message):
    with pytest.raises(ValueError, match=message): call(world)


def test_a_diverging_run_stops(world):
    sae = SAE.random(12, 24, k=2)
    with pytest.raises(ValueError, match='lower lr'): sae.fit(world.Z, bar=False, steps=60, every=10, lr=float('inf'))


def test_evaluate(world):
    sae = SAE.from_dictionary(world.D, k=2)
    got = evaluate_sae(sae, world.Z)
    assert got['fve'] == fve(world.Z, sae(world.Z).detach()) and got['l0'] <= 2


@pytest.mark.parametrize('architecture', list(module.ACTIVATIONS))
def test_no_rows_give_no_codes(architecture):
    sae = randomised(architecture=architecture)
    acts = sae.encode(torch.zeros(0, 6))
    assert acts.shape == (0, 10) and sae.decode(acts).shape == sae(torch.zeros(0, 6)).shape == (0, 6)


def test_empty_batches_in_a_stream_change_nothing(world):
    "A store may hand out a batch without rows: it is passed over, and the weights are those of the stream without it."
    a, b, c = world.Z.split(200)
    def train(batches): return SAE.from_dictionary(world.D, k=2).fit(batches, seeded(0), bar=False, steps=6)
    assert all(torch.equal(p, q) for p, q in zip(train([a, b, c]).parameters(), train([a[:0], a, b, b[:0], c, c[:0]]).parameters()))


@pytest.mark.parametrize('architecture', list(module.ACTIVATIONS))
def test_duplicate_concepts_train(world, architecture):
    "Two equal rows of the dictionary: nothing turns into NaN, atoms stay of unit length, both names stay."
    twice = torch.cat([world.D.vectors, world.D.vectors[:3]])
    sae = SAE.from_dictionary(twice, k=2, architecture=architecture).fit(world.Z, seeded(0), bar=False, steps=30)
    assert all(p.isfinite().all() for p in sae.parameters()) and torch.allclose(sae.W_dec.norm(dim=1), torch.ones(27), atol=1e-5)
    assert sae.concept_index.tolist() == list(range(27))


@quick
@given(seeds)
def test_permutation_and_scaling_of_concepts(seed):
    "The order of the concepts permutes the codes, their lengths change nothing."
    g = seeded(seed)
    V, Z, order = torch.randn(9, 6, generator=g), torch.randn(20, 6, generator=g), torch.randperm(9, generator=g)
    codes = SAE.from_dictionary(V, k=3).encode(Z)
    assert torch.allclose(SAE.from_dictionary(V[order], k=3).encode(Z), codes[:, order], atol=1e-5)
    assert torch.allclose(SAE.from_dictionary(V*(torch.rand(9, 1, generator=g) + .1), k=3).encode(Z), codes, atol=1e-5)
