"""Other libraries' SAEs: what the files look like (always), and the same codes and reconstructions there and back (with the libraries).

    DACO_NB_PEERS=1 python -m pytest tests/test_interop.py

makes an environment for each library in the cache folder, once, and runs the library there on the same saved activations."""
import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from daco_nb.benchmarks import peer_python
from daco_nb.sae import ACTIVATIONS, SAE

with_peers = pytest.mark.skipif(not os.environ.get('DACO_NB_PEERS'), reason='set DACO_NB_PEERS=1: installs other libraries')
D_IN, D_SAE, K = 12, 40, 5
each = pytest.mark.parametrize('architecture', list(ACTIVATIONS))


def trained(architecture):
    "A small trained SAE and raw activations, with a standardisation that matters."
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(600, D_IN, generator=g)*torch.linspace(.5, 9, D_IN) + torch.randn(D_IN, generator=g)
    sae = SAE.random(D_IN, D_SAE, k=K, architecture=architecture, mean=raw.mean(0), std=raw.std(0), generator=g)
    return sae.fit(sae.standardise(raw), g, bar=False, steps=60, batch=64, lr=1e-2), raw


# ---- formats, without any peer

@each
def test_files_are_as_saelens_writes_them(tmp_path, architecture):
    sae, _ = trained(architecture)
    folder = sae.save(tmp_path/'sae', model_name='demo', hook_name='layer 6')
    cfg, w = json.loads((folder/'cfg.json').read_text()), load_file(folder/'sae_weights.safetensors')
    shapes = {'W_enc': (D_IN, D_SAE), 'W_dec': (D_SAE, D_IN), 'b_enc': (D_SAE,), 'b_dec': (D_IN,)}
    inside = {'l1': 'standard', 'topk': 'topk', 'batchtopk': 'jumprelu', 'jumprelu': 'jumprelu'}[architecture]
    if inside == 'jumprelu': shapes['threshold'] = (D_SAE,)
    assert {k: tuple(v.shape) for k, v in w.items()} == shapes and all(v.dtype == torch.float32 for v in w.values())
    assert cfg['architecture'] == inside and (cfg['d_in'], cfg['d_sae']) == (D_IN, D_SAE) and cfg.get('k') == (K if inside == 'topk' else None)
    assert cfg['normalize_activations'] == cfg['reshape_activations'] == 'none' and cfg['apply_b_dec_to_input'] is True
    about = cfg['metadata']
    assert int(about['sae_lens_version'].split('.')[0]) >= 6 and about['training_architecture'] == {'l1': 'standard'}.get(architecture, architecture)
    assert about['model_name'] == 'demo' and about['hook_name'] == 'layer 6'
    back = SAE.load(folder)
    assert back.architecture == architecture and back.k == K and back.cfg.hook_name == 'layer 6'
    assert SAE.load(back.save(tmp_path/'again')).cfg == back.cfg


def as_sparsify(sae):
    "The weights under sparsify's names."
    return {'encoder.weight': sae.W_enc.detach().T.contiguous(), 'encoder.bias': sae.b_enc.detach(), 'W_dec': sae.W_dec.detach(), 'b_dec': sae.b_dec.detach()}


def as_dictionary_learning(sae, threshold=-1.):
    "The weights under dictionary_learning's names (its TopK and BatchTopK)."
    w = as_sparsify(sae)
    return w | {'decoder.weight': w.pop('W_dec').T.contiguous(), 'k': torch.tensor(K, dtype=torch.int), 'threshold': torch.tensor(threshold)}


