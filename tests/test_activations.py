"The activation store: kills, damage, full disks, several processes, bad pairs, memory."
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

from daco_nb.activations import KINDS, ActivationStore, Moments, Shard, extract
from daco_nb.mllm import ANSWER, IMAGE, LAST, PAD, TEMPLATE, TEXT


class Tokenizer:
    "Words are tokens."
    def __call__(self, text, add_special_tokens=False): return {'input_ids': text.split()}
    def decode(self, ids): return ' '.join(ids)


class Fake:
    "Stands for a model: states depend on the text, the position and the layer, in left-padded batches."
    name, d_model, tokenizer = 'fake', 8, Tokenizer()
    def __init__(self, pause=0., broken=None): self.pause, self.broken, self.seen = pause, broken or {}, []
    def check_layers(self, layers): return list(layers)

    def prepare(self, texts, images=None, answers=None):
        if any(im is not None and im.width > 60*im.height for im in images): raise ValueError('too wide')
        rows = [[TEMPLATE]*2 + 3*[IMAGE]*(im is not None) + [TEXT]*len(t.split()) + [LAST] + [ANSWER]*len(a.split()) for t, im, a in zip(texts, images, answers)]
        width = max(map(len, rows))
        self.seen += texts
        return {'roles': torch.tensor([[PAD]*(width - len(r)) + r for r in rows]), 'texts': texts}

    def read(self, batch, layers):
        time.sleep(self.pause)
        out, (b, width) = {}, batch['roles'].shape
        for l in layers:
            seeds = [int(hashlib.sha256(f'{t}{l}'.encode()).hexdigest()[:8], 16) for t in batch['texts']]
            out[l] = torch.stack([torch.randn(width, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
            out[l][batch['roles'] == PAD] = torch.nan
            out[l][batch['roles'] == TEMPLATE] = 1e6 # huge at positions that are never stored
            for i, t in enumerate(batch['texts']):
                if t in self.broken and self.broken[t][0] == l: out[l][i][batch['roles'][i] == TEXT] = self.broken[t][1]
        return out


SQUARE = Image.new('RGB', (4, 4))
WORLD = [(SQUARE, f'caption {i} of {"many "*(i % 5)}', 'yes indeed' if i % 3 else '') for i in range(100)]


def make(folder, pairs=range(100), corpus=WORLD, mllm=None, **kw):
    return extract(mllm or Fake(), pairs, corpus, [1, 3], folder, **dict(batch_size=4, shard=10) | kw)

def bits(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).glob('*.safetensors'))}
def every(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob('*'))}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A store made without interruption."
    return make(tmp_path_factory.mktemp('acts')/'whole')


def start(folder, pause=0., **env):
    "The same work in a process of its own."
    def work():
        tqdm.set_lock(threading.RLock()) # else the lock of progress bars is shared, and dies locked with a process that is killed
        os.environ.update(env); make(folder, mllm=Fake(pause))
    p = get_context('fork').Process(target=work)
    p.start()
    return p


# ---- what is stored

def test_summaries_and_roles(whole):
    shard = next(iter(whole))
    assert isinstance(shard, Shard) and shard.pairs.tolist() == list(range(10)) and len(whole) == 10
    mllm = Fake(); batch = mllm.prepare([WORLD[0][1]], [SQUARE], [''])
    h, roles = mllm.read(batch, [3])[3][0], batch['roles'][0]
    alone = extract(Fake(), [0], WORLD, [3], whole.folder.parent/'alone')
    for kind, role in zip(KINDS, (TEXT, IMAGE, LAST)): torch.testing.assert_close(alone.summaries(3, kind)[0], h[roles == role].mean(0), atol=2e-3, rtol=2e-3)
    z, kept = whole.tokens(1)
    assert len(z) == len(kept) == 400 and set(kept.tolist()) == {TEXT, IMAGE, LAST, ANSWER}
    assert whole.pairs.tolist() == list(range(100)) and z.dtype == torch.float32


def test_text_only_rows_have_no_picture(tmp_path):
    store = make(tmp_path/'s', range(3), [(None, 'one'), (SQUARE, ''), (SQUARE, 'three')])
    image, text, both = (store.summaries(1, k) for k in ('image', 'text', 'both'))
    assert image[0].isnan().all() and text[1].isnan().all() and both.isfinite().all()
    assert torch.equal(both[0], text[0]) and torch.equal(both[1], image[1])


