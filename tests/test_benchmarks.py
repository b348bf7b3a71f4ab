"""Benchmarks: rows say what they claim, and the command writes what the rows say. Speed itself is never asserted."""
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from daco_nb import benchmarks as bm
from daco_nb.demo import ASSETS
from daco_nb.sparse_coding import duality_gap, elastic_net, omp

KEYS = {"what", "ours", "against", "unit", "ratio", "target", "holds"}


def test_row():
    "A row holds from its target on, and one that was skipped neither holds nor fails."
    assert bm.row("a", 1, 2, "s", 2.0, 2.0)["holds"] is True
    assert bm.row("a", 1, 2, "s", 1.99, 2.0)["holds"] is False
    skipped = bm.row("a", None, None, "s", None, 2.0)
    assert skipped["holds"] is None and set(skipped) == KEYS


def test_raced_takes_the_fastest_peer_and_the_median_round():
    "Ratios are formed within a round, against the faster of two peers."
    seconds = np.array([[1.0, 4.0, 3.0], [1.0, 9.0, 8.0], [2.0, 4.0, 10.0]])  # ratios 3, 8, 2
    assert bm.raced("a", seconds, 3.0) == bm.row("a", 1.0, 4.0, "s", 3.0, 3.0)


def test_race_takes_turns():
    "Every runner warms up once, then they alternate."
    order = []
    seconds = bm.race(lambda: order.append(0), lambda: order.append(1), rounds=3)
    assert order == [0, 1] * 4 and seconds.shape == (3, 2) and (seconds >= 0).all()
    order.clear()
    bm.race(lambda: order.append(0), rounds=2, warm=False)
    assert order == [0, 0]


def test_judges_solve_the_same_problem():
    "scikit-learn's answers, as they are timed, are ours: same support for OMP, same minimum for the elastic net."
    D, Z = bm.sparse_problem(120, 48, 4, k=5)
    with_gram, without = bm.judge_omp(D, Z, 5)
    ours = omp(Z, D, 5).numpy()
    for codes in (with_gram().T, without().T, orthogonal_mp(D.numpy().T, Z.numpy().T, n_nonzero_coefs=5).T):
        assert ((codes != 0) == (ours != 0)).all() and np.abs(codes - ours).max() < 1e-3
    for solve in bm.judge_elastic_net(D, Z, 0.1, 0.9, tol=1e-8):
        codes = torch.from_numpy(solve())
        assert duality_gap(Z, D, codes, 0.1, 0.9).max() < 1e-7
        assert (codes - elastic_net(Z.double(), D, 0.1, 0.9, tol=1e-9)[0]).abs().max() < 1e-3


def test_peers_stop_at_our_gap():
    "The tolerance given to scikit-learn is the same certificate, not a stricter or a looser one by an order of magnitude."
    D, Z = bm.sparse_problem(400, 96, 6)
    alpha = 0.1 * (Z @ D.T).abs().max().item()
    for solve in bm.judge_elastic_net(D, Z, alpha, 0.9, tol=1e-4):
        gap = duality_gap(Z, D, torch.from_numpy(solve()), alpha, 0.9).max()
        assert 1e-7 < gap <= 1.001e-4


def test_peak_memory():
    "A fresh process tells its own peak, whatever the parent holds."
    parent = torch.ones(100_000_000)  # 0.4 GB that must not count
    used = bm.peak_gb(take_a_quarter_gigabyte)
    assert 0.2 < used < 0.45 and len(parent)


def take_a_quarter_gigabyte():
    "Something to measure."
    return torch.ones(62_500_000).sum()


