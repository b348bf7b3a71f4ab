"The dictionary: streaming against the plain way, honest quality, parts and merges, files, errors."
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from daco_nb.activations import ActivationStore
from daco_nb.demo import ASSETS
from daco_nb.dictionary import (Behaviour, ConceptDictionary, auc, edges, halved, load_dictionary, pair_hash, save_dictionary,
                                with_behaviours)
from daco_nb.mllm import IMAGE, LAST

WIDTH = 16


def seeded(seed): return torch.Generator().manual_seed(seed)


def write(folder, Z, size=10, pairs=None, skipped=(), layer=2):
    "A store whose summaries are `Z`: some noise is added to the text, and taken from the image."
    folder.mkdir(parents=True)
    pairs = torch.arange(len(Z)) if pairs is None else pairs
    g, shards = seeded(9), {}
    off = torch.randn(Z.shape, generator=g)
    for k in range(0, len(Z), size):
        at = slice(k, k + size)
        t = {f'{layer}.text': Z[at] + off[at], f'{layer}.image': Z[at] - off[at], f'{layer}.last': Z[at], 'pairs': pairs[at],
             f'{layer}.tokens': torch.cat([Z[at], Z[at] + 1]), 'roles': torch.tensor([IMAGE, LAST], dtype=torch.int8).repeat_interleave(len(Z[at]))}
        name = f'shard-{k//size:05d}.safetensors'
        save_file({n: v.contiguous() for n, v in t.items()}, folder/name)
        shards[name] = hashlib.sha256((folder/name).read_bytes()).hexdigest()
    (folder/'manifest.json').write_text(json.dumps(dict(model='made', layers=[layer], shards=shards)))
    record = dict(sha256=shards['shard-00000.safetensors'], skipped={str(p): 'broken' for p in skipped}, cut=0, read=size)
    if skipped: (folder/'shard-00000.json').write_text(json.dumps(record))
    return ActivationStore(folder)


def table(rows): return Dataset.from_dict(dict(zip(('concept', 'pair', 'positive'), map(list, zip(*rows)))))


def random_table(seed, pairs=60, concepts=7):
    "Random stimuli with both sides, some rows twice, in no order."
    rng = np.random.default_rng(seed)
    rows = [(f'c{c}', int(p), bool(s)) for c in range(concepts) for s in (0, 1) for p in rng.choice(pairs, rng.integers(2, 9), replace=False)]
    rows += [rows[i] for i in rng.integers(len(rows), size=8)]
    return table([rows[i] for i in rng.permutation(len(rows))])


@pytest.fixture(scope='module')
def Z(): return torch.randn(60, WIDTH, generator=seeded(0)) + 200*torch.eye(WIDTH)[3] # one huge dimension


@pytest.fixture(scope='module')
def store(Z, tmp_path_factory): return write(tmp_path_factory.mktemp('dictionary')/'store', Z)


# ---- reading

@pytest.mark.parametrize('seed', range(4))
def test_stream_equals_the_plain_way(store, Z, seed):
    t = random_table(seed)
    D = ConceptDictionary.from_activations(store, t, 2)
    X = (Z - Z.mean(0))/Z.std(0)
    for name in D.names:
        pos, neg = ({p for c, p, s in zip(t['concept'], t['pair'], t['positive']) if c == name and s == side} for side in (True, False))
        torch.testing.assert_close(D[name], X[list(pos)].mean(0) - X[list(neg)].mean(0), atol=2e-4, rtol=1e-3)
        assert D.support[D.row(name)].item() == pytest.approx(2/(1/len(pos) + 1/len(neg)))
    assert D.names == list(dict.fromkeys(t['concept'])) and (D.mean - Z.mean(0)).abs().max() < 1e-4