def test_moments_are_those_of_all_tokens(whole):
    z, roles = whole.tokens(1)
    z = z[(roles == TEXT) | (roles == IMAGE)]
    for ours, theirs in zip(whole.stats(1), (z.mean(0), z.std(0))): torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    m = Moments()
    with pytest.raises(ValueError, match='per_row'): m.stats()


def test_questions_that_have_no_answer(whole):
    with pytest.raises(ValueError, match=r'Layer 2 was not extracted: this store has \[1, 3\]'): whole.summaries(2)
    with pytest.raises(ValueError, match="Unknown summary 'sound'"): whole.summaries(1, 'sound')
    with pytest.raises(ValueError, match='not an activation store'): ActivationStore(whole.folder/'nowhere')
    with pytest.raises(ValueError, match='stimuli are empty'): make(whole.folder.parent/'none', [])
    for bad in ('per_row', 'shard', 'batch_size', 'max_tokens'):
        with pytest.raises(ValueError, match=f'{bad}=0'): make(whole.folder.parent/'none', **{bad: 0})
    with pytest.raises(IndexError): make(whole.folder.parent/'beyond', [5, 100])


def test_other_settings_are_refused_once_there_is_a_shard(tmp_path, whole):
    make(tmp_path/'s', range(20))
    for kw in (dict(seed=1), dict(shard=5), dict(dtype=torch.float32), dict(batch_size=8)):
        with pytest.raises(ValueError, match='other settings'): make(tmp_path/'s', range(20), **kw)
    with pytest.raises(IndexError): make(tmp_path/'t', [100])
    assert len(make(tmp_path/'t', range(20), batch_size=8)) == 2 # nothing was there yet: no need to delete


# ---- kill, damage, full disk

@pytest.mark.parametrize('moment', [0, 2, 5, 8])
def test_kill_and_resume_give_the_same_bits(tmp_path, whole, moment):
    "SIGKILL at some moment after so many shards, then go on."
    p = start(tmp_path/'s', .01)
    until = time.time() + 60
    while len(list((tmp_path/'s').glob('*.safetensors'))) < moment + 1 and time.time() < until and p.is_alive(): time.sleep(.001)
    p.kill(); p.join()
    killed = ActivationStore(tmp_path/'s')
    assert len(killed) < 10
    with pytest.raises(ValueError, match='run extract'): killed.summaries(1)
    mllm = Fake(); make(tmp_path/'s', mllm=mllm)
    assert every(tmp_path/'s') == every(whole.folder) and len(mllm.seen) <= 10*(10 - len(killed))


@pytest.mark.parametrize('step', range(12))
def test_death_before_every_write(tmp_path, whole, monkeypatch, step):
    "A process that stops before its n-th flush or rename leaves nothing that misleads."
    class Dead(BaseException): pass
    left = [step]
    def deadly(f):
        def g(*a):
            left[0] -= 1
            if left[0] < 0: raise Dead
            return f(*a)
        return g
    monkeypatch.setattr(os, 'fsync', deadly(os.fsync)); monkeypatch.setattr(os, 'replace', deadly(os.replace))
    with pytest.raises(Dead): make(tmp_path/'s', range(30))
    monkeypatch.undo()
    again = make(tmp_path/'s', range(30))
    assert [*bits(tmp_path/'s').values()] == [*bits(whole.folder).values()][:3] and not list((tmp_path/'s').glob('.*.part')) and len(again) == 3


@pytest.mark.parametrize('where', [0, 40, -1])
def test_a_flipped_byte_redoes_one_shard(tmp_path, whole, where):
    make(tmp_path/'s')
    path = tmp_path/'s'/'shard-00004.safetensors'
    data = bytearray(path.read_bytes()); data[where] ^= 16; path.write_bytes(data)
    store = ActivationStore(tmp_path/'s')
    for read in (lambda: store.summaries(1), lambda: store.stats(1), lambda: store.pairs, lambda: list(store)):
        with pytest.raises(ValueError, match='shard-00004.safetensors is damaged'): read()
    mllm = Fake()
    with pytest.warns(UserWarning, match='shard-00004.safetensors is damaged'): make(tmp_path/'s', mllm=mllm)
    assert mllm.seen == [t for _, t, _ in WORLD[40:50]] and every(tmp_path/'s') == every(whole.folder)


