"Faults and edges of daco_nb.stimuli; no model is loaded but two tiny ones, made here."
import errno
import io
import json
import os
import random
import signal
import tarfile
import threading
import time
from zlib import crc32

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as Packed
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast, SiglipConfig,
                          SiglipImageProcessor, SiglipModel, SiglipProcessor)

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


def test_a_pair_depends_on_seed_and_number_only():
    a, b = S.DemoCorpus(400_000), S.DemoCorpus(400_000, seed=3)
    assert a[399_999][0].tobytes() == S.DemoCorpus(1_000_000)[399_999][0].tobytes() and a[399_999][1] == S.DemoCorpus(1_000_000)[399_999][1]
    assert a[399_999][0].tobytes() != b[399_999][0].tobytes()


def png(size=(4, 4), mode='RGB'):
    out = io.BytesIO()
    Image.new(mode, size, 1).save(out, 'png')
    return out.getvalue()


BOMB = png((30_000, 30_000), '1')
BROKEN = [(('x.png', 'a cat'), 'x.png'), ((Image.new('RGB', (2, 2)), None), 'no caption'), ((Image.new('RGB', (2, 2)), '  '), 'no caption'),
          ((1, 'a cat'), 'a int where'), ((1,), 'unpack'), (3, 'int'), ((Image.new('RGB', (0, 0)), 'nothing'), '0 x 0'),
          ((png()[:40], 'cut off'), 'rror'), ((b'', 'empty'), 'no picture'), ((None, 'none'), 'no picture'),
          ((b'no picture at all', 'text'), 'cannot identify'), ((BOMB, 'a bomb'), '[Bb]omb'),
          ((png((9_000, 9_000), '1'), 'large'), '9000 x 9000')]


@pytest.mark.parametrize('pair, words', BROKEN)
def test_broken_pair_is_named(pair, words):
    with pytest.warns(UserWarning, match='1 of 3 pairs could not be used; pair 2'): both = S.embed_corpus([*pairs(2), pair], Encoder())
    assert list(both.skipped) == [2] and both[0].isnan().any(1).tolist() == [False, False, True]
    import re
    assert re.search(words, both.skipped[2]), both.skipped


@pytest.mark.parametrize('negatives', S.NEGATIVES)
def test_broken_pairs_are_counted_and_never_returned(negatives, tmp_path):
    corpus = pairs(90)
    for i, (pair, _) in enumerate(BROKEN): corpus[7*i] = pair
    with pytest.warns(UserWarning, match='13 of 90'): both = S.embed_corpus(corpus, Encoder(), tmp_path, shard=32, batch=8)
    assert sorted(both.skipped) == list(range(0, 91, 7))
    with pytest.warns(UserWarning, match='13 of 90'): again = S.embed_corpus(corpus, Encoder(), tmp_path, shard=32, batch=8)
    disk = S.open_embeddings(tmp_path)
    assert again.skipped == both.skipped == disk.skipped
    for e in (both, disk):
        with pytest.warns(UserWarning, match='13 of 90 pairs have no embedding'): t = S.retrieve(['cat', 'dog'], corpus, Encoder(), 20, 20, negatives, embeddings=e)
        assert not set(t['pair']) & set(both.skipped) and np.isfinite(t['distance']).all()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='corpus of 77 pairs'): S.retrieve(['cat'], corpus, Encoder(), 40, 40, embeddings=both)


def test_a_corpus_of_nothing_but_faults():
    with pytest.raises(ValueError, match='3 of 3 pairs'): S.embed_corpus([(None, 'a')]*3, Encoder())


def test_long_captions_are_counted():
    both = S.embed_corpus([*pairs(2), (Image.new('RGB', (2, 2)), 'word '*10_000)], Encoder())
    assert both.cut == [2] and not both.skipped


def test_modes_become_rgb():
    found, _ = S.read_pairs([(Image.new('L', (3, 3)), 'gray'), (Image.new('RGBA', (3, 3)), 'clear'), (Image.new('CMYK', (3, 3)), 'ink')], 0, 3)
    assert [im.mode for im, _ in found.values()] == ['RGB']*3


# corpora of one's own

def picture(i): return Image.new('RGB', (4, 4), (i, 2*i, 3*i))


def same(corpus, n=4):
    assert len(corpus) == n
    for i in range(n):
        image, text = corpus[i]
        assert image.tobytes() == picture(i).tobytes() and text == f'picture {i}'


