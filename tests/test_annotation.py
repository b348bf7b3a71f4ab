"Faults and edges of daco_nb.annotation; tensors only."
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from daco_nb import annotation as A
from daco_nb.demo import ASSETS
from daco_nb.concepts import load_concepts

NAMES = ['bomb', 'gun', 'help', 'care', 'chair', 'table']
LABELS = dict(bomb='undesirable', gun='undesirable', help='desirable', care='desirable', chair='neither', table='neither')


def world(m=40, d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return SimpleNamespace(names=NAMES, vectors=torch.randn(6, d, generator=g)), SimpleNamespace(W_dec=torch.randn(m, d, generator=g))


def write(path, text):
    path.write_text(text, encoding='utf-8')
    return path


# labels

def test_shipped_labels_fit_the_concepts():
    labels, names = A.load_labels(), [c.name for c in load_concepts()]
    assert list(labels) == names and set(labels.values()) == set(A.LABELS)
    assert sum(v == 'undesirable' for v in labels.values()) >= 60
    assert all(labels[n] == 'undesirable' for n in ('weapon', 'bomb', 'pistol', 'cigarette', 'cocaine', 'poison', 'theft'))
    assert all(labels[n] == 'neither' for n in ('cat', 'hammer', 'scissors', 'fire extinguisher', 'money', 'credit card'))
    assert all(r['reason'] and r['source'] in ('rule', 'review') for r in A.read_table(ASSETS/'labels.csv', ('reason', 'source')))


@pytest.mark.parametrize('text, words', [
    ('concept\nbomb\n', "lacks the column 'label'"), ('concept,label\nbomb,bad\n', 'line 2.*desirable'),
    ('concept,label\nbomb,\n', 'unknown label'), ('concept,label\nbomb,neither\nbomb,desirable\n', 'line 3.*labelled twice'),
    ('concept,label\nbom,neither\n', "line 2: unknown concept 'bom'")])
def test_bad_label_files(tmp_path, text, words):
    with pytest.raises(ValueError, match=words): A.load_labels(write(tmp_path/'l.csv', text), known=NAMES)


def test_merge_leaves_the_original(tmp_path):
    new = A.merge_labels(LABELS, write(tmp_path/'l.csv', 'concept,label,note\ngun,neither,mine\n'))
    assert new['gun'] == 'neither' and LABELS['gun'] == 'undesirable' and list(new) == list(LABELS)


# centroids

def test_single_centroid_is_the_mean_of_unit_rows():
    D, _ = world()
    big = SimpleNamespace(names=NAMES, vectors=D.vectors*torch.tensor([1, 100, 3, 4, 5, 6.])[:, None])
    for k, rows in ((-1, [0, 1]), (1, [2, 3])):
        assert torch.allclose(A.centroids(D, LABELS)[k][0], normalize(D.vectors[rows], dim=1).mean(0))
        assert torch.allclose(A.centroids(big, LABELS)[k], A.centroids(D, LABELS)[k], atol=1e-6) # lengths don't matter


def test_as_many_centroids_as_concepts():
    D, _ = world()
    C = A.centroids(D, LABELS, n_centroids=2)
    dist, _ = A.nearest_distance(D.vectors[:2], C[-1])
    assert dist.abs().max() < 1e-5
    for k in (0, 3):
        with pytest.raises(ValueError, match='choose 1 to 2'): A.centroids(D, LABELS, n_centroids=k)


def test_a_side_without_concepts():
    D, sae = world()
    with pytest.raises(ValueError, match="'desirable'"): A.annotate(sae, D, dict(bomb='undesirable'))
    with pytest.raises(ValueError, match="'undesirable'"): A.annotate(sae, D, dict(help='desirable'))


# Eq. 9

@pytest.mark.parametrize('eta', [.3, .8, (1.1, .5), (0., 2.), 2.])
def test_against_a_loop(eta):
    D, sae = world()
    a, (e_minus, e_plus) = A.annotate(sae, D, LABELS, eta), A.check_eta(eta)
    C = {k: normalize(v, dim=1)[0] for k, v in A.centroids(D, LABELS).items()}
    for w, label in zip(normalize(sae.W_dec, dim=1), a.label.tolist()):
        minus, plus = (1 - w@C[-1]).item(), (1 - w@C[1]).item()
        near = [(d, k) for d, k, e in ((minus, -1, e_minus), (plus, 1, e_plus)) if d <= e]
        assert label == (min(near)[1] if near else 0)


def test_labels_only_grow_with_eta():
    D, sae = world()
    counts = [(A.annotate(sae, D, LABELS, e).label != 0).sum().item() for e in (0, .5, 1, 1.5, 2)]
    assert counts == sorted(counts) and counts[-1] == 40


def test_tie_is_undesirable():
    assert A.mark(torch.tensor([[.2, .2]]), torch.zeros(1), (.5, .5), 'centroid').tolist() == [-1]
    assert A.mark(torch.tensor([[.5, .6]]), torch.zeros(1), (.5, .5), 'centroid').tolist() == [-1] # the edge counts
    assert A.mark(torch.tensor([[.2, .3]]), torch.zeros(1), (.1, .5), 'centroid').tolist() == [1]


def test_nearest_rule_takes_the_neighbours_label():
    D, _ = world()
    a = A.annotate(SimpleNamespace(W_dec=D.vectors + .01), D, LABELS, .2, rule='nearest')
    assert a.nearest == NAMES and a.label.tolist() == [-1, -1, 1, 1, 0, 0]
    assert A.annotate(SimpleNamespace(W_dec=-D.vectors), D, LABELS, .2, rule='nearest').label.abs().sum() == 0


@pytest.mark.parametrize('rule', ['centroid', 'nearest'])
def test_relabel_equals_annotate(rule):
    D, sae = world()
    a = A.annotate(sae, D, LABELS, 2., rule)
    for eta in (.4, .9, (.7, 1.2)): assert torch.equal(A.relabel(a, eta).label, A.annotate(sae, D, LABELS, eta, rule).label)


def test_dead_atoms_and_half_precision():
    D, sae = world()
    sae.W_dec[3] = 0
    a = A.annotate(SimpleNamespace(W_dec=torch.nn.Parameter(sae.W_dec.half())), D, LABELS, .5)
    assert a.distance.isfinite().all() and a.label[3] == 0 and a.label.dtype == torch.int8 and not a.distance.requires_grad


@pytest.mark.parametrize('kw, words', [
    (dict(eta=-.1), r'\[0, 2\]'), (dict(eta=2.1), r'\[0, 2\]'), (dict(eta=(.1, .2, .3)), 'eta='), (dict(eta=float('nan')), 'eta='), (dict(rule='far'), "'far'")])
def test_annotate_refuses(kw, words):
    D, sae = world()
    with pytest.raises(ValueError, match=words): A.annotate(sae, D, LABELS, **kw)


def test_widths_must_agree():
    D, _ = world()
    with pytest.raises(ValueError, match='width 5, concept vectors 12'): A.annotate(SimpleNamespace(W_dec=torch.ones(3, 5)), D, LABELS)


def test_inputs_are_untouched():
    D, sae = world()
    before = D.vectors.clone(), sae.W_dec.clone(), dict(LABELS)
    A.annotate(sae, D, LABELS, .7, n_centroids=2)
    assert torch.equal(D.vectors, before[0]) and torch.equal(sae.W_dec, before[1]) and LABELS == before[2]


# files

def saved(tmp_path):
    D, sae = world()
    a = A.annotate(sae, D, LABELS, (.7, .9), n_centroids=2)
    A.save_atoms(a, tmp_path/'atoms')
    return a, tmp_path/'atoms'


def test_round_trip(tmp_path):
    a, folder = saved(tmp_path)
    b = A.load_atoms(folder)
    assert repr(a) == repr(b) and a.nearest == b.nearest and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ('label', 'distance', 'cosine'))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError, match='already there'): A.save_atoms(a, folder)


