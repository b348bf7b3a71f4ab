"Faults and edges of daco_nb.stimuli; no model is loaded."
from zlib import crc32

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from daco_nb import stimuli as S
from daco_nb.demo import by_name, drawings, phrases


class Encoder:
    "Unit vectors from a hash of the text, or of the picture's mean colour."
    calls = 0

    def encode_texts(self, texts):
        rows = [torch.randn(16, generator=torch.Generator().manual_seed(crc32(t.encode()))) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def encode_images(self, images):
        type(self).calls += 1
        return self.encode_texts([str(np.asarray(im).sum()) for im in images])


def pairs(n): return [(Image.new('RGB', (4, 4), (i, 0, 0)), f'caption {i}') for i in range(n)]


def write(path, text):
    path.write_text(text, encoding='utf-8')
    return path


# concepts

def test_shipped_concepts():
    concepts = S.load_concepts()
    assert len(concepts) >= 300
    assert len({c.name for c in concepts}) == len({c.synset for c in concepts}) == len(concepts)
    assert all(c.name == c.name.lower() and '.n.' in c.synset and c.lexname.startswith('noun.') for c in concepts)
    assert all(c.hypernyms[-1] == 'entity' or 'entity' in c.hypernyms for c in concepts)
    assert all(c.drawing in by_name() for c in concepts if c.drawing)


@pytest.mark.parametrize('text, words', [
    ('concept,synset\ncat,cat.n.01\n', "lacks the column 'lexname'"),
    ('', "lacks the column 'concept'"),
    ('concept,synset,lexname,hypernyms,drawing\n', 'empty'),
    ('concept,synset,lexname,hypernyms,drawing\ncat,a,b,c,\ncat,a,b,c,\n', "'cat' comes twice"),
    ('concept,synset,lexname,hypernyms,drawing\n ,a,b,c,\n', 'no concept name'),
])
def test_bad_concept_files(tmp_path, text, words):
    with pytest.raises(ValueError, match=words): S.load_concepts(write(tmp_path/'c.csv', text))


def test_names_of_other_types():
    with pytest.raises(ValueError, match='no concept name'): S.concept_names(['cat', 3])


# similarity and distance

def test_similarity_ends():
    s = S.similarity(torch.tensor([-1.1, -1., 0., 1., 1.1]))
    assert s.tolist() == pytest.approx([1e-4, 1e-4, .5, 1, 1])
    assert S.similarity(-1., eps=.01).item() == pytest.approx(.01)
    with pytest.raises(ValueError, match='NaN'): S.similarity(torch.tensor([0., torch.nan]))


def test_distance_is_finite_and_monotone():
    cos = torch.linspace(-1, 1, 201)
    d = S.geometric_distance(S.similarity(cos), S.similarity(torch.tensor(.3)).expand(201))
    assert d.isfinite().all() and (d.diff() <= 0).all()
    assert S.geometric_distance(1., 1.).item() == 0


def test_distance_by_hand():
    assert S.geometric_distance(.5, .25).item() == pytest.approx((np.log(8))**.5)
    a, b = torch.rand(2, 50).clamp(min=.01)
    assert torch.equal(S.geometric_distance(a, b), S.geometric_distance(b, a))


@pytest.mark.parametrize('s', [0., -1., 1.01, float('nan')])
def test_distance_refuses(s):
    with pytest.raises(ValueError, match='similarity'): S.geometric_distance(s, .5)


# corpus

def test_corpus_is_a_seed_and_an_index():
    a, b = S.DemoCorpus(2000), S.DemoCorpus(900)
    assert len(a) == 2000 and a.shows(800) == b.shows(800)
    assert [a.shows(i) for i in range(4)] != [S.DemoCorpus(2000, seed=1).shows(i) for i in range(4)]
    every = {*drawings(), *phrases('train')}
    c = S.DemoCorpus(2*len(every))
    assert {text or subjects[0] for subjects, text in map(c.shows, range(len(every), 2*len(every)))} == every


def test_corpus_bounds():
    for i in (-1, 5):
        with pytest.raises(IndexError, match='corpus of 5'): S.DemoCorpus(5)[i]
    with pytest.raises(ValueError, match='at least one'): S.DemoCorpus(0)


@pytest.mark.parametrize('pair, words', [
    (('x.png', 'a cat'), 'a str where'), ((Image.new('RGB', (2, 2)), None), 'no caption'),
    ((Image.new('RGB', (2, 2)), '  '), 'no caption'), ((1,), 'could not be read'), (3, 'could not be read')])
def test_broken_pair_is_named(pair, words):
    with pytest.raises(ValueError, match='Pair 2 .*' + words): S.embed_corpus([*pairs(2), pair], Encoder())


def test_modes_become_rgb():
    images, _ = S.read_pairs([(Image.new('L', (3, 3)), 'gray'), (Image.new('RGBA', (3, 3)), 'clear')], 0, 2)
    assert [im.mode for im in images] == ['RGB', 'RGB']


# embedding

def test_shards_resume(tmp_path):
    corpus, enc = pairs(25), Encoder()
    plain = S.embed_corpus(corpus, enc)
    first = S.embed_corpus(corpus, enc, tmp_path, shard=10)
    assert all(torch.equal(a, b) for a, b in zip(plain, first)) and first[0].dtype == torch.float16
    assert len(list(tmp_path.iterdir())) == 3 # no temporary file is left
    (tmp_path/'pairs-00000010.safetensors').write_bytes(b'damaged')
    Encoder.calls = 0
    again = S.embed_corpus(corpus, enc, tmp_path, shard=10)
    assert Encoder.calls == 1 and all(torch.equal(a, b) for a, b in zip(plain, again))


def test_growing_corpus_keeps_full_shards(tmp_path):
    S.embed_corpus(pairs(15), Encoder(), tmp_path, shard=10)
    Encoder.calls = 0
    assert len(S.embed_corpus(pairs(20), Encoder(), tmp_path, shard=10)[0]) == 20 and Encoder.calls == 1


def test_interrupted_write_leaves_nothing(tmp_path):
    class Stops(Encoder):
        def encode_images(self, images):
            if np.asarray(images[0]).sum() > 0: raise KeyboardInterrupt
            return super().encode_images(images)
    with pytest.raises(KeyboardInterrupt): S.embed_corpus(pairs(20), Stops(), tmp_path, shard=10)
    assert [p.name for p in tmp_path.iterdir()] == ['pairs-00000000.safetensors']


def test_foreign_shards_are_refused(tmp_path):
    S.embed_corpus(pairs(5), Encoder(), tmp_path, tag='mine')
    with pytest.raises(ValueError, match="'mine'.*'yours'"): S.embed_corpus(pairs(5), Encoder(), tmp_path, tag='yours')


# retrieval

def brute(names, corpus, enc, n_pos, n_neg):
    I, T = (e.float() for e in S.embed_corpus(corpus, enc))
    for n in names:
        q = enc.encode_texts([f'a {n}'])[0]
        d = np.sqrt(-np.log(np.clip((1 + (I@q).numpy())/2, 1e-4, 1)) - np.log(np.clip((1 + (T@q).numpy())/2, 1e-4, 1)))
        yield np.argsort(d, kind='stable')[:n_pos].tolist(), np.argsort(-d, kind='stable')[:n_neg].tolist()


@pytest.mark.parametrize('block', [1, 2, 64])
def test_exact_against_brute_force(block):
    names, corpus, enc = ['cat', 'dog', 'bomb'], pairs(40), Encoder()
    t = S.retrieve(names, corpus, enc, 5, 4, block=block).to_pandas()
    for n, (pos, neg) in zip(names, brute(names, corpus, enc, 5, 4)):
        mine = t[t.concept == n]
        assert mine[mine.positive].pair.tolist() == pos and mine[~mine.positive].pair.tolist() == neg
    assert t.distance.to_numpy() == pytest.approx(np.sqrt(-np.log(t.s_image*t.s_text)), abs=1e-5)


@pytest.mark.parametrize('negatives', S.NEGATIVES)
def test_pairs_of_a_concept_are_different(negatives):
    t = S.retrieve(['cat', 'dog'], pairs(40), Encoder(), 6, 8, negatives, margin=.25).to_pandas()
    for _, g in t.groupby('concept'):
        assert g.pair.nunique() == 14 and g[g.positive].distance.is_monotonic_increasing
        assert g[g.positive].distance.max() <= g[~g.positive].distance.min() + 1e-6


def test_random_is_seeded_and_block_free():
    get = lambda seed, block: S.retrieve(['cat', 'dog', 'owl'], pairs(50), Encoder(), 4, 4, 'random', block=block,
                                         generator=torch.Generator().manual_seed(seed))['pair'][:]
    assert get(1, 1) == get(1, 3) != get(2, 3)


@pytest.mark.parametrize('names, kw, words', [
    ([], {}, 'empty'), (['cat', 'cat'], {}, 'twice'), (['cat'], dict(negatives='near'), 'far, random, hard'),
    (['cat'], dict(n_pos=21), 'do not fit'), (['cat'], dict(n_pos=15, n_neg=6), 'do not fit'), (['cat'], dict(n_pos=0), 'at least 1'),
    (['cat'], dict(margin=1.), r'\[0, 1\)'), (['cat'], dict(negatives='hard', margin=.9, n_pos=3, n_neg=3), 'do not fit'),
    (['cat'], dict(embeddings=(torch.ones(3, 16), torch.ones(3, 16))), '3 embeddings for a corpus of 20')])
def test_retrieve_refuses(names, kw, words):
    with pytest.raises(ValueError, match=words): S.retrieve(names, pairs(20), Encoder(), **{'n_pos': 2, 'n_neg': 2, **kw})


def test_whole_corpus_can_be_used():
    t = S.retrieve(['cat'], pairs(20), Encoder(), 10, 10)
    assert sorted(t['pair'][:]) == list(range(20))


def test_broken_encoder_is_noticed():
    class Broken(Encoder):
        def encode_texts(self, texts): return torch.full((len(texts), 16), torch.nan)
    with pytest.raises(ValueError, match='NaN'): S.retrieve(['cat'], pairs(20), Broken(), 2, 2)


# tables

def test_table_round_trip_and_faults(tmp_path):
    t = S.retrieve(['cat', 'dog'], pairs(20), Encoder(), 3, 3)
    S.save_stimuli(t, tmp_path/'t.parquet')
    assert S.load_stimuli(tmp_path/'t.parquet').to_dict() == t.to_dict() and len(list(tmp_path.iterdir())) == 1
    S.save_stimuli(Dataset.from_dict({'concept': ['cat']}), tmp_path/'u.parquet')
    with pytest.raises(ValueError, match="lacks the column 'pair'"): S.load_stimuli(tmp_path/'u.parquet')
    with pytest.raises(FileNotFoundError, match='retrieve'): S.load_stimuli(tmp_path/'no.parquet')


def test_show_unknown_concept(tmp_path):
    t = S.retrieve(['cat'], pairs(20), Encoder(), 3, 3)
    with pytest.raises(ValueError, match="'dog'"): S.show_stimuli(t, pairs(20), ['dog'])