@pytest.mark.parametrize('file, text', [
    ('captions.csv', 'image,caption\n' + ''.join(f'{i}.png,picture {i}\n' for i in range(4))),
    ('captions.tsv', 'filename\ttext\n' + ''.join(f'{i}.png\tpicture {i}\n' for i in range(4))),
    ('metadata.jsonl', ''.join(json.dumps(dict(file_name=f'{i}.png', text=f'picture {i}')) + '\n' for i in range(4))),
    ('captions.json', json.dumps([dict(image=f'{i}.png', caption=f'picture {i}') for i in range(4)])),
    ('captions.json', json.dumps({f'{i}.png': f'picture {i}' for i in range(4)})), (None, None)])
def test_folders(tmp_path, file, text):
    for i in range(4): picture(i).save(tmp_path/f'{i}.png')
    if file: write(tmp_path/file, text)
    else: [write(tmp_path/f'{i}.txt', f'picture {i}') for i in range(4)]
    same(S.FolderCorpus(tmp_path))
    assert S.FolderCorpus(tmp_path).name == S.FolderCorpus(tmp_path).name


def test_folder_faults(tmp_path):
    with pytest.raises(ValueError, match='No pictures'): S.FolderCorpus(tmp_path)
    write(tmp_path/'captions.csv', 'image,words\nx.png,hello\n')
    with pytest.raises(ValueError, match="caption.* among .*'words'"): S.FolderCorpus(tmp_path)
    picture(1).save(tmp_path/'x.png')
    assert S.FolderCorpus(tmp_path, text='words')[0][1] == 'hello'
    write(tmp_path/'captions.csv', 'image,text\nx.png,hello\ngone.png,bye\nx.png\n')
    assert {i: w.split(':')[0] for i, w in S.read_pairs(S.FolderCorpus(tmp_path), 0, 3)[1].items()} == {1: 'FileNotFoundError', 2: 'ValueError'}
    with pytest.raises(ValueError, match='no .jsonl file'): S.read_captions(write(tmp_path/'a.jsonl', '{"image": 1\n'))
    with pytest.raises(ValueError, match='holds no rows'): S.read_captions(write(tmp_path/'b.json', '[]'))


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def packed(i):
    out = io.BytesIO()
    picture(i).save(out, 'png')
    return out.getvalue()


@pytest.mark.parametrize('kind', ['txt', 'json', 'both'])
def test_tars(tmp_path, kind):
    for t in range(2):
        with tarfile.open(tmp_path/f'{t:05d}.tar', 'w') as tar:
            for i in (2*t, 2*t + 1):
                add(tar, f'deep/{"long"*40}/{i:09d}.png', packed(i))
                if kind != 'json': add(tar, f'deep/{"long"*40}/{i:09d}.txt', f'picture {i}'.encode())
                if kind != 'txt': add(tar, f'deep/{"long"*40}/{i:09d}.json', json.dumps(dict(caption=f'picture {i}' if kind == 'json' else 'no')).encode())
    same(S.TarCorpus(tmp_path))
    same(S.TarCorpus(sorted(tmp_path.glob('*.tar'))))
    with pytest.raises(IndexError, match='corpus of 4'): S.TarCorpus(tmp_path)[4]


