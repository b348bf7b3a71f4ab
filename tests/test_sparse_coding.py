"Sparse coding: scikit-learn and scipy as oracles, properties of every solver, bad input."
import importlib.util
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import nnls
from sklearn.linear_model import ElasticNet, orthogonal_mp

from daco_nb import sparse_coding
from daco_nb.sparse_coding import duality_gap, elastic_net, oblique_projection, omp, prepared_omp

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def problem(seed, b=5, n=40, d=24, dtype=torch.float32, overlap=.3):
    "Vectors and rows of uneven length that overlap."
    g = torch.Generator().manual_seed(seed)
    D = torch.randn(n, d, generator=g, dtype=torch.float64) + overlap*torch.randn(d, generator=g, dtype=torch.float64)
    D *= torch.rand(n, 1, generator=g, dtype=torch.float64)*4 + .2
    return torch.randn(b, d, generator=g, dtype=torch.float64).to(dtype), D.to(dtype)


def sk_omp(Z, D, **kw):
    "scikit-learn's codes for the given rows: it wants unit columns."
    norms = D.double().norm(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        codes = orthogonal_mp((D.double()/norms[:, None]).numpy().T, Z.double().numpy().T, **kw)
    return torch.from_numpy(np.atleast_2d(codes.T))/norms


def sk_enet(Z, D, alpha, tau, nonneg=False):
    judge = ElasticNet(alpha=alpha/D.shape[1], l1_ratio=tau, fit_intercept=False, positive=nonneg, tol=1e-13, max_iter=200_000)
    return torch.from_numpy(np.stack([judge.fit(D.double().numpy().T, z).coef_ for z in Z.double().numpy()]))


def objective(Z, D, C, alpha, tau):
    Z, D, C = Z.double(), D.double(), C.double()
    return .5*(Z - C@D).square().sum(1) + alpha*(tau*C.abs().sum(1) + .5*(1 - tau)*C.square().sum(1))


# ---- omp against scikit-learn

@pytest.mark.parametrize('b,n,d,k', [(1, 6, 4, 1), (64, 300, 96, 16), (3, 20, 40, 20), (33, 500, 64, 64)])
def test_omp_equals_sklearn(b, n, d, k):
    Z, D = problem(b + n, b, n, d)
    ours, oracle = omp(Z, D, k), sk_omp(Z, D, n_nonzero_coefs=k)
    scale = D.norm(dim=1)
    if k < d: assert ((ours != 0) == (oracle != 0)).all()
    assert ((ours - oracle)*scale).abs().max() < 1e-4 or k == d
    assert torch.allclose(ours@D, (oracle@D.double()).float(), atol=1e-4)


@quick
@given(seeds, st.integers(1, 8))
def test_omp_equals_sklearn_float64(seed, k):
    Z, D = problem(seed, dtype=torch.float64)
    assert torch.allclose(omp(Z, D, k), sk_omp(Z, D, n_nonzero_coefs=k), atol=1e-8)


@pytest.mark.parametrize('tol', [.5, 2., 8.])
def test_omp_tol_equals_sklearn(tol):
    Z, D = problem(3, 40, 60, 32)
    ours, oracle = omp(Z, D, 32, tol=tol), sk_omp(Z, D, tol=tol)
    assert ((ours != 0) == (oracle != 0)).all()
    assert (Z - ours@D).square().sum(1).max() <= tol*(1 + 1e-4)


def test_bfloat16_is_computed_in_float32():
    Z, D = problem(1, dtype=torch.bfloat16)
    codes = omp(Z, D, 4)
    assert codes.dtype == torch.float32 and torch.equal(codes, omp(Z.float(), D.float(), 4))
    assert torch.allclose(codes.double(), sk_omp(Z, D, n_nonzero_coefs=4), atol=1e-4)
    assert oblique_projection(Z, D, codes, [0]).dtype == torch.bfloat16
    assert elastic_net(Z, D, .5)[0].dtype == torch.float32


# ---- omp: properties

@quick
@given(seeds, st.integers(1, 10), st.booleans())
def test_residual_is_orthogonal_to_the_support(seed, k, nonneg):
    Z, D = problem(seed)
    C = omp(Z, D, k, nonneg=nonneg)
    U = D/D.norm(dim=1, keepdim=True)
    assert ((C != 0).sum(1) <= k).all()
    assert (((Z - C@D)@U.T)*(C != 0)).abs().max() < 1e-4
    if nonneg: assert (C >= 0).all()


@quick
@given(seeds, st.booleans())
def test_error_falls_with_k(seed, nonneg):
    Z, D = problem(seed)
    errors = torch.stack([(Z - omp(Z, D, k, nonneg=nonneg)@D).norm(dim=1) for k in (1, 2, 4, 8, 16)])
    assert (errors.diff(dim=0) <= 1e-5).all()


@quick
@given(seeds, st.booleans())
def test_permutation_and_scaling_of_atoms(seed, nonneg):
    Z, D = problem(seed, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    order, scale = torch.randperm(len(D), generator=g), torch.rand(len(D), 1, generator=g, dtype=torch.float64) + .1
    C = omp(Z, D, 5, nonneg=nonneg)
    assert torch.allclose(omp(Z, D[order], 5, nonneg=nonneg), C[:, order], atol=1e-9)
    assert torch.allclose(omp(Z, D*scale, 5, nonneg=nonneg)*scale.T, C, atol=1e-9)


@quick
@given(seeds, st.integers(1, 6))
def test_nonneg_fit_is_the_best_on_its_support(seed, k):
    Z, D = problem(seed, dtype=torch.float64)
    for z, c in zip(Z, omp(Z, D, k, nonneg=True)):
        on = c > 0
        if on.any(): assert torch.allclose(c[on], torch.from_numpy(nnls(D[on].numpy().T, z.numpy())[0]), atol=1e-8)


def test_nonneg_with_all_atoms_reaches_the_nnls_optimum():
    Z, D = problem(5, 8, 12, 24, dtype=torch.float64)
    C = omp(Z, D, 12, nonneg=True)
    for z, c in zip(Z, C): assert np.isclose((z - c@D).norm(), nnls(D.numpy().T, z.numpy())[1], rtol=1e-3)


def test_a_sparse_vector_is_recovered_exactly_and_no_atom_is_wasted():
    g = torch.Generator().manual_seed(0)
    D = torch.randn(128, 64, generator=g)
    true = torch.zeros(20, 128)
    for row in true: row[torch.randperm(128, generator=g)[:3]] = torch.rand(3, generator=g) + .5
    for nonneg in (False, True):
        C = omp(true@D, D, 10, nonneg=nonneg)
        assert torch.allclose(C, true, atol=1e-4) and torch.equal(C.abs() > 1e-4, true > 0)


@pytest.mark.parametrize('nonneg', [False, True])
def test_duplicates_zero_vectors_and_empty_batches(nonneg):
    Z, D = problem(2)
    twice = torch.cat([D, D, D + 1e-7])
    assert torch.allclose(omp(Z, twice, 8, nonneg=nonneg)@twice, omp(Z, D, 8, nonneg=nonneg)@D, atol=1e-3)
    assert (omp(0*Z, D, 3, nonneg=nonneg) == 0).all()
    assert omp(Z[:0], D, 3, nonneg=nonneg).shape == (0, len(D))
    assert elastic_net(Z[:0], D, .1, nonneg=nonneg)[0].shape == (0, len(D))
    codes, gap = elastic_net(0*Z, D, .1, nonneg=nonneg)
    assert (codes == 0).all() and (gap == 0).all()


def test_portions_change_nothing(monkeypatch):
    "A large batch is worked off in portions; each row only depends on itself."
    Z, D = problem(0, 300, 5000, 32)
    whole = omp(Z, D, 30)
    assert torch.allclose(whole[:7], omp(Z[:7], D, 30), atol=1e-4)


# ---- elastic net

@pytest.mark.parametrize('nonneg', [False, True])
@pytest.mark.parametrize('alpha,tau', [(.5, .9), (2., .5), (1., 1.), (8., .9)])
def test_elastic_net_equals_sklearn(alpha, tau, nonneg):
    Z, D = problem(7, 12, 60, 40)
    C, gap = elastic_net(Z, D, alpha, tau, tol=1e-12, max_iter=20_000, nonneg=nonneg)
    oracle = sk_enet(Z, D, alpha, tau, nonneg)
    assert (C - oracle).abs().max() < 1e-4
    assert gap.max() <= 1e-11


@quick
@given(seeds, st.floats(.05, 20), st.floats(.1, 1), st.booleans())
def test_the_gap_is_a_certificate(seed, alpha, tau, nonneg):
    "It bounds the distance from the optimum, for the solution and for any other candidate."
    Z, D = problem(seed, 3, 20, 16, dtype=torch.float64)
    C, gap = elastic_net(Z, D, alpha, tau, tol=1e-9, max_iter=20_000, nonneg=nonneg)
    best, half = objective(Z, D, C, alpha, tau), .5*Z.square().sum(1)
    assert (gap <= 1e-9).all() and (best <= half*(1 + 1e-9)).all()
    other = C + .1*torch.randn(C.shape, generator=torch.Generator().manual_seed(seed), dtype=C.dtype)
    if nonneg: other = other.clamp_min(0)
    claimed = duality_gap(Z, D, other, alpha, tau, nonneg)*half
    assert (objective(Z, D, other, alpha, tau) - best <= claimed + 1e-9).all()


@quick
@given(seeds, st.booleans())
def test_more_iterations_never_hurt_and_the_gap_closes(seed, nonneg):
    "The objective falls. Its bound, the gap, need not on the way, but closes in the end."
    Z, D = problem(seed, dtype=torch.float64)
    few, more, many = (elastic_net(Z, D, .3, max_iter=i, tol=0, nonneg=nonneg) for i in (1, 200, 2000))
    values = [objective(Z, D, C, .3, .9) for C, _ in (few, more, many)]
    assert (values[1] <= values[0] + 1e-9).all() and (values[2] <= values[1] + 1e-9).all()
    assert (many[1] < 1e-6).all()


@settings(quick, max_examples=10)
@given(seeds)
def test_elastic_net_permutation_and_unit_rows(seed):
    Z, D = problem(seed, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    order, scale = torch.randperm(len(D), generator=g), torch.rand(len(D), 1, generator=g, dtype=torch.float64) + .1
    C, _ = elastic_net(Z, D, .5, tol=1e-8)
    assert torch.allclose(elastic_net(Z, D[order], .5, tol=1e-8)[0], C[:, order], atol=1e-3)
    C, _ = elastic_net(Z, D, .5, tol=1e-8, unit_rows=True)
    assert torch.allclose(elastic_net(Z, D*scale, .5, tol=1e-8, unit_rows=True)[0]*scale.T, C, atol=1e-3)


def test_a_strong_penalty_gives_zero():
    Z, D = problem(4)
    codes, gap = elastic_net(Z, D, 1.001*(Z@D.T).abs().max().item()/.9, .9)
    assert (codes == 0).all() and gap.max() < 1e-6


def test_too_few_iterations_are_confessed():
    Z, D = problem(4)
    assert elastic_net(Z, D, .01, max_iter=1, tol=1e-9)[1].max() > 1e-9


# ---- removal

@quick
@given(seeds)
def test_removal_keeps_the_residual(seed):
    Z, D = problem(seed)
    C = omp(Z, D, 6)
    remove = torch.rand(len(D), generator=torch.Generator().manual_seed(seed)) < .5
    out = oblique_projection(Z, D, C, remove)
    kept = C*~remove
    assert torch.allclose(out - kept@D, Z - C@D, atol=1e-4)
    assert torch.equal(out, oblique_projection(Z, D, C, remove.nonzero()[:, 0]))
    assert torch.equal(oblique_projection(Z, D, C, remove & False), Z) and torch.equal(oblique_projection(Z, D, C, []), Z)


def test_an_index_twice_removes_once():
    Z, D = problem(0)
    C = omp(Z, D, 6)
    assert torch.equal(oblique_projection(Z, D, C, [3, 3]), oblique_projection(Z, D, C, [3]))


# ---- bad input

bad = [
    (lambda Z, D: omp(Z[:, :-1], D, 2), 'width 23 .* width 24'),
    (lambda Z, D: omp(Z[0], D, 2), r'Z\[None\]'),
    (lambda Z, D: omp(Z, D[:0], 2), 'empty'),
    (lambda Z, D: omp(Z, D, 0), 'k = 0'),
    (lambda Z, D: omp(Z, D, 25), 'choose k from 1 to 24'),
    (lambda Z, D: omp(Z, D[:5], 6), 'choose k from 1 to 5'),
    (lambda Z, D: omp(Z*torch.nan, D, 2), r'NaN or infinity in rows \[0'),
    (lambda Z, D: omp(Z, D/0, 2), 'D has NaN or infinity'),
    (lambda Z, D: omp(Z, torch.cat([D, 0*D[:1]]), 2), r'Rows \[40\] .* zero'),
    (lambda Z, D: elastic_net(Z, D, 0), 'alpha = 0'),
    (lambda Z, D: elastic_net(Z, D, float('nan')), 'alpha = nan'),
    (lambda Z, D: elastic_net(Z, D, 1, tau=1.5), 'tau = 1.5'),
    (lambda Z, D: elastic_net(Z, D, 1, max_iter=0), 'max_iter = 0'),
    (lambda Z, D: oblique_projection(Z, D, omp(Z, D, 2)[:, :3], [0]), r'codes have shape \(5, 3\)'),
    (lambda Z, D: oblique_projection(Z, D, omp(Z, D, 2), [40]), 'Concept 40'),
    (lambda Z, D: oblique_projection(Z, D, omp(Z, D, 2), [-1]), 'Concept -1'),
    (lambda Z, D: oblique_projection(Z, D, omp(Z, D, 2), torch.ones(3, dtype=torch.bool)), 'mask has shape'),
]

@pytest.mark.parametrize('call,message', bad)
def test_bad_input_names_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=message): call(*problem(0))


def test_prepared_omp():
    "A dictionary prepared once codes every batch as `omp` does, and looks at the vectors each time."
    g = torch.Generator().manual_seed(3)
    D, Z = torch.randn(60, 24, generator=g), torch.randn(7, 24, generator=g)
    for nonneg in (False, True):
        for table in (False, True):
            code = prepared_omp(D, 5, nonneg=nonneg, table=table)
            for z in (Z, Z[:1], Z[:0], Z.bfloat16()):
                torch.testing.assert_close(code(z), omp(z.float(), D, 5, nonneg=nonneg), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="width 23"):
        code(Z[:, :23])
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[2\]"):
        code(torch.where(torch.arange(7)[:, None] == 2, torch.nan, Z))
    with pytest.raises(ValueError, match="choose k from 1 to 24"):
        prepared_omp(D, 25)


@pytest.mark.parametrize("tau", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("twin", [False, True], ids=["plain", "duplicate rows"])
def test_elastic_net_reaches_a_tight_gap(tau, twin):
    "Jumps end at the exact minimum, also where more rows than dimensions, or two equal rows, make the linear system singular."
    g = torch.Generator().manual_seed(5)
    D, Z = torch.randn(80, 16, generator=g).double(), torch.randn(6, 16, generator=g).double()
    if twin:
        D[1] = D[0]
        Z[0] = 2 * D[0]
    for nonneg in (False, True):
        codes, gap = elastic_net(Z, D, 0.05, tau, tol=1e-11, nonneg=nonneg)
        assert gap.max() <= 1e-11 and duality_gap(Z, D, codes, 0.05, tau, nonneg).max() <= 1.1e-11


@quick
@given(seeds, st.integers(1, 12), st.sampled_from([None, .5, 6.]), st.booleans())
def test_three_ways_choose_the_same_atoms(seed, k, tol, twice):
    "One vector in NumPy, a batch with a table of Gram rows, a batch without: the same support in the same order."
    Z, D = problem(seed, dtype=torch.float64)
    if twice: D = torch.cat([D, D[:7]])
    U = D/D.norm(dim=1, keepdim=True)
    for z in (Z, 0*Z, D[:1]*2):
        table, without = sparse_coding._pursue(z, U, k, tol, U@U.T)[:2], sparse_coding._pursue(z, U, k, tol, None)[:2]
        same = lambda a, b: torch.equal(a % 40, b % 40)  # which of two equal rows is taken is rounding's choice
        assert torch.equal(table[1], without[1]) and same(table[0]*table[1], without[0]*without[1])
        for i in range(len(z)):
            support, used = sparse_coding._pursue_one(z[i:i + 1], U, k, tol, (U@U.T).numpy())
            assert torch.equal(used[0], table[1][i]) and same(support[0]*used[0], table[0][i]*table[1][i])


@quick
@given(seeds, st.floats(.05, 5), st.floats(.1, 1), st.booleans())
def test_the_objective_never_rises_with_more_steps(seed, alpha, tau, nonneg):
    "More rounds of the elastic net never end higher, and every answer is below the start at zero."
    Z, D = problem(seed, dtype=torch.float64)
    values = torch.stack([objective(Z, D, elastic_net(Z, D, alpha, tau, max_iter=i, tol=0, nonneg=nonneg)[0], alpha, tau) for i in (5, 50, 400)])
    assert (values.diff(dim=0) <= 1e-7*values[0]).all() and (values[-1] <= .5*Z.square().sum(1) + 1e-9).all()


@settings(quick, max_examples=10)
@given(seeds)
def test_elastic_net_scaling(seed):
    "Rows twice as long and a penalty that follows: half the coefficients."
    Z, D = problem(seed, dtype=torch.float64)
    C, two = elastic_net(Z, D, .5, 1., tol=1e-10)[0], elastic_net(Z, 2*D, 1., 1., tol=1e-10)[0]
    assert torch.allclose(2*two, C, atol=1e-4)


def test_removal_looks_only_at_what_it_takes():
    "Shapes are checked against the whole dictionary; rows that nothing uses are not read."
    Z, D = problem(0)
    C = omp(Z, D, 4)
    unused = int((C == 0).all(0).nonzero()[0])
    spoilt = D.clone()
    spoilt[unused] = torch.nan
    assert torch.equal(oblique_projection(Z, spoilt, C, torch.ones(len(D), dtype=torch.bool)), oblique_projection(Z, D, C, torch.ones(len(D), dtype=torch.bool)))
    spoilt[int(C[0].abs().argmax())] = torch.nan
    with pytest.raises(ValueError, match='NaN'): oblique_projection(Z, spoilt, C, torch.ones(len(D), dtype=torch.bool))


@pytest.mark.skipif(importlib.util.find_spec('skglm') is None, reason='skglm is not installed')
@pytest.mark.parametrize('tau', [.5, .9])
def test_skglm_agrees(tau):
    "A second opinion from a solver of another school (working sets with Anderson acceleration)."
    from skglm import ElasticNet as Peer
    Z, D = problem(11, 4, 60, 40, dtype=torch.float64)
    C, gap = elastic_net(Z, D, 2., tau, tol=1e-12, max_iter=20_000)
    peer = Peer(alpha=2./D.shape[1], l1_ratio=tau, fit_intercept=False, tol=1e-12, max_iter=1000)
    theirs = torch.from_numpy(np.stack([peer.fit(D.numpy().T, z).coef_ for z in Z.numpy()]))
    assert (C - theirs).abs().max() < 1e-5


def test_a_batch_with_near_twins_keeps_its_precision():
    "Rows that differ by a thousandth amplify rounding a million times; coefficients are still those of float64 on the same rows."
    g = torch.Generator().manual_seed(0)
    D = torch.nn.functional.normalize(torch.randn(4, 16, generator=g), dim=1)
    D = torch.cat([D, D + 3e-3*torch.randn(4, 16, generator=g)])
    Z = 101*D[:4] - 100*D[4:] + torch.randn(4, 16, generator=g)
    codes = omp(Z, D, 8)
    assert (codes != 0).all() # both of all twins
    for z, c in zip(Z, codes):
        rows = c.nonzero()[:, 0]
        exact = torch.linalg.lstsq(D[rows].T.double(), z.double()[:, None]).solution[:, 0]
        assert (c[rows] - exact).abs().max() < 1e-4*exact.abs().max()