def test_wrong_version_and_mixed_files(tmp_path):
    _, folder = saved(tmp_path)
    rest = json.loads((folder/'atoms.json').read_text())
    write(folder/'atoms.json', json.dumps({**rest, 'version': 99}))
    with pytest.raises(ValueError, match='version 99'): A.load_atoms(folder)
    write(folder/'atoms.json', json.dumps({**rest, 'nearest': ['bomb']}))
    with pytest.raises(ValueError, match='do not belong together'): A.load_atoms(folder)


# the probe

def test_probe_round_trip_and_foreign_file(tmp_path):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(300, 6, generator=g) * torch.tensor([1., 20., 1., 1., 1., .01]) + 5
    found = X[:, 1] + X[:, 5] * 100 > 505
    probe = A.fit_probe(X, found.tolist(), layer=4, C=1.)
    assert ((probe(X) > 0) == found).float().mean() > .9
    A.save_probe(probe, tmp_path / 'p.safetensors')
    again = A.load_probe(tmp_path / 'p.safetensors')
    assert again.layer == 4 and torch.allclose(again(X), probe(X)) and sorted(x.name for x in tmp_path.iterdir()) == ['p.safetensors']
    with pytest.raises(ValueError, match='holds no probe'):
        A.load_probe(ASSETS / 'manners.safetensors')