def test_command(tmp_path, monkeypatch, capsys):
    "The command prints the rows and writes them; an unknown name is refused with the known ones."
    rows = [bm.row("a", 1, 3, "s", 3.0, 2.0), bm.row("b", None, None, "s", None, 2.0)]
    monkeypatch.setitem(bm.BENCHMARKS, "omp", lambda size: rows)
    bm.main(["omp", "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text()) == {"name": "omp", "rows": rows}
    assert "skipped" in capsys.readouterr().out and not list(tmp_path.glob("*.part"))
    with pytest.raises(SystemExit):
        bm.main(["speed"])
    with pytest.raises(ValueError, match="choose from retrieval, extraction"):
        bm.benchmark("speed")


def test_peers_are_skipped_unless_asked_for(monkeypatch, capsys):
    "Without --peers no other library is installed and its rows say so; with it the rows of the race come in their place."
    monkeypatch.setattr(bm, "train_steps", lambda *a: lambda: None)
    monkeypatch.setattr(bm, "demo_sae", lambda: {"fve": 0.5, "frac_alive": 1.0})
    monkeypatch.setattr(bm, "train_alone", lambda *a, **k: pytest.fail("a peer was run"))
    skipped = [r for r in bm.benchmark("sae", "small")["rows"] if r["holds"] is None]
    assert [r["what"].split()[-1] for r in skipped] == list(bm.PEERS) and all(r["target"] == 2 for r in skipped)
    with pytest.raises(SystemExit):
        bm.main(["omp", "--peers"])
    assert "--peers is for sae" in capsys.readouterr().err


def test_each_peer_has_a_program_that_compiles():
    assert set(bm.PROGRAMS) == {"ours", *bm.PEERS}
    for name, program in bm.PROGRAMS.items():
        compile(bm.HEAD + program, name, "exec")


def test_the_race_takes_turns_and_chooses_on_training_rows(monkeypatch):
    "Three rounds, all contenders in each; a ratio is formed within a round; the rate is chosen on kept training rows, and the test rows only report."
    order, names = [], list(bm.RATES)
    pace = {"ours": (1.0, 2.0, 4.0), "SAELens": (3.0, 8.0, 4.0), "sparsify": (1.5, 3.0, 16.0), "dictionary_learning": (1.0, 2.0, 4.0)}
    best = {"ours": 0.8, "SAELens": 0.7, "sparsify": 0.805, "dictionary_learning": 0.6}
    train, test = torch.zeros(20, 2), torch.ones(7, 2)
    def run(name, Z, folder, d_sae, steps, lr):
        assert len(Z) == 18 and steps == 6
        order.append((name, lr))
        return pace[name][bm.RATES[name].index(lr)], (name, lr)
    def judge(sae, z):
        second = sae[1] == bm.RATES[sae[0]][1]
        if len(z) == 2: return {"fve": 0.1 + 0.1 * second}  # kept rows: the second rate is the better one
        return {"fve": best[sae[0]] if second else 0.99}    # test rows would have chosen the first
    monkeypatch.setattr(bm, "demo_rows", lambda: (None, train, test))
    monkeypatch.setattr(bm, "train_alone", run)
    monkeypatch.setattr(bm, "evaluate_sae", judge)
    rows = bm.bench_peers(steps=6)
    assert order == [(n, bm.RATES[n][i]) for i in (0, 1, 2) for n in names]
    assert [r["ratio"] for r in rows[:3]] == [3.0, 1.5, 1.0] and [r["holds"] for r in rows] == [True, False, False, True]
    assert rows[3]["ours"] == 0.8 and abs(rows[3]["against"] - 0.8) < 1e-9 and "6,144 samples" in rows[3]["what"]


def test_a_peer_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(bm.PROGRAMS, "ours", "raise SystemExit('out of luck')")
    with pytest.raises(RuntimeError, match="ours failed: out of luck"):
        bm.train_alone("ours", torch.zeros(4, 3), tmp_path, 8, 1)


def test_shipped_results():
    "What ships has every benchmark, and each row is whole."
    full = json.loads((ASSETS / "benchmarks.json").read_text())
    assert [r["name"] for r in full] == list(bm.BENCHMARKS)
    for r in (r for result in full for r in result["rows"]):
        assert set(r) == KEYS
        assert r["holds"] == (None if r["ratio"] is None else r["ratio"] >= r["target"])


@pytest.mark.parametrize("name", ["extraction", "overhead"])
def test_small_runs(name):
    "Benchmarks on the demo model run; how fast is not asked here."
    rows = bm.benchmark(name, "small")["rows"]
    assert rows and all(set(r) == KEYS and r["ratio"] > 0 for r in rows)


SHAPE = dict(tower=dict(depth=2, hidden_size=64, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1]), rotary=(4, 6, 6),
             hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)


def test_smoke_without_a_gpu(monkeypatch):
    "Every row is skipped and says why; no model is built."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bm, "random_qwen", lambda *a: pytest.fail("a model was built"))
    rows = bm.benchmark("cuda_smoke")["rows"]
    assert len(rows) == len(bm.SMOKE) and all(r["holds"] is r["ratio"] is r["ours"] is None and "needs a GPU" in r["what"] for r in rows)


def test_smoke_with_a_gpu(monkeypatch):
    "Where a GPU is at hand the model is built there and measured; here it is a tiny one on the CPU."
    built = []
    def tiny(device):
        built.append(device)
        return random_qwen("cpu", torch.float32, **SHAPE)
    random_qwen, once = bm.random_qwen, iter([True])  # torch asks, too, and is told the truth
    monkeypatch.setattr(torch.cuda, "is_available", lambda: next(once, False))
    monkeypatch.setattr(bm, "random_qwen", tiny)
    rows = bm.benchmark("cuda_smoke", "small")["rows"]
    assert built == ["cuda"] and [r["target"] for r in rows] == [t for _, t in bm.SMOKE.values()]
    assert all(set(r) == KEYS and r["ratio"] > 0 for r in rows[:3]) and rows[3]["holds"] is None  # memory is counted on a GPU only


def test_shape_of_7b():
    "By default the random model has the decoder of the 7B model; built on meta, where it takes no memory."
    config = bm.random_qwen("meta").model.config.text_config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3584, 18_944, 28, 28, 4)
    layer = bm.random_qwen("meta").layers[0]
    assert sum(p.numel() for p in layer.parameters()) == 233_057_792