def test_quality_is_the_split_half_by_hand(store, Z):
    t = random_table(1)
    D, e = ConceptDictionary.from_activations(store, t, 2, seed=5), halved(edges(t), 5)
    X, at = (Z - Z.mean(0))/Z.std(0), D.names.index('c2')
    one = e.concept == e.names.index('c2')
    mean = lambda s, h: X[e.pair[one & (e.positive == s) & (e.half == h)]].mean(0)
    halves = [mean(True, h) - mean(False, h) for h in (False, True)]
    assert D.quality[at].item() == pytest.approx(torch.cosine_similarity(*halves, dim=0).item(), abs=1e-3)
    area, couples = 0, 0
    for h in (False, True):
        mine = one & (e.half == h)
        m = e.positive[mine].sum()*(~e.positive[mine]).sum()
        area += m*roc_auc_score(e.positive[mine], (X[e.pair[mine]]@halves[1 - h]).numpy()); couples += m
    assert D.separation[at].item() == pytest.approx(area/couples, abs=1e-6)


def test_how_shards_are_cut_does_not_matter(Z, tmp_path):
    t = random_table(3)
    a, b = (ConceptDictionary.from_activations(write(tmp_path/str(n), Z, n), t, 2) for n in (7, 60))
    for k in ('vectors', 'mean', 'std', 'quality', 'separation'): torch.testing.assert_close(getattr(a, k), getattr(b, k), atol=1e-3, rtol=1e-3)


def test_the_store_is_never_joined(store, monkeypatch):
    for joined in ('summaries', 'tokens'): monkeypatch.setattr(ActivationStore, joined, lambda *a: pytest.fail('loads everything'))
    assert len(ConceptDictionary.from_activations(store, random_table(0), 2)) == 7


def test_noise_is_not_called_good(tmp_path):
    "Separation is not circular: on pure noise it is at chance, where a vector judged on its own stimuli would look perfect."
    g = seeded(3)
    store = write(tmp_path/'noise', torch.randn(800, 64, generator=g), 100)
    order = torch.randperm(800, generator=g).tolist()
    t = table([(f'c{k}', p, i < 8) for k in range(50) for i, p in enumerate(order[16*k:16*k + 16])])
    D = ConceptDictionary.from_activations(store, t, 2, kind='last')
    assert abs(D.separation.mean() - .5) < .1 and abs(D.quality.mean()) < .1 and len(D.weak()) > 45
    assert (D.support == 8).all()


def test_signal_is_called_good_and_noise_beside_it_weak(tmp_path):
    X = torch.randn(80, 8, generator=seeded(4)); X[:20, 5] += 6
    rows = [('real', p, p < 20) for p in range(40)] + [('chance', p, p % 2 == 0) for p in range(40, 80)] + [('single', p, p == 0) for p in (0, 41, 42)]
    D = ConceptDictionary.from_activations(write(tmp_path/'s', X), table(rows), 2, kind='last')
    assert D.separation[0] > .9 and D.quality[0] > .6 and 'real' not in D.weak() and {'chance', 'single'} <= set(D.weak())
    assert D.quality[2].isnan() and D.vectors[2].isfinite().all()


def test_halves_are_equal_deterministic_and_seeded():
    t = random_table(0)
    e = halved(edges(t), 1)
    for c in range(7):
        for s in (True, False):
            mine = e.half[(e.concept == c) & (e.positive == s)]
            assert 0 <= (~mine).sum() - mine.sum() <= 1
    assert (e.half != halved(edges(t), 2).half).any()
    assert set(zip(e.concept, e.pair, e.positive, e.half)) == set(zip(*(lambda f: (np.array([e.names.index(n) for n in f.names])[f.concept], f.pair, f.positive, f.half))(halved(edges(t.shuffle(seed=4)), 1))))
    assert pair_hash(np.arange(9), 3).tolist() == pair_hash(np.arange(9), 3).tolist() and len(set(pair_hash(np.arange(10_000)).tolist())) == 10_000
    assert abs((pair_hash(np.arange(10_000)) >> np.uint64(63) == 1).mean() - .5) < .02