def test_damage_after_opening_is_seen(tmp_path):
    store = make(tmp_path/'s', range(20)); store.summaries(1)
    path = tmp_path/'s'/'shard-00001.safetensors'
    data = bytearray(path.read_bytes()); data[-5] ^= 1; path.write_bytes(data)
    with pytest.raises(ValueError, match='damaged'): store.summaries(1)


def test_damaged_record_and_manifest(tmp_path, whole):
    make(tmp_path/'s')
    (tmp_path/'s'/'shard-00002.json').write_text('{"sha')
    mllm = Fake(); make(tmp_path/'s', mllm=mllm)
    assert len(mllm.seen) == 10
    (tmp_path/'s'/'manifest.json').write_text('{')
    for f in (lambda: ActivationStore(tmp_path/'s'), lambda: make(tmp_path/'s')):
        with pytest.raises(ValueError, match='delete this one file'): f()
    (tmp_path/'s'/'manifest.json').unlink()
    with pytest.raises(ValueError, match='other settings'): make(tmp_path/'s', seed=1)
    mllm = Fake(); make(tmp_path/'s', mllm=mllm)
    assert not mllm.seen and every(tmp_path/'s') == every(whole.folder)


def test_full_disk(tmp_path, whole):
    "/dev/full refuses every byte, as a full disk does."
    folder = tmp_path/'s'; folder.mkdir()
    (folder/'.shard-00003.safetensors.0.part').symlink_to('/dev/full')
    with pytest.raises(OSError, match="Could not write shard-00003.safetensors .*make room and run again") as e: make(folder)
    assert e.value.errno == 28 and not list(folder.glob('.*.part'))
    assert [*bits(folder).values()] == [*bits(whole.folder).values()][:3] and len(ActivationStore(folder)) == 3
    mllm = Fake(); make(folder, mllm=mllm)
    assert len(mllm.seen) == 70 and every(folder) == every(whole.folder)


# ---- several processes

def test_two_processes_give_the_bits_of_one(tmp_path, whole):
    both = [start(tmp_path/'s', .003, RANK=str(r), WORLD_SIZE='2') for r in range(2)]
    for p in both: p.join(60); assert p.exitcode == 0
    assert every(tmp_path/'s') == every(whole.folder)