def test_names_and_shapes_of_peers(tmp_path):
    "A sparsify folder and dictionary_learning's state dicts, made by hand."
    sae, raw = trained('topk')
    sae = sae.fold()
    (tmp_path/'sparsify').mkdir()
    save_file(as_sparsify(sae), tmp_path/'sparsify/sae.safetensors')
    cfg = {'activation': 'topk', 'expansion_factor': 32, 'normalize_decoder': True, 'num_latents': D_SAE, 'k': K, 'multi_topk': False, 'skip_connection': False, 'transcode': False, 'd_in': D_IN}
    (tmp_path/'sparsify/cfg.json').write_text(json.dumps(cfg))
    for back in (SAE.load(tmp_path/'sparsify'), SAE.from_weights(as_dictionary_learning(sae), architecture='topk')):
        assert back.architecture == 'topk' and back.k == K and back.folded
        assert torch.equal(back.encode(raw), sae.encode(raw)) and torch.equal(back(raw), sae(raw))
    level = SAE.from_weights(as_dictionary_learning(sae, 2.), architecture='batchtopk')
    pre = sae.pre_acts(raw)
    assert torch.equal(level.encode(raw), torch.where(pre > 2., pre, 0.)) and level.k == K
    bias = {'bias' if k == 'b_dec' else k: v for k, v in as_dictionary_learning(sae).items() if k not in ('k', 'threshold')}
    assert torch.equal(SAE.from_weights(bias, architecture='l1').encode(raw), pre.relu())


def test_what_our_formula_cannot_give_is_refused():
    sae, _ = trained('topk')
    w = as_sparsify(sae)
    for weights, cfg, message in ((w | {'W_skip': torch.zeros(D_IN, D_IN)}, dict(k=K), 'W_skip'), (w, dict(k=K, activation='groupmax'), "'groupmax'"),
                                  (w, dict(k=K, transcode=True), 'transcode'), (w, dict(architecture='gated'), "'gated'"), (w, {}, 'Architecture None'),
                                  (as_dictionary_learning(sae), dict(architecture='batchtopk'), 'below 0'), (w, dict(architecture='jumprelu'), 'threshold has shape None')):
        with pytest.raises(ValueError, match=message): SAE.from_weights(weights, **cfg)


@each
def test_what_evaluation_suites_ask_for(architecture):
    "The face of an SAE in SAEBench: weights, device, dtype, cfg, encode, decode, forward, to."
    sae = trained(architecture)[0].fold()
    assert sae.W_enc.shape == (D_IN, D_SAE) and sae.W_dec.shape == (D_SAE, D_IN) and sae.b_enc.shape == (D_SAE,) and sae.b_dec.shape == (D_IN,)
    assert sae.device == torch.device('cpu') and sae.dtype == torch.float32 and (sae.cfg.d_in, sae.cfg.d_sae) == (D_IN, D_SAE) and sae.cfg.architecture
    x = torch.randn(2, 7, D_IN)
    assert sae.encode(x).shape == (2, 7, D_SAE) and torch.equal(sae(x), sae.decode(sae.encode(x))) and sae.forward(x).shape == x.shape
    half = sae.to(device='cpu', dtype=torch.bfloat16)
    assert half is sae and sae.dtype == torch.bfloat16 and sae(x.bfloat16()).dtype == torch.bfloat16


# ---- with the libraries themselves