def test_tar_faults(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        add(tar, '0.png', packed(0)); add(tar, '0.txt', b'picture 0')
        add(tar, '1.png', packed(1)); add(tar, '2.txt', b'alone'); add(tar, '3.png', packed(3)[:50]); add(tar, '3.txt', b'cut'); add(tar, '4.json', b'{}')
    assert list(S.read_pairs(S.TarCorpus(tmp_path), 0, 5)[1]) == [1, 2, 3, 4]
    data = (tmp_path/'a.tar').read_bytes()
    (tmp_path/'a.tar').write_bytes(data[:3*512 + 100 + 512])
    with pytest.warns(UserWarning, match='ends early'): corpus = S.TarCorpus(tmp_path)
    assert corpus[0][1] == 'picture 0'
    (tmp_path/'a.tar').write_bytes(b'no tar'*200)
    with pytest.warns(UserWarning, match='ends early'), pytest.raises(ValueError, match='No pairs in 1 tars'): S.TarCorpus(tmp_path)


def test_tables():
    f = Features(image=Packed(), caption=Value('string'))
    same(S.TableCorpus(Dataset.from_dict(dict(image=[picture(i) for i in range(4)], caption=[f'picture {i}' for i in range(4)]), features=f)))
    same(S.TableCorpus(Dataset.from_dict(dict(png=[packed(i) for i in range(4)], txt=[[f'picture {i}', 'more'] for i in range(4)]))))
    broken = Dataset.from_dict(dict(image=[dict(bytes=b, path=None) for b in (packed(0), packed(1)[:40], BOMB)] + [None], caption=['a', 'b', 'c', 'd']), features=f)
    assert list(S.read_pairs(S.TableCorpus(broken), 0, 4)[1]) == [1, 2, 3]
    with pytest.raises(ValueError, match='streaming=False'): S.TableCorpus(broken.to_iterable_dataset())
    with pytest.raises(ValueError, match="'words'"): S.TableCorpus(broken, text='words')


# encoders

@pytest.mark.parametrize('kind', ['CLIP', 'Siglip'])
def test_dual_encoders(tmp_path, kind):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '<unk>', '<s>', '</s>', 'a', 'cat', 'dog'])}, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', unk_token='<unk>', eos_token='</s>', bos_token='<s>')
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text, vision = part | dict(vocab_size=7, max_position_embeddings=8, eos_token_id=3, bos_token_id=2, pad_token_id=0), part | dict(image_size=16, patch_size=8)
    torch.manual_seed(0)
    if kind == 'CLIP':
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        processor = CLIPProcessor(CLIPImageProcessor(size={'shortest_edge': 16}, crop_size={'height': 16, 'width': 16}), words)
    else: model, processor = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), SiglipProcessor(SiglipImageProcessor(size={'height': 16, 'width': 16}), words)
    model.save_pretrained(tmp_path/'tiny'); processor.save_pretrained(tmp_path/'tiny')
    enc = S.DualEncoder(tmp_path/'tiny', batch=3)
    rows = [enc.encode_images([picture(40*i) for i in range(5)]), enc.encode_texts(['a', 'a cat', 'dog', 'a dog', 'cat '*10_000])]
    assert all(torch.allclose(r.norm(dim=1), torch.ones(5)) and r.shape == (5, 12 if kind == 'CLIP' else 16) for r in rows)
    assert torch.allclose(enc.encode_texts(['a cat']), rows[1][1:2], atol=1e-6) # padding changes nothing
    t = S.retrieve(['cat', 'dog'], pairs(12), enc, 2, 2)
    assert len(t) == 8 and enc.name == 'DualEncoder(tiny)'


# embedding

def test_shards_resume(tmp_path):
    corpus, enc = pairs(25), Encoder()
    plain = S.embed_corpus(corpus, enc)
    first = S.embed_corpus(corpus, enc, tmp_path, shard=10)
    assert all(torch.equal(a, b) for a, b in zip(plain, first)) and first[0].dtype == torch.float16
    assert len(list(tmp_path.iterdir())) == 3 # no temporary file is left
    whole = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path/'pairs-00000010.safetensors').write_bytes(b'damaged')
    with pytest.raises(ValueError, match='pairs-00000010.safetensors is damaged'): S.open_embeddings(tmp_path)
    Encoder.calls = 0
    again = S.embed_corpus(corpus, enc, tmp_path, shard=10)
    assert Encoder.calls == 1 and all(torch.equal(a, b) for a, b in zip(plain, again))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == whole
    (tmp_path/'pairs-00000000.safetensors').unlink()
    with pytest.raises(ValueError, match='missing'): S.open_embeddings(tmp_path)


def test_every_flipped_byte_is_noticed(tmp_path):
    S.embed_corpus([*pairs(5), (None, 'none')], Broken(), tmp_path, tag='mine')
    path, = tmp_path.iterdir()
    data, whole = path.read_bytes(), S.load_shard(path, 6, 'mine')
    for at in {*range(8), *random.Random(0).sample(range(len(data)), 300)}:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        found = S.load_shard(path, 6, 'mine')
        assert found is None or all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(found, whole)) and found.skipped == whole.skipped, at


@pytest.mark.parametrize('write', ['fsync', 'replace'])
def test_full_disk(tmp_path, monkeypatch, write):
    S.embed_corpus(pairs(10), Encoder(), tmp_path, tag='t', shard=10)
    before = (tmp_path/'pairs-00000000.safetensors').read_bytes()
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(S.os, write, full)
        with pytest.raises(OSError, match='pairs-00000010.*No space.*make room') as e: S.embed_corpus(pairs(20), Encoder(), tmp_path, tag='t', shard=10)
    assert e.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ['pairs-00000000.safetensors'] and (tmp_path/'pairs-00000000.safetensors').read_bytes() == before
    Encoder.calls = 0
    assert len(S.embed_corpus(pairs(20), Encoder(), tmp_path, tag='t', shard=10)[0]) == 20 and Encoder.calls == 1


