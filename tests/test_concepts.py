"Faults, edges and rebuilds of daco_nb.concepts, on a tiny WordNet written here in the real file format."
import shutil
from zlib import crc32

import pyarrow.parquet as pq
import pytest

from daco_nb import concepts as C

# name of a synset: number of its field, words, what it points to, gloss
NOUNS = {
    'entity': (3, 'entity', '', 'what is'), 'physical': (3, 'physical_entity', '@entity', 'an entity with a body'),
    'object': (3, 'object', '@physical', 'a thing to see'), 'whole': (3, 'whole', '@object', 'a thing in one piece'),
    'artifact': (6, 'artifact', '@whole', 'a made thing'), 'animal': (3, 'animal', '@whole', 'a living thing'),
    'weapon': (6, 'weapon arm', '@artifact', 'a thing for fighting'), 'tool': (6, 'tool', '@artifact', 'a thing for work'),
    'knife': (6, 'knife', '@weapon @tool', 'a blade'), 'dagger': (6, 'dagger sticker', '@knife', 'a short knife; "two daggers"'),
    'fur': (6, 'beaver', '@artifact', 'soft brown hat'), 'beaver': (5, 'beaver', '@mammal', 'a rodent that builds dams'),
    'mammal': (5, 'mammal', '@animal', 'it gives milk, like the beaver'), 'excalibur': (6, 'excalibur', '@iweapon', 'a king had this weapon'),
    'paris': (6, 'Paris', '@artifact', 'a town'), 'vibrio': (5, 'vibrio', '@animal', 'a germ'), 'genus': (5, 'genus_Vibrio', '@animal', 'vibrio and vibrio-like'),
    'v1': (5, 'comma', '@animal', 'a vibrio'), 'v2': (5, 'curl', '@animal', 'another vibrio'), 'v3': (5, 'bend', '@animal', 'the last vibrio'),
    'archaism': (10, 'archaism', '@entity', 'an old word'), 'blade': (6, 'blade brand', '@weapon ;uarchaism:2', 'it cuts, as a knife does'),
    'card': (6, 'card', '@artifact', 'stiff paper'), 'cards': (6, 'cards', '@artifact', 'a pack with many a card'),
    'slur': (18, 'coon', '@animal', '(ethnic slur) a bad word'), 'raccoon': (5, 'coon raccoon', '@mammal', 'it looks like a bandit'), 'bandit': (5, 'bandit', '@mammal', 'no raccoon; a beaver is not a raccoon, nor a coon'),
    'zib': (6, 'zib', '@tool', 'never mentioned'), 'r1': (5, 'racer', '@mammal', 'a raccoon or coon'), 'r2': (5, 'rover', '@mammal', 'a raccoon or coon')}
VERBS = {'eat': (34, 'eat', '', 'take food'), 'e1': (34, 'dine', '@eat', 'eat well'), 'stab': (35, 'knife', '@eat', 'use a knife')}
ADJS = {'hot': (0, 'hot(p)', '=entity', 'of high heat'), 'other': (0, 'other', '', 'not this')}
TAGS = ['eat%2:34:00:: 1 20', 'hot%3:00:00:: 1 30', 'other%3:00:00:: 1 90', 'knife%1:06:00:: 1 3', 'knife%2:35:00:: 1 4', 'knife%5:00:00:x:00 1 2', 'down%4:02:00:: 1 7']