def test_auc():
    rng = np.random.default_rng(0)
    for n in (2, 5, 60):
        score, pos = rng.integers(0, 9, n).astype(float), np.arange(n) % 2 == 0
        assert auc(score, pos) == pytest.approx(roc_auc_score(pos, score))
    assert np.isnan(auc(np.ones(3), np.ones(3, dtype=bool)))


# ---- stimuli and stores that don't fit

def test_stimuli_errors(store, Z, tmp_path):
    read = lambda t, s=store, **kw: ConceptDictionary.from_activations(s, t, kw.pop('layer', 2), **kw)
    with pytest.raises(ValueError, match='concept list is empty'): read(table([('a', 1, True)]).select([]))
    with pytest.raises(ValueError, match=r"One-sided stimuli: 1 concepts have no negative.*'a'"): read(table([('a', 1, True), ('b', 1, True), ('b', 2, False)]))
    with pytest.raises(ValueError, match="One-sided.*no positive.*'a'"): read(table([('a', 1, False)]))
    with pytest.raises(ValueError, match='2 pairs of the stimuli have no activations .pair 60'): read(table([('a', 1, True), ('a', 60, False), ('a', 99, False)]))
    with pytest.raises(ValueError, match='Layer 5 was not extracted'): read(random_table(0), layer=5)
    with pytest.raises(ValueError, match="Unknown summary 'smell'"): read(random_table(0), kind='smell')
    bad = Z.clone(); bad[33, 2] = torch.nan
    with pytest.raises(ValueError, match='shard-00003.safetensors holds NaN'): read(random_table(0), write(tmp_path/'nan', bad))


def test_skipped_pairs_are_left_out(Z, tmp_path):
    keep = torch.arange(60)[torch.arange(60) != 4]
    store = write(tmp_path/'s', Z[keep], pairs=keep, skipped=[4])
    rows = [('a', 4, True), ('a', 5, True), ('a', 6, False), ('b', 7, True), ('b', 8, False)]
    D = ConceptDictionary.from_activations(store, table(rows), 2)
    torch.testing.assert_close(D['a']*D.std, Z[5] - Z[6], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match='One-sided'): ConceptDictionary.from_activations(store, table(rows[:1] + rows[2:]), 2)


# ---- parts, merging, adding

@pytest.fixture(scope='module')
def D(store): return ConceptDictionary.from_activations(store, random_table(2), 2)


def test_adding_equals_reading_at_once(store, D):
    t = random_table(2)
    old, new = (t.filter(lambda c: (c in ('c1', 'c5')) == side, input_columns='concept') for side in (False, True))
    grown = ConceptDictionary.from_activations(store, old, 2).add(store, new)
    for k in ('vectors', 'quality', 'separation', 'support'): torch.testing.assert_close(getattr(grown.select(D.names), k), getattr(D, k), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="'c1', for one"): grown.add(store, new)


def test_add_refuses_another_width(D, tmp_path):
    other = write(tmp_path/'narrow', torch.randn(60, 8, generator=seeded(0)))
    with pytest.raises(ValueError, match='width 8, dictionary of width 16'): D.add(other, random_table(0))


def test_merge_of_parts_is_the_whole(D):
    b = Behaviour(2, torch.ones(WIDTH), torch.zeros(WIDTH))
    whole = replace(D.select(D.names[:3]), behaviours={'x': b}).merge(D.select(D.names[3:]))
    assert whole.names == D.names and torch.equal(whole.vectors, D.vectors) and set(whole.behaviours) == {'x'}
    rest = D.select(D.names[3:])
    for wrong, why in ((replace(rest, layer=3), 'Layers 2 and 3'), (replace(rest, std=rest.std*2), 'standardised differently'), (D, '3 names are in both'),
                       (ConceptDictionary(['n'], torch.ones(1, 4), torch.zeros(4), torch.ones(4), 2, torch.ones(1)), 'Widths 16 and 4'),
                       (replace(rest, behaviours={'x': Behaviour(2, torch.zeros(WIDTH), torch.ones(WIDTH))}), "behaviour 'x'")):
        with pytest.raises(ValueError, match=why): replace(D.select(D.names[:3]), behaviours={'x': b}).merge(wrong)