def peer(name, program, folder):
    "Run a program in a library's own environment, in a folder with `x.safetensors`."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1', 'SPARSIFY_DISABLE_TRITON': '1'}
    head = "import json, torch\nfrom safetensors.torch import load_file, save_file\ntorch.manual_seed(0)\nx = load_file('x.safetensors')['x']\n"
    done = subprocess.run([peer_python(name), '-c', head + program], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def same(sae, x, answer):
    "Codes and reconstructions agree to 1e-5 of their size."
    for ours, theirs in ((sae.encode(x).detach(), answer['acts']), (sae(x).detach(), answer['out'])):
        assert (ours - theirs).abs().max() <= 1e-5*theirs.abs().max()


LOAD = '''
from sae_lens import SAE
sae = SAE.load_from_disk('sae')
acts = sae.encode(x)
save_file({'acts': acts.detach().contiguous(), 'out': sae(x).detach().contiguous()}, 'answer.safetensors')
'''

TRAIN = '''
import sae_lens
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
name, more = {'l1': ('Standard', {'l1_coefficient': .1}), 'topk': ('TopK', {'k': 5}), 'batchtopk': ('BatchTopK', {'k': 5}), 'jumprelu': ('JumpReLU', {'l0_coefficient': .1})}['ARCHITECTURE']
sae = getattr(sae_lens, name + 'TrainingSAE')(getattr(sae_lens, name + 'TrainingSAEConfig')(d_in=x.shape[1], d_sae=40, **more))
batches = (z for _ in range(10**6) for z in x.split(100))
SAETrainer(SAETrainerConfig(total_training_samples=40_000, train_batch_size_samples=100, lr=3e-3, lr_end=3e-4), sae, batches).fit()
sae.save_inference_model('sae')
'''


@with_peers
@each
def test_saelens_loads_ours(tmp_path, architecture):
    sae, x = trained(architecture)
    save_file({'x': x}, tmp_path/'x.safetensors')
    sae.save(tmp_path/'sae')
    peer('SAELens', LOAD, tmp_path)
    same(sae.fold(), x, load_file(tmp_path/'answer.safetensors'))


@with_peers
@each
def test_we_load_saelens(tmp_path, architecture):
    "An SAE that SAELens trained and saved, and SAELens' own answer after loading it."
    x = trained('l1')[1]
    save_file({'x': x}, tmp_path/'x.safetensors')
    peer('SAELens', TRAIN.replace('ARCHITECTURE', architecture) + LOAD, tmp_path)
    sae, answer = SAE.load(tmp_path/'sae'), load_file(tmp_path/'answer.safetensors')
    assert sae.architecture == architecture and (sae.k == K or architecture in ('l1', 'jumprelu')) and (answer['acts'] > 0).any()
    same(sae, x, answer)


@with_peers
def test_we_load_sparsify(tmp_path):
    x = trained('l1')[1]
    save_file({'x': x}, tmp_path/'x.safetensors')
    peer('sparsify', '''
from sparsify import Sae, SaeConfig
sae = Sae(12, SaeConfig(num_latents=40, k=5))
opt = torch.optim.Adam(sae.parameters(), 3e-3)
for _ in range(5):
    for z in x.split(100): sae(z).fvu.backward(); opt.step(); opt.zero_grad()
sae.save_to_disk('sae')
acts, where, _ = sae.encode(x)
save_file({'acts': torch.zeros(len(x), 40).scatter(1, where, acts).detach(), 'out': sae(x).sae_out.detach()}, 'answer.safetensors')
''', tmp_path)
    same(SAE.load(tmp_path/'sae'), x, load_file(tmp_path/'answer.safetensors'))


@with_peers
@pytest.mark.parametrize('kind,trainer,cfg', [('top_k', 'TopK', dict(architecture='topk')), ('batch_top_k', 'BatchTopK', dict(architecture='batchtopk')),
                                              ('jumprelu', 'JumpRelu', dict(architecture='jumprelu', apply_b_dec_to_input=False))])
def test_we_load_dictionary_learning(tmp_path, kind, trainer, cfg):
    "Its ae.pt is a pickle: the library's own environment turns it into safetensors."
    x = trained('l1')[1]
    save_file({'x': x}, tmp_path/'x.safetensors')
    peer('dictionary_learning', f'''
from dictionary_learning.training import trainSAE
from dictionary_learning.trainers import {kind} as module
more = dict(k=5, threshold_start_step=10) if '{trainer}' != 'JumpRelu' else dict(target_l0=5., sparsity_warmup_steps=10, bandwidth=.01)
cfg = dict(trainer=module.{trainer}Trainer, steps=60, activation_dim=12, dict_size=40, layer=0, lm_name='demo', warmup_steps=5, lr=3e-3, seed=0, device='cpu', **more)
trainSAE((z for _ in range(100) for z in x.split(100)), [cfg], 60, save_dir='run', device='cpu')
kept = torch.load('run/trainer_0/ae.pt', weights_only=True)
save_file({{n: v.contiguous() for n, v in kept.items()}}, 'ae.safetensors')
from dictionary_learning.dictionary import JumpReluAutoEncoder
ae = {{'TopK': lambda: module.AutoEncoderTopK(12, 40, 5), 'BatchTopK': lambda: module.BatchTopKSAE(12, 40, 5), 'JumpRelu': lambda: JumpReluAutoEncoder(12, 40)}}['{trainer}']()
ae.load_state_dict(kept)
acts = ae.encode(x)
save_file({{'acts': acts.detach().contiguous(), 'out': ae.decode(acts).detach().contiguous()}}, 'answer.safetensors')
''', tmp_path)
    same(SAE.from_weights(load_file(tmp_path/'ae.safetensors'), **cfg), x, load_file(tmp_path/'answer.safetensors'))