def fixture(folder):
    "Write WordNet's files with true byte offsets."
    notice = '  1 This is not the licence of anything.  \n'
    for kind, pos, table in (('noun', 'n', NOUNS), ('verb', 'v', VERBS), ('adj', 'a', ADJS)):
        where = {}
        for known in (False, True):  # offsets have a fixed width, so a second round knows them
            data, place = notice, {}
            for key, (field, words, points, gloss) in table.items():
                place[key] = len(data)
                cells = []
                for p in points.split():
                    kind_of = next(k for k in ('@i', '@', ';u', '=') if p.startswith(k))
                    to, _, word = p.removeprefix(kind_of).partition(':')
                    cells.append(f'{kind_of} {where.get(to, 0) if kind_of != "=" else 0:08d} n {int(word or 0):02x}00')
                frames = ' 01 + 02 00' if pos == 'v' else ''
                words = words.split()
                data += f'{place[key]:08d} {field:02d} {pos} {len(words):02x} {" ".join(w + " 0" for w in words)} {len(cells):03d}{"".join(" " + c for c in cells)}{frames} | {gloss}  \n'
            where = place
        senses = {}
        for key, (_, words, _, _) in table.items():
            for w in words.split(): senses.setdefault(w.split('(')[0].lower(), []).append(f'{place[key]:08d}')
        (folder/f'data.{kind}').write_bytes(data.encode())
        (folder/f'index.{kind}').write_bytes((notice + ''.join(f'{w} {pos} {len(o)} 1 @ {len(o)} 0 {" ".join(o)}  \n' for w, o in sorted(senses.items()))).encode())
    (folder/'cntlist.rev').write_bytes(('\n'.join(TAGS) + '\n').encode())
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path/'wn').mkdir()
    return fixture(tmp_path/'wn')


@pytest.fixture
def wn(folder): return C.read_wordnet(folder)


@pytest.fixture(scope='module')
def table(): return C.wordnet_concepts()


def write(path, text):
    path.write_text(text, encoding='utf-8')
    return path


# reading WordNet

def test_read(wn):
    assert len(wn.synsets) == len(NOUNS) + len(VERBS) + len(ADJS)
    assert wn.id(*wn.lookup('beaver.n.02')) == 'beaver.n.02' and wn.synsets[wn.lookup('beaver.n.02')].gloss.startswith('a rodent')
    assert wn.synsets[wn.lookup('hot.a.01')].words == ('hot',)  # the marker (p) is no part of the word
    o = wn.lookup('dagger.n.01')[1]
    assert [wn.id('n', h) for h in wn.above('n', o)] == [f'{w}.n.01' for w in ('knife', 'weapon', 'tool', 'artifact', 'whole', 'object', 'physical_entity', 'entity')]
    assert wn.tag('n', 'knife', wn.lookup('knife.n.01')[1]) == 3 and wn.tag('v', 'knife', wn.lookup('knife.v.01')[1]) == 4
    assert wn.tag('n', 'weapon', wn.lookup('knife.n.01')[1]) == 0  # not one of its words


def test_offsets_are_bytes(folder, wn):
    data = (folder/'data.noun').read_bytes()
    assert all(data[int(o):].startswith(o.encode()) for pos, o in wn.synsets if pos == 'n')


def test_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv('WNSEARCHDIR', str(folder))
    assert ('n', 'knife') in C.read_wordnet().senses


@pytest.mark.parametrize('name', ['data.noun', 'index.verb', 'data.adj', 'cntlist.rev'])
def test_missing_file(folder, name):
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name} is not in the folder wn.*wordnet-base.*WNSEARCHDIR'): C.read_wordnet(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='data.noun.*nowhere.*wordnet-base'): C.read_wordnet(tmp_path/'nowhere')


@pytest.mark.parametrize('name', ['data.noun', 'data.verb', 'data.adj', 'index.noun', 'cntlist.rev'])
def test_every_cut_is_noticed(folder, name):
    "A file cut anywhere in its last two lines, except between lines of counts, is refused."
    whole = (folder/name).read_bytes()
    lines = whole.split(b'\n')
    for cut in range(1, len(lines[-2]) + len(lines[-3]) + 2):
        (folder/name).write_bytes(whole[:-cut])
        at_a_line = whole[:-cut].endswith(b'\n')
        if at_a_line and name in ('cntlist.rev', 'index.noun'): continue
        with pytest.raises(ValueError, match=r'broken or cut short|is incomplete'): C.read_wordnet(folder)


