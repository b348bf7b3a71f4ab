"Scenes and stimuli for concepts that nobody drew."
from collections import Counter

import numpy as np
import pytest

from daco_nb.concepts import Concept, wordnet_concepts
from daco_nb.undrawn import FAR, KINDS, MANY, TEMPLATES, ConceptCorpus, concept_stimuli, drawn_below, relatives, sentence

CONCEPTS = wordnet_concepts()

def thing(name, above=(), drawing='', lexname='noun.animal'): return Concept(name, f'{name}.n.01', lexname, tuple(a[:-5] for a in above), drawing, above=tuple(above))

def test_nearest_relatives_first():
    cs = [thing('goat', ['ruminant.n.01', 'animal.n.01'], 'goat'), thing('cow', ['ruminant.n.01', 'animal.n.01'], 'cow'), thing('fly', ['insect.n.01', 'animal.n.01'], 'fly'),
          thing('sheep', ['ruminant.n.01', 'animal.n.01']), thing('worm', ['annelid.n.01', 'animal.n.01']), thing('ruminant', ['animal.n.01']), thing('deep', ['a.n.01', 'b.n.01', 'animal.n.01'])]
    below = drawn_below(cs)
    found = {c.name: relatives(c, below) for c in cs}
    assert found['sheep'] == found['ruminant'] == ['goat', 'cow'] and found['worm'] == ['goat', 'cow', 'fly'] and found['goat'] == ['goat'] and found['deep'] == []
    assert FAR == 2

def test_too_general_is_no_relative():
    cs = [thing(f'x{i}', ['all.n.01'], 'goat') for i in range(MANY + 1)] + [thing('y', ['all.n.01'])]
    assert relatives(cs[-1], drawn_below(cs)) == [] and len(relatives(cs[-1], drawn_below(cs[1:]))) == MANY

def test_sentences_hold_the_name_and_are_the_same_for_all():
    assert {len(t) for t in TEMPLATES.values()} == {8} and all(t.count('{}') == 1 for ts in TEMPLATES.values() for t in ts)
    for c in CONCEPTS[::50]: assert all(c.name in sentence(c, j) for j in range(8)) and sentence(c, 8) == sentence(c, 0)

@pytest.mark.parametrize('name, kinds', [('knife', {'drawn', 'word', 'caption'}), ('hashish', {'word', 'related', 'caption'}), ('democracy', {'word', 'caption'})])
def test_kinds_take_turns(name, kinds):
    corpus = ConceptCorpus(CONCEPTS, per=12)
    i = next(k for k, c in enumerate(CONCEPTS) if c.name == name)
    assert {corpus.kind(12*i + j) for j in range(12)} == kinds <= set(KINDS)
    for j in range(4):
        (image, text), (again, same) = corpus[12*i + j], corpus[12*i + j]
        assert image.tobytes() == again.tobytes() and text == same and name in text

def test_seeds_and_ends():
    a, b = ConceptCorpus(CONCEPTS[:5], 4), ConceptCorpus(CONCEPTS[:5], 4, seed=1)
    assert len(a) == 20 and a[0][0].tobytes() != b[0][0].tobytes()
    for i in (-1, 20):
        with pytest.raises(IndexError, match='0 to 19'): a[i]
    with pytest.raises(ValueError, match='per=1'): ConceptCorpus(CONCEPTS[:5], 1)
    with pytest.raises(ValueError, match='comes twice'): ConceptCorpus([CONCEPTS[0], CONCEPTS[0]])

def test_stimuli_are_balanced_and_avoid_kin():
    corpus = ConceptCorpus(CONCEPTS[:300], 4)
    t = concept_stimuli(corpus, negatives=14).to_pandas()
    where = {c.name: i for i, c in enumerate(corpus.concepts)}
    assert (t.groupby('concept').positive.sum() == 4).all() and (t.groupby('concept').size() == 20).all()
    own = t.concept.map(where)
    assert ((t.pair//4 == own) == t.positive).all()
    for _, mine in t[~t.positive].groupby('concept'): assert Counter(mine.pair % 4) == Counter({j: 4 for j in range(4)})
    for r in t[~t.positive].itertuples():
        c, o = corpus.concepts[where[r.concept]], corpus.concepts[r.pair//4]
        assert o.synset not in c.above and c.synset not in o.above
    assert concept_stimuli(corpus, 14).to_pandas().equals(t) and not concept_stimuli(corpus, 14, seed=1).to_pandas().equals(t)
    with pytest.raises(ValueError, match='2 concepts'): concept_stimuli(ConceptCorpus(CONCEPTS[:2]))

def test_concepts_without_wordnet():
    corpus = ConceptCorpus([Concept(n) for n in ('foo', 'bar', 'baz')], 2)
    assert {corpus.kind(i) for i in range(6)} == {'word', 'caption'} and len(concept_stimuli(corpus)) == 3*(2 + 64)
    assert all(np.asarray(corpus[i][0]).shape == (64, 64, 3) for i in range(6))