def test_probe_ignores_scale_and_order():
    g = torch.Generator().manual_seed(1)
    X, found = torch.randn(80, 4, generator=g), [i % 2 == 0 for i in range(80)]
    scale, order = torch.tensor([.1, 10., 3., 1.]), torch.randperm(80, generator=g)
    a, b = A.fit_probe(X, found, 0), A.fit_probe((X * scale + 2)[order], [found[i] for i in order], 0)
    assert torch.allclose(a(X), b(X * scale + 2), atol=1e-3)


def test_phrases_of_splits_do_not_meet():
    said = {s: {p for _, p, _ in A.harm_phrases(s)} for s in ('train', 'validation', 'test')}
    assert not said['train'] & (said['validation'] | said['test']) and len(said['train']) > 1500
    for split in ('train', 'validation', 'test'):  # the question does not give the answer away
        asked = {h: sorted(q for q, _, harm in A.harm_phrases(split)[:200] if harm == h) for h in (True, False)}
        assert set(asked[True]) == set(asked[False])
    with pytest.raises(ValueError, match='is missing'):
        A.load_probe(ASSETS / 'nothing.safetensors')


def test_spoken_reads_the_phrase_alone():
    from daco_nb.mllm import MLLM
    mllm = MLLM.demo()
    said = ['fake passports', 'a very long walk in the hills']
    X = A.spoken(mllm, ['What is this?'] * 2, said, 3)
    for i, p in enumerate(said):  # one by one, positions found by hand
        batch = mllm.prepare(['What is this?'], answers=[f'It says "{p}".'])
        ids = mllm.tokenizer(f'It says "{p}".', add_special_tokens=False)['input_ids']
        own = [k for k, t in enumerate(mllm.tokenizer.convert_ids_to_tokens(ids)) if t.strip('Ġ".') and t.strip('Ġ') not in ('It', 'says')]
        h = mllm.read(batch, [3])[3][0][-len(ids):]
        assert torch.allclose(X[i], h[own].mean(0), atol=1e-4)


# the vote

def test_votes_against_a_loop():
    D, sae = world()
    kind = torch.tensor([A.LABELS[LABELS[n]] for n in NAMES])
    for n in (1, 3, 6, 50):
        got = A.votes_against(sae.W_dec, D.vectors, kind, n)
        for w, row in zip(normalize(sae.W_dec, dim=1), got):
            cos = normalize(D.vectors, dim=1)@w
            best = cos.argsort(descending=True)[:n]
            weight = cos[best].clamp(min=0)
            for k, against in zip((-1, 1), row):
                assert abs(against - (1 - weight[kind[best] == k].sum()/weight.sum().clamp(min=1e-9))) < 1e-5


def test_vote_of_one_is_the_nearest_concept():
    D, sae = world()
    one, nearest = A.annotate(sae, D, LABELS, .5, 'vote', n_neighbours=1), A.annotate(sae, D, LABELS, 2., 'nearest')
    assert torch.equal(one.label, nearest.label) and one.nearest == nearest.nearest
    assert torch.equal(A.relabel(A.annotate(sae, D, LABELS, 1., 'vote'), .5).label, A.annotate(sae, D, LABELS, .5, 'vote').label)


def test_vote_files_and_refusal(tmp_path):
    D, sae = world()
    a = A.annotate(sae, D, LABELS, .5, 'vote', n_neighbours=3)
    A.save_atoms(a, tmp_path/'a')
    assert A.load_atoms(tmp_path/'a').n_neighbours == 3
    rest = json.loads((tmp_path/'a'/'atoms.json').read_text())
    del rest['n_neighbours']  # a file of before there were votes
    write(tmp_path/'a'/'atoms.json', json.dumps(rest))
    assert torch.equal(A.load_atoms(tmp_path/'a').label, a.label)
    with pytest.raises(ValueError, match='n_neighbours=0'): A.annotate(sae, D, LABELS, rule='vote', n_neighbours=0)