def test_a_lost_parent_is_named(folder):
    text = (folder/'data.noun').read_text()
    lines = text.split('\n')
    mine = next(i for i, line in enumerate(lines) if ' mammal 0' in line)
    offset = lines[mine][:8]
    (folder/'data.noun').write_text('\n'.join(lines[:mine] + lines[mine + 1:]))
    index = '\n'.join(line for line in (folder/'index.noun').read_text().split('\n') if not line.startswith('mammal'))
    (folder/'index.noun').write_text(index)
    with pytest.raises(ValueError, match=f'beaver.*points up to {offset}.*incomplete'): C.read_wordnet(folder)


def test_garbage_line(folder):
    with open(folder/'data.verb', 'a') as f: f.write('no line of a data file | at all  \n')
    with pytest.raises(ValueError, match='data.verb, line 5,'): C.read_wordnet(folder)


# rules

def curated(wn, **kw): return {c.name: c for c in C.curate(wn, **kw)[0]}


def test_curate(wn):
    found = curated(wn)
    assert found['beaver'].synset == 'beaver.n.02'              # not the fur
    assert found['knife'].pos == 'n' and found['eat'].pos == 'v' and found['hot'].pos == 'a'
    assert found['dagger'].hypernyms[:3] == ('knife', 'weapon', 'tool') and found['dagger'].above[-1] == 'entity.n.01'
    assert {'weapon', 'knife', 'dagger'} <= set(found)          # harmful: they need no mention
    for lost in ('excalibur', 'Paris', 'paris', 'genus Vibrio', 'vibrio', 'brand', 'coon', 'zib', 'other', 'entity', 'object', 'cards', 'archaism'): assert lost not in found, lost
    assert 'raccoon' in found and 'blade' in found and 'card' in found


def test_counts_fall_and_order_is_by_score(wn):
    found, counts = C.curate(wn)
    assert list(counts.values()) == sorted(counts.values(), reverse=True) and list(counts.values())[-1] == len(found)
    score = [s.score for s in C.score_readings(wn, [C.Reading(c.name, *wn.lookup(c.synset)) for c in found])]
    assert score == sorted(score, reverse=True)


def test_reviewed_goes_first(wn):
    fur = C.Concept('beaver', 'beaver.n.01', 'noun.artifact', (), 'hat')
    found = curated(wn, reviewed=[fur])
    assert (found['beaver'].synset, found['beaver'].drawing) == ('beaver.n.01', 'hat')
    found = curated(wn, reviewed=[C.Concept('pack', 'cards.n.01')])
    assert found['pack'].synset == 'cards.n.01' and 'cards' not in found and 'card' in found


def test_mentions_by_hand(wn):
    say = lambda w, s: C.score_readings(wn, [C.Reading(w, *wn.lookup(s))])[0].mentions
    assert say('knife', 'knife.n.01') == 3     # dagger, blade, the verb
    assert say('dagger', 'dagger.n.01') == 0   # its own gloss doesn't count
    assert say('raccoon', 'coon.n.02') == 3 and say('milk', 'mammal.n.01') == 0


def test_rebuild_is_the_same_to_the_byte(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'copy')
    sums = []
    for i, source in enumerate((folder, tmp_path/'copy', folder)):
        C.save_concepts(*(lambda found, counts: (found, tmp_path/f'{i}.parquet', counts))(*C.curate(C.read_wordnet(source))))
        sums.append(crc32((tmp_path/f'{i}.parquet').read_bytes()))
    assert len(set(sums)) == 1 and C.wordnet_concepts(tmp_path/'0.parquet') == C.curate(C.read_wordnet(folder))[0]
    assert sorted(p.name for p in tmp_path.glob('*parquet*')) == ['0.parquet', '1.parquet', '2.parquet']  # no temporary file is left


@pytest.mark.parametrize('a, b', [('Card', 'cards'), ('middle-class', 'middle class'), ('box', 'boxes'), ('fly', 'flies'), ('lineman', 'linemen'), ('honour', 'honor'), ('organiser', 'organizers'), ('judgement', 'judgment'), ("bull's eye", "bull's-eye"), ('class', 'classes')])
def test_fold_joins(a, b): assert C.fold(a) == C.fold(b)


@pytest.mark.parametrize('a, b', [('glass', 'glad'), ('bus', 'bush'), ('man', 'mane'), ('virus', 'vise'), ('TNT', 'tent')])
def test_fold_parts(a, b): assert C.fold(a) != C.fold(b)