def test_select_and_names(D):
    part = D.select(['c3', 'c0'])
    assert part.names == ['c3', 'c0'] and torch.equal(part['c3'], D['c3']) and part.support[1] == D.support[D.row('c0')]
    assert len(D.select([])) == 0
    with pytest.raises(KeyError, match="No concept 'c33'; perhaps .*'c3'"): D.select(['c33'])
    with pytest.raises(ValueError, match="'c0' is named twice"): D.select(['c0', 'c0'])


def test_under_a_synset():
    D = load_dictionary()
    birds, animals = D.under('bird'), D.under('animal')
    assert {'owl', 'penguin', 'bird'} <= set(birds.names) < set(animals.names) and 'pizza' not in animals.names
    own = replace(birds, names=[f'my {n}' for n in birds.names])
    with pytest.raises(ValueError, match="kind of 'animal'"): own.under('animal')


def test_wrong_rows_are_refused(D):
    with pytest.raises(ValueError, match='2 names but 7 rows of vectors'): replace(D, names=['a', 'b'])
    with pytest.raises(ValueError, match="vector of 'c"): replace(D, vectors=D.vectors*torch.nan)
    with pytest.raises(ValueError, match='standardisation of width 4'): replace(D, mean=torch.zeros(4))


# ---- files

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.int8])
def test_files(D, tmp_path, dtype):
    D = replace(D, behaviours={'x': Behaviour(4, torch.ones(WIDTH), torch.zeros(WIDTH))})
    save_dictionary(D, tmp_path/'D', dtype); again = load_dictionary(tmp_path/'D')
    bound = {torch.float32: 0, torch.float16: 2**-11, torch.int8: 1/254}[dtype]*D.vectors.abs().amax(1, keepdim=True)
    assert ((again.vectors - D.vectors).abs() <= 1.001*bound).all() and again.names == D.names and again.behaviours['x'].layer == 4
    for k in ('mean', 'std', 'quality', 'separation', 'support'): assert torch.equal(getattr(again, k).nan_to_num(-9), getattr(D, k).nan_to_num(-9))


def test_file_errors(D, tmp_path):
    with pytest.raises(ValueError, match='No dictionary'): load_dictionary(tmp_path)
    with pytest.raises(ValueError, match='does not fit'): save_dictionary(replace(D, vectors=D.vectors + 1e5), tmp_path/'D')
    save_dictionary(D, tmp_path/'D')
    file = tmp_path/'D'/'dictionary.safetensors'; file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match='damaged'): load_dictionary(tmp_path/'D')


def test_the_shipped_dictionary():
    D = load_dictionary()
    assert len(D) == 872 and D.layer == 14 and D.names[-1] == 'refusal' and D.separation[-1].isnan()
    assert D.separation[:-1].min() > .4 and D.separation[:-1].mean() > .9 and D.support[:-1].eq(12).all()
    assert torch.equal(D.vectors[-1].half(), (D.behaviours['refusal'].direction/D.std).half())
    assert sorted(p.name for p in (ASSETS/'llava'/'kit'/'dictionary').iterdir()) == ['dictionary.json', 'dictionary.safetensors']


def test_behaviours_as_rows(D):
    b = replace(D, behaviours={'x': Behaviour(2, D.std.clone(), torch.zeros(WIDTH)), 'late': Behaviour(3, D.std, D.std)})
    more = with_behaviours(b, ['x'])
    assert torch.allclose(more['x'], torch.ones(WIDTH)) and more.support[-1].isnan() and 'x' not in more.weak()
    with pytest.raises(ValueError, match='read at layer 3'): with_behaviours(b, ['late'])
