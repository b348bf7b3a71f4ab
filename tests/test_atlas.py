"Pages of atoms: what is kept of a corpus, and what the files say."
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from daco_nb import atlas as M
from daco_nb.annotation import annotate

NAMES = ["bomb", "<b>gun", "help", "chair"]
LABELS = {"bomb": "undesirable", "<b>gun": "undesirable", "help": "desirable"}


def world():
    g = torch.Generator().manual_seed(0)
    V = torch.randn(4, 12, generator=g)
    sae = SimpleNamespace(W_dec=torch.cat([V + 0.1, torch.randn(2, 12, generator=g)]), concept_index=torch.tensor([0, 1, 2, 3, -1, -1]), d_in=12, d_sae=6)
    D = SimpleNamespace(names=NAMES, vectors=V)
    return sae, D, annotate(sae, D, LABELS, 0.5, "nearest")


def codes(pair, d=6):
    "Sparse codes of a pair's tokens; atom 5 never fires."
    g = torch.Generator().manual_seed(pair)
    c = torch.rand(3 + pair % 4, d, generator=g) * 5 * (torch.rand(3 + pair % 4, d, generator=g) < 0.4)
    c[:, 5] = 0
    return c


def seen(n=30, n_top=4):
    s = M.Sightings.nothing(6, n_top)
    for p in range(n):
        s.add(p, codes(p))
    return s


def test_one_pass_keeps_what_a_look_at_everything_gives():
    s, every = seen(), [codes(p) for p in range(30)]
    loud = torch.stack([c.max(0).values for c in every])
    best = loud.topk(4, dim=0)
    assert torch.equal(s.code, best.values)
    assert all(loud[p, i] == v for i in range(6) for p, v in zip(s.pair[:, i], s.code[:, i]) if v > 0)
    assert s.tokens == sum(map(len, every)) and s.pairs == 30
    together = torch.cat(every)
    assert torch.allclose(s.share, (together > 0).float().mean(0)) and s.share[5] == 0
    for i in range(6):
        fired = together[:, i][together[:, i] > 0]
        assert torch.equal(s.counts[i], torch.bucketize(fired, M.EDGES).bincount(minlength=len(M.EDGES) + 1))


def test_codes_beyond_the_bins_are_counted():
    s = M.Sightings.nothing(1, 1)
    s.add(0, torch.tensor([[1e-6], [1e6]]))
    assert s.counts[0, 0] == 1 and s.counts[0, -1] == 1


def test_folder(tmp_path):
    "Every link leads somewhere, text is escaped, nothing comes from elsewhere, shared pictures are stored once."
    sae, D, atoms = world()
    corpus = [(Image.new("RGB", (8, 8)) if p else None, f"caption <{p}>") for p in range(30)]
    index = M.write_atlas(tmp_path / "atlas", sae, D, atoms, seen(), corpus)
    pages = sorted(tmp_path.glob("atlas/*.html"))
    assert len(pages) == 7 and index.name == "index.html"
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<b>gun" not in text and "caption <" not in text and "http" not in text and "<script" not in text
        for link in re.findall(r'(?:src|href)="([^"]+)"', text):
            assert (page.parent / link).exists() or link == "pictures/0.png", link  # pair 0 has no picture
        assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", text))
    assert "Nothing in this corpus." in (tmp_path / "atlas/5.html").read_text() and "no concept" in (tmp_path / "atlas/5.html").read_text()
    order = re.findall(r"<td class=(\w+)>", index.read_text())
    assert order == sorted(order, key=("undesirable", "desirable", "neither").index)
    with pytest.raises(FileExistsError, match="already there"):
        M.write_atlas(tmp_path / "atlas", sae, D, atoms, seen(), corpus)


def test_a_failed_atlas_leaves_nothing(tmp_path):
    sae, D, atoms = world()
    with pytest.raises(IndexError):
        M.write_atlas(tmp_path / "atlas", sae, D, atoms, seen(), [])
    assert not list(tmp_path.iterdir())


def test_misfits():
    sae, D, atoms = world()
    with pytest.raises(IndexError, match="choose 0 to 5"):
        M.facts(6, sae, D, atoms)
    with pytest.raises(ValueError, match="width 12, other has width 7"):
        M.sight(SimpleNamespace(d_model=7, name="other"), sae, D, [], [])