# the shipped table

def test_shipped_table(table):
    names = [c.name for c in table]
    assert 14_000 < len(table) < 16_000 and len(set(names)) == len(names)
    assert len({c.synset for c in table}) == len({(c.pos, c.offset) for c in table}) == len(table)
    assert all(c.name == c.name.lower() and 2 <= len(c.name) <= 30 for c in table)
    assert all(c.hypernyms and 'entity.n.01' in c.above for c in table if c.pos == 'n')
    assert all(tuple(map(C.synset_name, c.above)) == c.hypernyms and c.lexname in C.LEXNAMES for c in table)
    assert all(len(c.offset) == 8 and c.offset.isdigit() and c.frequency >= 0 for c in table)
    assert sum(c.pos == 'n' for c in table) > .9*len(table)
    assert (C.ASSETS/'wordnet.parquet').stat().st_size < 600_000


def test_known_examples(table):
    by = {c.name: c for c in table}
    for n in ('knife', 'dog', 'bridge', 'bomb', 'poison', 'pistol', 'cocaine', 'heroin', 'theft', 'murder', 'arson', 'terrorist', 'kayak', 'kindness', 'happy', 'eat'): assert n in by, n
    assert by['rape'].synset == 'rape.v.01' and by['superman'].lexname == 'noun.person'
    assert by['dog'].synset == 'dog.n.01' and by['bridge'].lexname == 'noun.artifact' and 'weapon' in by['dagger'].hypernyms
    for n in ('paris', 'einstein', 'genus canis', 'canidae', 'kyanite', 'kilometer', 'entity', 'seventeen', 'nigger', 'coon', 'the', 'excalibur'): assert n not in by, n


def test_shipped_table_holds_the_demo(table):
    by = {c.name: c for c in table}
    for c in C.load_concepts(): assert by[c.name][:5] == c[:5]


def test_no_glosses_are_shipped():
    assert pq.read_schema(C.ASSETS/'wordnet.parquet').names == ['concept', 'synset', 'lexname', 'drawing', 'frequency', 'offset', 'above']


def test_broken_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match='No table.*curate'): C.wordnet_concepts(tmp_path/'x.parquet')
    whole = (C.ASSETS/'wordnet.parquet').read_bytes()
    for n in (0, 3, 1000, len(whole) - 1):
        (tmp_path/'t.parquet').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='t.parquet is no parquet file'): C.wordnet_concepts(tmp_path/'t.parquet')
    pq.write_table(pq.read_table(C.ASSETS/'wordnet.parquet').drop(['above']), tmp_path/'t.parquet')
    with pytest.raises(ValueError, match="lacks the column 'above'"): C.wordnet_concepts(tmp_path/'t.parquet')


def test_save_refuses_before_writing(tmp_path):
    with pytest.raises(ValueError, match='comes twice'): C.save_concepts([C.Concept('a'), C.Concept('a')], tmp_path/'t.parquet')
    assert not list(tmp_path.iterdir())


# subtrees

def test_under(table):
    weapons = C.under(table, 'weapon.n.01')
    assert {'weapon', 'dagger', 'pistol', 'sword'} <= {c.name for c in weapons} and not {'dog', 'tool'} & {c.name for c in weapons}
    position = {c.name: i for i, c in enumerate(table)}
    assert [position[c.name] for c in weapons] == sorted(position[c.name] for c in weapons)
    assert len(C.under(table, 'entity.n.01')) == sum(c.pos == 'n' for c in table)
    assert {c.name for c in C.under(C.load_concepts(), 'weapon.n.01')} <= {c.name for c in weapons}  # names alone do as well here


@pytest.mark.parametrize('wrong, words', [('weapon', 'is weapon.n.01 meant'), ('weapon.n.09', 'is weapon.n.01 meant'), ('wepon.n.01', 'lemma.pos.sense'), ('', 'lemma.pos.sense')])
def test_under_nothing(table, wrong, words):
    with pytest.raises(ValueError, match=words): C.under(table, wrong)


