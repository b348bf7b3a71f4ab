"Comparing rules: AUC and its interval, hidden concepts, alarms; tensors only."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch.nn.functional import normalize

from daco_nb import comparison as C


@pytest.mark.parametrize("paired", [False, True])
def test_auc_and_interval_against_a_loop(paired):
    "The AUC is scikit-learn's; the interval is that of a bootstrap written out."
    g = np.random.default_rng(0)
    high, low = np.round(g.normal(1, 1, 40), 1), np.round(g.normal(0, 1, 40), 1)  # rounded, so that there are ties
    auc, a, b = C.auc_interval(torch.tensor(high), torch.tensor(low), paired, draws=3000)
    truth = np.r_[np.ones(40), np.zeros(40)]
    assert abs(auc - roc_auc_score(truth, np.r_[high, low])) < 1e-9
    again = []
    for _ in range(1000):
        i = g.integers(40, size=40)
        j = i if paired else g.integers(40, size=40)
        again.append(roc_auc_score(truth, np.r_[high[i], low[j]]))
    assert np.allclose((a, b), np.quantile(again, (0.025, 0.975)), atol=0.015) and a < auc < b


def test_auc_refuses():
    with pytest.raises(ValueError, match="0 high"):
        C.auc_interval(torch.ones(0), torch.ones(2))
    with pytest.raises(ValueError, match="equally many"):
        C.auc_interval(torch.ones(3), torch.ones(2), paired=True)


def test_best_f1_is_the_best():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        score, truth = torch.randn(30, generator=g), torch.rand(30, generator=g) < 0.4
        best = C.best_f1(score, truth)
        f1 = lambda t: f1_score(truth, score >= t)
        assert f1(best) >= max(f1(t.item()) for t in score) - 1e-12


def world():
    "Four clusters of ten concepts, one of them undesirable and one desirable; an atom per concept."
    g = torch.Generator().manual_seed(0)
    V = normalize(torch.randn(4, 24, generator=g), dim=1).repeat_interleave(10, 0) + 0.1 * torch.randn(40, 24, generator=g)
    D = SimpleNamespace(names=[f"c{i}" for i in range(40)], vectors=V)
    labels = {f"c{i}": "undesirable" if i < 10 else "desirable" if i < 20 else "neither" for i in range(40)}
    sae = SimpleNamespace(W_dec=torch.cat([V + 0.02, torch.randn(5, 24, generator=g)]), concept_index=torch.cat([torch.arange(40), torch.full((5,), -1)]))
    return sae, D, labels


@pytest.mark.parametrize("rule", [{}, dict(n_centroids=2), dict(rule="nearest"), dict(rule="vote", n_neighbours=3)])
def test_hidden_concepts_are_hidden(rule, monkeypatch):
    "In a world of clusters every rule finds them; and no rule is ever shown the concept that an atom began at."
    sae, D, labels = world()
    shown = []
    annotate = C.annotate
    monkeypatch.setattr(C, "annotate", lambda some, rest, *a, **k: shown.append((len(some.W_dec), len(rest.names), set(rest.names))) or annotate(some, rest, *a, **k))
    score, truth, fold = C.hidden_scores(sae, D, labels, **rule)
    assert len(score) == 40 and truth.tolist() == [i < 10 for i in range(40)] and len(shown) == 5
    for f, (n, m, names) in enumerate(shown):
        assert not names & {D.names[i] for i in (fold == f).nonzero()[:, 0].tolist()} and n + m == 40
    assert C.auc_interval(score[truth], score[~truth], draws=2)[0] > 0.99
    found = C.cross_labelled(score, truth, fold)
    assert not (found & ~truth).any() and (truth & ~found).sum() <= 2  # the strictest of the best thresholds may miss one


def test_precision_and_recall():
    assert C.precision_recall(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])) == (0.5, 1 / 3)
    assert np.isnan(C.precision_recall(torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))[0])


def test_loudest_and_weights():
    "The alarm is the loudest token; weights find the atom that tells harm from harmlessness, and none speaks against."
    codes = [torch.tensor([[1.0, 0, 2], [0, 3, 0]]), torch.tensor([[0.5, 0, 9]])]
    assert C.loudest(codes, torch.tensor([1.0, 1, 0])).tolist() == [3, 0.5]
    g = torch.Generator().manual_seed(0)
    harm = [i % 2 == 0 for i in range(60)]
    many = [torch.rand(4, 6, generator=g) + torch.tensor([2.0 * h, 2.0 * (not h), 0, 0, 0, 0]) for h in harm]
    w = C.weigh_atoms(many, harm, C=1.0)
    assert w.argmax() == 0 and w[1] == 0 and (w >= 0).all()


def test_prompts_come_in_pairs_and_splits_do_not_meet():
    every = {s: C.plain_prompts(s) for s in ("train", "validation", "test")}
    for rows in every.values():
        assert [h for _, h in rows] == [True, False] * (len(rows) // 2)
    assert not {q for q, _ in every["test"]} & {q for s in ("train", "validation") for q, _ in every[s]}