class Slow(Encoder):
    def encode_images(self, images): time.sleep(.005); return super().encode_images(images)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kill_9_then_resume(tmp_path):
    run = lambda enc, folder: S.embed_corpus(pairs(200), enc, tmp_path/folder, tag='t', shard=10, batch=5)
    run(Encoder(), 'whole')
    rng = random.Random(0)
    for _ in range(6):
        if (pid := os.fork()) == 0: # a child that starts to embed and is killed somewhere
            tqdm.set_lock(threading.RLock()) # else the lock of progress bars is shared, and dies locked with the child
            try: run(Slow(), 'killed')
            finally: os._exit(0)
        time.sleep(rng.uniform(.01, .06)); os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    left = len(list((tmp_path/'killed').glob('pairs-*'))) if (tmp_path/'killed').exists() else 0
    assert left < 20 # it was interrupted
    run(Encoder(), 'killed')
    read = lambda f: {p.name: p.read_bytes() for p in (tmp_path/f).iterdir() if not p.name.endswith('.part')}
    assert len(read('whole')) == 20 and read('killed') == read('whole')


def test_leftover_of_a_kill_is_overwritten(tmp_path):
    write(tmp_path/'.pairs-00000000.safetensors.0.part', 'half a shard')
    S.embed_corpus(pairs(5), Encoder(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['pairs-00000000.safetensors']


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


class Broken(Encoder):
    "Gives NaN for black pictures."
    def encode_images(self, images):
        rows = super().encode_images(images)
        rows[[np.asarray(im).sum() == 0 for im in images]] = torch.nan
        return rows


def test_nan_embeddings_are_listed():
    with pytest.warns(UserWarning, match='1 of 20.*pair 0.*no embedding of length 1'): both = S.embed_corpus(pairs(20), Broken())
    assert 0 not in S.retrieve(['cat'], pairs(20), Encoder(), 9, 10, embeddings=both)['pair'][:]


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


def unit(n, d=24, seed=0, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1).to(dtype)


class Names:
    "Random unit rows for names."
    def encode_texts(self, texts): return unit(len(texts), seed=7)


@pytest.mark.parametrize('negatives, n', [*((s, 3000) for s in S.NEGATIVES), ('random', 70_000)])
def test_the_walk_is_the_plain_form(tmp_path, negatives, n):
    "Several blocks, mixed types, memory-mapped; 70,000 pairs draw random negatives in the other way, so there only the positives are compared."
    texts = np.lib.format.open_memmap(tmp_path/'t.npy', 'w+', np.float32, (n, 24))
    texts[:] = unit(n, seed=2).numpy()
    e = unit(n, seed=1, dtype=torch.float16), np.load(tmp_path/'t.npy', mmap_mode='r')
    names, q = [f'c{i}' for i in range(40)], Names().encode_texts(range(40)).double()
    t = S.retrieve(names, range(n), Names(), 9, 7, negatives, embeddings=e, block=17)
    s = S.similarity(q@e[0].double().T), S.similarity(q@torch.tensor(np.array(e[1])).double().T)
    plain = S.pick(*s, 9, 7, negatives, torch.Generator().manual_seed(0))
    mine = torch.tensor(t['pair'][:]).view(40, 16)
    k = 9 if negatives == 'random' and n > 2**16 else 16
    assert (mine == plain)[:, :k].all()
    assert np.allclose(t['distance'], S.geometric_distance(*s).gather(1, mine).flatten(), atol=1e-6)
    assert np.allclose(t['s_image'], s[0].gather(1, mine).flatten(), atol=1e-6) and all(len(set(r)) == 16 for r in mine.tolist())
    if negatives == 'hard':
        low = [((x - x.mean(1, True))/x.std(1, keepdim=True)).gather(1, mine)[:, 9:] for x in s]
        assert (torch.minimum(*low) <= 1e-4).all() and (torch.maximum(*low) > 1.5).all()


def test_exact_at_both_ends():
    "Cosines of -1 and 1: distances are finite, and 0 for a perfect match."
    q = unit(1, 24, 7)
    e = torch.cat([-q, q, q, unit(9, 24)]), torch.cat([-q, q, -q, unit(9, 24)])
    t = S.retrieve(['x'], range(12), Names(), 1, 1, embeddings=e)
    assert t['pair'][:] == [1, 0] and t['distance'][0] == pytest.approx(0, abs=2e-3) and t['distance'][1] == pytest.approx((-2*np.log(1e-4))**.5, abs=1e-5)


@pytest.mark.parametrize('negatives', S.NEGATIVES)
def test_pairs_of_a_concept_are_different(negatives):
    t = S.retrieve(['cat', 'dog'], pairs(40), Encoder(), 6, 8, negatives).to_pandas()
    for _, g in t.groupby('concept'):
        assert g.pair.nunique() == 14 and g[g.positive].distance.is_monotonic_increasing
        assert g[g.positive].distance.max() <= g[~g.positive].distance.min() + 1e-6


def test_twins_do_not_stop_the_walk():
    e = unit(1).repeat(3000, 1), unit(1).repeat(3000, 1)
    t = S.retrieve(['cat'], range(3000), Names(), 4, 4, 'random', embeddings=e)
    assert len(set(t['pair'])) == 8 and np.isfinite(t['distance']).all()


@pytest.mark.parametrize('e, words', [
    ((unit(20)*3, unit(20)), 'pair 0 has length 3'), ((unit(20), unit(20, 16)), 'differ in width'), ((unit(20, 16), unit(20, 16)), 'use the encoder'),
    ((torch.full((20, 24), torch.nan), unit(20)), 'corpus of 0 pairs'), ((unit(20), unit(19)), '19 embeddings')])
def test_wrong_embeddings(e, words):
    with pytest.raises(ValueError, match=words): S.retrieve(['cat'], range(20), Names(), 2, 2, embeddings=e)


def test_too_few_hard_negatives():
    with pytest.raises(ValueError, match='has only . negatives, not 12'): S.retrieve(['cat'], range(16), Names(), 4, 12, 'hard', embeddings=(unit(16), unit(16)))


def test_random_is_seeded_and_block_free():
    get = lambda seed, block: S.retrieve(['cat', 'dog', 'owl'], pairs(50), Encoder(), 4, 4, 'random', block=block,
                                         generator=torch.Generator().manual_seed(seed))['pair'][:]
    assert get(1, 1) == get(1, 3) != get(2, 3)


@pytest.mark.parametrize('names, kw, words', [
    ([], {}, 'empty'), (['cat', 'cat'], {}, 'twice'), (['cat'], dict(negatives='near'), 'far, random, hard'),
    (['cat'], dict(n_pos=21), 'do not fit'), (['cat'], dict(n_pos=15, n_neg=6), 'do not fit'), (['cat'], dict(n_pos=0), 'at least 1'),
    (['cat'], dict(embeddings=(torch.ones(3, 16), torch.ones(3, 16))), '3 embeddings for a corpus of 20')])
def test_retrieve_refuses(names, kw, words):
    with pytest.raises(ValueError, match=words): S.retrieve(names, pairs(20), Encoder(), **{'n_pos': 2, 'n_neg': 2, **kw})


def test_whole_corpus_can_be_used():
    t = S.retrieve(['cat'], pairs(20), Encoder(), 10, 10)
    assert sorted(t['pair'][:]) == list(range(20))


def test_broken_encoder_is_noticed():
    class Nan(Encoder):
        def encode_texts(self, texts): return torch.full((len(texts), 16), torch.nan)
    with pytest.raises(ValueError, match="NaN for the concept 'cat'"): S.retrieve(['cat'], pairs(20), Nan(), 2, 2, embeddings=S.embed_corpus(pairs(20), Encoder()))


# tables

def test_table_round_trip_and_faults(tmp_path):
    t = S.retrieve(['cat', 'dog'], pairs(20), Encoder(), 3, 3)
    S.save_stimuli(t, tmp_path/'t.parquet')
    assert S.load_stimuli(tmp_path/'t.parquet').to_dict() == t.to_dict() and len(list(tmp_path.iterdir())) == 1
    S.save_stimuli(t.select([i for i, yes in enumerate(t['positive']) if yes or t['concept'][i] == 'dog']), tmp_path/'v.parquet')
    with pytest.raises(ValueError, match="'cat' has no negatives"): S.load_stimuli(tmp_path/'v.parquet')
    S.save_stimuli(t.select([]), tmp_path/'w.parquet')
    with pytest.raises(ValueError, match='holds no stimuli'): S.load_stimuli(tmp_path/'w.parquet')
    assert Dataset.from_parquet(str(tmp_path/'t.parquet'), cache_dir=str(tmp_path)).column_names == t.column_names
    S.save_stimuli(Dataset.from_dict({'concept': ['cat']}), tmp_path/'u.parquet')
    with pytest.raises(ValueError, match="lacks the column 'pair'"): S.load_stimuli(tmp_path/'u.parquet')
    with pytest.raises(FileNotFoundError, match='retrieve'): S.load_stimuli(tmp_path/'no.parquet')


def test_show_unknown_concept(tmp_path):
    t = S.retrieve(['cat'], pairs(20), Encoder(), 3, 3)
    with pytest.raises(ValueError, match="'dog'"): S.show_stimuli(t, pairs(20), ['dog'])