# own concepts

SMALL = [C.Concept('weapon', 'weapon.n.01', 'noun.artifact', ('entity',), '', 5, '00000001', ('entity.n.01',)), C.Concept('card', 'card.n.01')]


def test_add_names_pairs_and_concepts():
    before = list(SMALL)
    new = C.add_concepts(SMALL, ['deepfake', ('railgun', 'weapon'), ('mace', 'weapon.n.01'), C.Concept('tarot', 'tarot.n.01')])
    assert [c.name for c in new] == ['weapon', 'card', 'deepfake', 'railgun', 'mace', 'tarot'] and SMALL == before
    assert new[3].above == ('weapon.n.01', 'entity.n.01') and new[3].hypernyms == ('weapon', 'entity') and new[3].lexname == 'noun.artifact'
    assert {c.name for c in C.under(new, 'weapon.n.01')} == {'weapon', 'railgun', 'mace'}


def test_parent_without_a_synset():
    own = C.add_concepts(SMALL, ['deepfake'])
    assert C.add_concepts(own, [('voice clone', 'deepfake')])[-1].hypernyms == ('deepfake',)


@pytest.mark.parametrize('more, words', [
    ([], 'empty'), ([' '], 'no concept name'), ([3], 'no concept name'), (['a', 'a'], "'a' comes twice"), (['Ant', 'ant'], "'Ant' and 'ant' differ only by case"),
    (['Weapon'], "'Weapon' is in the table already, as 'weapon'"), (['cards'], "'cards' is in the table already, as 'card'"),
    ([C.Concept('playing card', 'card.n.01')], "as 'card'"), ([('gun', 'wepon')], "parent 'wepon' of 'gun'")])
def test_add_refuses(more, words):
    with pytest.raises(ValueError, match=words): C.add_concepts(SMALL, more)


def test_skip_known():
    assert [c.name for c in C.add_concepts(SMALL, ['Cards', 'deepfake'], skip_known=True)] == ['weapon', 'card', 'deepfake']


@pytest.mark.parametrize('text, words', [
    ('concept\ngun\n', "m.csv lacks the column 'parent'"), ('', "lacks the column 'concept'"), ('concept,parent\n', 'empty'),
    ('concept,parent\n,weapon\n', 'no concept name'), ('concept,parent\ngun,weapon,\n', 'line 2: more cells'), ('concept;parent\ngun;weapon\n', "lacks the column 'concept'"),
    ('concept,parent\ngun,\nGUN,\n', 'differ only by case')])
def test_bad_lists(tmp_path, text, words):
    with pytest.raises(ValueError, match=words): C.add_concepts(SMALL, write(tmp_path/'m.csv', text))


def test_encodings(tmp_path):
    (tmp_path/'m.csv').write_bytes('concept,parent\r\ncafé,\r\n'.encode('utf-8-sig'))  # as spreadsheets write it
    assert C.add_concepts(SMALL, tmp_path/'m.csv')[-1].name == 'café'
    for wrong in ('latin-1', 'utf-16'):
        (tmp_path/'m.csv').write_bytes('concept,parent\ncafé,\n'.encode(wrong))
        with pytest.raises(ValueError, match='m.csv is not UTF-8.*CSV UTF-8'): C.add_concepts(SMALL, tmp_path/'m.csv')
        with pytest.raises(ValueError, match='m.csv is not UTF-8'): C.load_concepts(tmp_path/'m.csv')


def test_quoted_cells_and_blanks(tmp_path):
    new = C.add_concepts(SMALL, write(tmp_path/'m.csv', 'parent, concept, note\nweapon , "gun, toy" ,x\n'))
    assert new[-1].name == 'gun, toy' and new[-1].above[0] == 'weapon.n.01'


def test_a_missing_list(tmp_path):
    with pytest.raises(FileNotFoundError): C.add_concepts(SMALL, tmp_path/'none.csv')


def test_parts_of_speech():
    assert [C.Concept('x', s).pos for s in ('bat.n.01', 'u.s._house.n.10', 'hot.s.02', '')] == ['n', 'n', 's', '']