def test_accelerate_launch_gives_the_bits_of_one_process(tmp_path, whole):
    script = tmp_path/'work.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_activations import make\nmake({str(tmp_path/"s")!r})\n')
    launch = 'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0'
    done = subprocess.run([sys.executable, '-m', *launch.split(), str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert every(tmp_path/'s') == every(whole.folder)


def test_one_of_two_is_killed_and_one_process_goes_on(tmp_path, whole, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '1')
    half = make(tmp_path/'s')
    assert [n[6:11] for n in half.shards] == ['00001', '00003', '00005', '00007', '00009']
    with pytest.raises(ValueError, match='5 of 10 shards are not there yet'): half.stats(1)
    monkeypatch.setenv('WORLD_SIZE', '1'); monkeypatch.setenv('RANK', '0')
    mllm = Fake(); make(tmp_path/'s', mllm=mllm)
    assert len(mllm.seen) == 50 and every(tmp_path/'s') == every(whole.folder)
    monkeypatch.setenv('RANK', '3')
    with pytest.raises(ValueError, match='RANK=3 of WORLD_SIZE=1'): make(tmp_path/'s')


# ---- bad pairs

def test_bad_pairs_are_skipped_by_name(tmp_path):
    broken = tmp_path/'broken.png'; Image.effect_noise((64, 64), 9).save(broken); broken.write_bytes(broken.read_bytes()[:900])
    class Lazy(list):
        def __getitem__(self, i):
            if i == 1: raise OSError('connection lost')
            return super().__getitem__(i)
    pairs = Lazy([(Image.new('RGB', (0, 0)), 'a'), None, (broken, 'b'), (Image.new('1', (30_000, 30_000)), 'c'), (tmp_path/'none.png', 'd'), (SQUARE, 7),
                  (None, '  '), (Image.new('RGB', (200, 2)), 'wide'), (SQUARE, 'long '*10_000), (SQUARE, 'fine', 'long '*10_000), (SQUARE, None), (SQUARE, 'x'*70_000)])
    with pytest.warns(UserWarning) as said: store = make(tmp_path/'s', range(12), pairs, batch_size=6)
    assert set(store.skipped) == {0, 1, 2, 3, 4, 5, 6, 7} and store.pairs.tolist() == [8, 9, 10, 11] and store.cut == 3
    for p, why in {0: '0 x 0', 1: 'connection lost', 2: 'Cannot read', 3: '30000 x 30000', 5: 'int', 6: 'Neither', 7: 'too wide'}.items(): assert why in store.skipped[p]
    assert json.loads((tmp_path/'s'/'manifest.json').read_text())['counts'] == dict(read=4, cut=3, skipped=8)
    assert {'8 of 12 pairs', '3 pairs had a text'} == {w.message.args[0].split(' could')[0].split(' of more')[0] for w in said if w.category is UserWarning}
    assert [n for s in store for n in s['n_text'].tolist()] == [512, 1, 0, 1]
    with pytest.warns(UserWarning): assert make(tmp_path/'s', range(12), pairs, batch_size=6).skipped == store.skipped # said again, not read again


def test_nan_and_overflow_are_named(tmp_path):
    mllm = Fake(broken={WORLD[2][1]: (3, torch.nan), WORLD[5][1]: (1, 1e5)})
    with pytest.warns(UserWarning, match='2 of 20 pairs'): store = make(tmp_path/'s', range(20), mllm=mllm)
    assert 'Layer 3' in store.skipped[2] and 'Layer 1' in store.skipped[5] and set(store.skipped) == {2, 5}
    assert store.summaries(1).isfinite().all() and store.tokens(3)[0].isfinite().all() and len(store.pairs) == 18
    wide = make(tmp_path/'w', [5], mllm=mllm, dtype=torch.float32)
    assert not wide.skipped and wide.summaries(1, 'text').max() == 1e5


def test_an_empty_shard_passes_but_an_empty_store_does_not(tmp_path):
    pairs = [(SQUARE, 'a')]*10 + [(Image.new('RGB', (0, 0)), 'b')]
    with pytest.warns(UserWarning, match='1 of 11'): store = make(tmp_path/'s', range(11), pairs)
    assert len(store) == 2 and len(store.summaries(3, 'last')) == 10 and len(store.stats(1)[0]) == 8
    with pytest.raises(ValueError, match='Nothing is left'): make(tmp_path/'t', [10], pairs)


# ---- memory, and stores of before

def test_one_shard_at_a_time(whole, monkeypatch):
    "While a store is read in a loop, only one tensor of one shard is asked for at a time."
    asked = []
    read = Shard.__getitem__
    monkeypatch.setattr(Shard, '__getitem__', lambda self, key: (asked.append((self.path.name, key)), read(self, key))[1])
    for i, shard in enumerate(whole):
        shard.summaries(1, 'text')
        assert {n for n, _ in asked} == {f'shard-{k:05d}.safetensors' for k in range(i + 1)} and not [k for _, k in asked if 'tokens' in k or k.startswith('3.')]


def test_a_store_without_records_can_be_read(tmp_path, whole):
    "Stores of the first version: checksums in the manifest, fewer tensors."
    from safetensors.torch import load_file, save_file
    folder, shards = tmp_path/'old', {}
    folder.mkdir()
    for s in whole:
        save_file({k: v for k, v in load_file(s.path).items() if not k.startswith('n_') and '.last' not in k}, folder/s.path.name)
        shards[s.path.name] = hashlib.sha256((folder/s.path.name).read_bytes()).hexdigest()
    (folder/'manifest.json').write_text(json.dumps(dict(model='fake', layers=[1, 3], pairs='x', per_row=4, shard=10, seed=0, shards=shards)))
    old = ActivationStore(folder)
    assert torch.equal(old.summaries(3), whole.summaries(3)) and torch.equal(old.tokens(1)[0], whole.tokens(1)[0]) and not old.skipped
    with pytest.raises(ValueError, match="no '3.last'"): old.summaries(3, 'last')
