"""The checkers of the exercises: every solution passes, usual mistakes are recognised, and nonsense is explained."""
import hashlib
import json
import math
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from daco_nb import checks
from daco_nb.checks import NotYet, call, describe, diagnose, examine, factor, same
from daco_nb.mllm import ROLES

NBS = Path(__file__).resolve().parent.parent / "nbs"
CHECKS = {n: f for n, f in vars(checks).items() if n.startswith("check_")}
NOTEBOOKS = sorted(p for p in NBS.glob("[01][0-9]*.ipynb") if p.stem != "15_checks")


def code_cells(path):
    "Sources of a notebook's code cells."
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


EXERCISES = {}  # checker -> (notebook, name of the student's function, stub cell, solution cell)
for notebook in NOTEBOOKS:
    for cell in code_cells(notebook):
        if found := re.search(r"^(check_\w+)\((\w+)\)$", cell, re.M):
            pair = EXERCISES.setdefault(found[1], (notebook.stem, found[2], {}))[2]
            assert (kind := "stub" if "#| eval: false" in cell else "solution") not in pair, f"two cells of {found[1]} are a {kind}"
            pair[kind] = cell


def run(cell, at):
    "Run a cell with what its notebook imports, without the call of its checker and the lines after it."
    space = dict(torch=torch, np=np, F=F, re=re, math=math, json=json, hashlib=hashlib, contextmanager=contextmanager, TEXT=2, LAST=4, ANSWER=5)
    exec(cell[:cell.index(f"\n{at}(")], space)
    return space


def unit(x, dim=1):
    return F.normalize(x, dim=dim)


@contextmanager
def unsafe(layer, v):
    handle = layer.register_forward_hook(lambda m, a, out: out + v)
    yield
    handle.remove()


@contextmanager
def lasting(layer, v):
    layer.register_forward_hook(lambda m, a, out: out + v)
    yield


@contextmanager
def silent(layer, v):
    handle = layer.register_forward_hook(lambda m, a, out: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def weighty(layer, v):
    layer.bias.data += v
    try:
        yield
    finally:
        layer.bias.data -= v


def twice(layer, v):
    return unsafe(layer, 2 * v)


@contextmanager
def instead(layer, v):
    handle = layer.register_forward_hook(lambda m, a, out: v.expand_as(out))
    yield
    handle.remove()


@contextmanager
def sweeping(layer, v):
    layer.register_forward_hook(lambda m, a, out: out + v)
    try:
        yield
    finally:
        layer._forward_hooks.clear()


@contextmanager
def swallowing(layer, v):
    handle = layer.register_forward_hook(lambda m, a, out: out + v)
    try:
        yield
    except Exception:
        pass
    finally:
        handle.remove()


def loose(data, digest):
    if hashlib.sha256(data).hexdigest()[:8] != digest[:8]:
        raise ValueError(f"{hashlib.sha256(data).hexdigest()} is not {digest}")
    return data


def terse(data, digest):
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("wrong digest")
    return data


def asserted(data, digest):
    assert hashlib.sha256(data).hexdigest() == digest
    return data


def at_all(words):
    return lambda text: any(w in text.lower() for w in words)


def last_block(blocks, k):
    for block in blocks:
        pass
    return block.topk(min(k, len(block))).indices


def thirsty(blocks, k):
    scores = [x for block in blocks for x in block.tolist()]
    return sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)[:k]


def stream(parts, double=True, minus=1, root=.5):
    n = total = square = 0
    for z in parts:
        z = z.double() if double else z
        n, total, square = n + len(z), total + z.sum(0), square + (z * z).sum(0)
    return total / n, ((square - n * (total / n) ** 2) / (n - minus)).clamp(min=0) ** root


def mean_of_means(parts):
    means, stds = zip(*((z.double().mean(0), z.double().std(0)) for z in parts))
    return torch.stack(means).mean(0), torch.stack(stds).mean(0)


def labels(near=lambda b, g, eta: (b <= eta, g <= eta), cos=torch.cosine_similarity, worst_first=False):
    "Eq. 9 with one part exchanged."
    def answer(atoms, bad, good, eta):
        b, g = (1 - cos(atoms, c[None]) for c in (bad, good))
        is_bad, is_good = near(b, g, eta)
        return torch.where(is_bad & (worst_first | ~is_good | (b <= g)), -1, torch.where(is_good, 1, 0))
    return answer


def spread(hits, topics, groups=False):
    "Standard error of independent answers, or of topic means."
    x = [np.mean([h for h, t in zip(hits, topics) if t == u]) for u in sorted(set(topics))] if groups else np.array(hits, float)
    return np.std(x, ddof=1) / len(x) ** .5


def agreement(a, b):
    return np.mean([x == y for x, y in zip(a, b)])


def luck(a, b):
    return sum(a.count(w) * b.count(w) for w in set(a + b)) / len(a) ** 2


def top(x, k):
    return torch.zeros_like(x).scatter(1, x.topk(k).indices, x.topk(k).values)


def hard(image, text, out, n, one_sided=True, score=torch.maximum):
    s = score(image, text).clone()
    s[out] = -99
    return s.masked_fill((torch.minimum(image, text) >= 0) & one_sided, -99).topk(n).indices


def omp(z, D, taken, norms=True, absolute=True, left=True):
    r = z - torch.linalg.lstsq(D[taken].T, z[:, None]).solution[:, 0] @ D[taken] if taken and left else z
    s = D @ r / (D.norm(dim=1) if norms else 1)
    return taken + [int((s.abs() if absolute else s).argmax())]


def share(z, z_hat, centre, dims):
    above, below = (z - z_hat).square(), (z - centre).square()
    return 1 - (above.sum(dims) / below.sum(dims)).mean()


LABELS = ("undesirable", "desirable", "neither")


def alarm(high, low, of=torch.max, tie=.5):
    a, b = (torch.stack([of(x) for x in prompts]) for prompts in (high, low))
    return ((a[:, None] > b) + tie * (a[:, None] == b)).float().mean()


def best_pairs(code, pair, k, score, above=0):
    of = {p: [c for c, q in zip(code.tolist(), pair.tolist()) if p == q] for p in set(pair.tolist())}
    return sorted((p for p in of if max(of[p]) > above), key=lambda p: score(of[p]), reverse=True)[:k]


def guard(words, code="S([1-9]|1[0-4])"):
    found = re.fullmatch(rf"\s*(safe|unsafe\n{code}(,{code})*)\s*", words)
    return "unparsed" if not found else "harmful" if "unsafe" in words else "safe"


def read_keys(lines):
    return [json.loads(line)["key"] for line in lines]


def pooled(differences, errors, power=2):
    "09e.1: the mean with weights of one over the squared error, and its error."
    w = np.array(errors) ** -float(power)
    return (w * differences).sum() / w.sum(), (np.array(errors) ** -2.0).sum() ** -0.5


def no_worse(row, than, sign=-1):
    "09e.2: as safe, as seldom declining, as useful."
    return all(a * s >= b * s for a, b, s in zip(row, than, (1, sign, 1)))


def spill(before, after, own, size=torch.abs, total=torch.sum, rest=None, still=math.nan):
    change = after - before
    mine = total(change[:, own], 1).mean().abs()
    others = change[:, [i for i in range(change.shape[1]) if i not in own] if rest is None else rest]
    return size(others).mean() / mine if mine else still


def parts_of(content, join):
    texts, images = ([p[kind] for p in content if p["type"] == kind] for kind in ("text", "image"))
    return join.join(texts), images[0] if images else None


def one_of(content, join):
    if sum(p["type"] == "image" for p in content) > 1:
        raise ValueError("two pictures")
    return parts_of(content, join)


def bytes_back(rows, scale=lambda r: r.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127, whole=torch.round):
    s = scale(rows)
    return whole(rows / s).to(torch.int8) * s


def opinions_of(ops, known=("undesirable", "desirable", "neither")):
    return {c: (label, source) for c, label, source in ops if label in known}


def ringing(threshold, over=torch.gt, where=slice(None)):
    return lambda v, b, g, most: [over(x, threshold(v, b, g, 1 - most)).float().mean() for x in (b, g)][where]


def higher(x, q):
    return x.quantile(q, interpolation="higher")


def luck_of(own, shown, among=set.__and__):
    return sum(len(among(o, set(shown))) for o in own) / len(shown)


def judged_alike(a, b, like=lambda x, y: (x == "harmful") == (y == "harmful"), keep=lambda x, y: "unparsed" not in (x, y)):
    return np.mean([like(x, y) for x, y in zip(a, b) if keep(x, y)]), sum("unparsed" in p for p in zip(a, b))


def differences(new, old):
    return np.array([new[q] - old[q] for q in new if q in old], float)


def projected(z, v):
    return float((z @ v).mean() / v.norm())


def declined_rates(rows, of=lambda hits, rows: sum(hits) / len(hits) if hits else math.nan, kinds=("attack", "twin")):
    return {f"{name}_declined": of([d for k, d in rows if k == kind], rows) for name, kind in zip(("attack", "twin"), kinds)}


def standing_out(codes, n, height=lambda c: c.amax(0) - c.mean(0), least=0.):
    h = height(codes)
    return [i for i in h.argsort(descending=True).tolist() if h[i] > least][:n]


def affected(before, after, own, keys=dict.__or__, everybody=True):
    what = {k for k in keys(before, after) if before.get(k, "default") != after.get(k, "default")}
    return [m for m in own if what & own[m] or everybody and what - set().union(*own.values())]


def raced(runners, rounds, clock, warm=True, rows=lambda t: list(zip(*t))[1:], by="round"):
    out = [[] for _ in runners]
    order = [(i, k) for k in range(rounds + warm) for i in range(len(runners))]
    for i, _ in order if by == "round" else sorted(order):
        start = clock()
        runners[i]()
        out[i].append(clock() - start)
    return rows(out)


def spoken_loss(logits, ids, speaks, **how):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(~speaks[:, 1:], -100).flatten(), **how)


def closest(said, names, centre=lambda s, v: (v.mean(0), v.mean(0)), norm=F.normalize):
    a, b = centre(said, names)
    return (norm(said - a) @ norm(names - b).T).argmax(1)


def in_cache(s, tokens, batch, heads="kv_heads", factors=4):
    return factors * s["layers"] * s[heads] * s["d"] // s["heads"] * tokens * batch


def joined(path, parts):
    text = "".join(parts)
    path.write_text(text, encoding="utf-8")
    return path


def remade(path, parts):
    path.unlink(missing_ok=True)
    return half(path, parts)


def half(path, parts):
    tmp = path.with_suffix(".tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        f.writelines(parts)
    return tmp.replace(path)


def straight(path, parts):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(parts)
    return path


def silently(path, parts):
    try:
        return joined(path, parts)
    except RuntimeError:
        return path


def appended(path, parts):
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(parts))
    return path


WRONG = {  # checker -> (wrong answer, a word of the diagnosis)
    "check_pick": [
        (lambda names, seed, i, g=np.random.default_rng(0): names[g.integers(len(names))], "remembers"),
        (lambda names, seed, i: names[np.random.default_rng(seed).integers(len(names))], "index hardly matters"),
        (lambda names, seed, i: names[np.random.default_rng(i).integers(len(names))], "seed has no effect"),
        (lambda names, seed, i: names[np.random.default_rng(seed + i).integers(len(names))], "shifted by one")],
    "check_verified": [(loose, "last letter"), (terse, "name both"), (asserted, "python -O"), (lambda data, digest: data, "passed"), (lambda data, digest: True, "data should come back")],
    "check_nearest": [(lambda p, t: (p @ t.T).argmax(1), "norms"), (lambda p, t: (unit(p) @ unit(t).T).argmax(0), "of each text"),
                      (lambda p, t: (unit(p) @ unit(t).T).argmin(1), "farthest"), (lambda p, t: (unit(p) @ unit(t).T).max(1).values, "indices")],
    "check_outputs": [(lambda s, layers: {l: s[l] for l in layers}, "receives"), (lambda s, layers: [s[l + 1] for l in layers], "dictionary")],
    "check_words_only": [(lambda h, r, v: h + v, "every position"), (lambda h, r, v: h + (r != 2)[..., None] * v, "other way round"),
                         (lambda h, r, v: (h + v) * (r == 2)[..., None], "gone"), (lambda h, r, v: h.add_(v), "in place")],
    "check_under": [(lambda cs, w: [c.name for c in cs if c.hypernyms[0] == w], "whole chain"), (lambda cs, w: [c.name for c in cs if w in " ".join(c.hypernyms)], "letters"),
                    (lambda cs, w: [c for c in cs if w in c.hypernyms], "names are asked"), (lambda cs, w: [c.name for c in cs if w in (c.name, *c.hypernyms)], "itself")],
    "check_commonest": [(lambda s: max(s, key=lambda x: x[2])[0], "animal or plant goes first"), (lambda s: min(s, key=lambda x: x[2])[0], "least"),
                        (lambda s: sorted(s, key=lambda x: x[2])[-1][0], "lists the more usual"), (lambda s: min(s, key=lambda x: (x[1] != "noun.animal", -x[2]))[0], "count decides")],
    "check_geometric_distance": [(lambda a, b: -(a * b).log(), "square root is missing"), (lambda a, b: (a + b) / 2, "arithmetic mean"), (lambda a, b: (a * b).log().sqrt(), "minus"),
                                 (lambda a, b: (a.log() * b.log()).sqrt(), "multiplied"), (lambda a, b: (-(a * b).log10()).sqrt(), "base")],
    "check_hard_negatives": [(lambda a, b, p, n: hard(a, b, [], n), "positive came back"), (lambda a, b, p, n: hard(a, b, p, n, False), "both halves"),
                             (lambda a, b, p, n: (a + b).topk(n, largest=False).indices, "farthest"), (lambda a, b, p, n: hard(a, b, p, n, score=torch.add), "nearer half"),
                             (lambda a, b, p, n: hard(a, b, p, n).flip(0), "order")],
    "check_walk": [(lambda bs, k: [i for _, i in sorted(((s, i) for b in bs for i, s in enumerate(b.tolist())), reverse=True)][:k], "where the block starts"),
                   (last_block, "last block"), (lambda bs, k: sorted((x for b in bs for x in b.tolist()), reverse=True)[:k], "Those are the scores"),
                   (lambda bs, k: thirsty(bs, k)[::-1], "order"), (lambda bs, k: torch.cat(list(bs)).topk(k).indices, "in memory")],
    "check_caption_mean": [(lambda h, c: h.mean(1), "all tokens"), (lambda h, c: h.masked_fill(~c[..., None], 0).mean(1), "number of caption tokens of each row"),
                           (lambda h, c: h.masked_fill(~c[..., None], 0).sum(1) / c.sum(1, keepdim=True), "0/0"), (lambda h, c: h.mean(0), "rows of the batch"),
                           (lambda h, c: (h * c[..., None]).sum(1) / c.sum(1, keepdim=True).clamp(min=1), "infinity")],
    "check_stream": [(lambda parts: (torch.cat(list(parts)).mean(0), 0), "in memory"), (mean_of_means, "averaged the means and the standard deviations"),
                     (lambda parts: stream(parts, minus=0), "n - 1"), (lambda parts: stream(parts, root=1), "variance"), (lambda parts: stream(parts, double=False), "double precision")],
    "check_concept_vector": [(lambda p, n, s: (n.mean(0) - p.mean(0)) / s, "sign"), (lambda p, n, s: p.mean(0) - n.mean(0), "standardisation is missing"), (lambda p, n, s: (p.sum(0) - n.sum(0)) / s, "sums"),
                             (lambda p, n, s: unit((p.mean(0) - n.mean(0)) / s, 0), "length 1"), (lambda p, n, s: (p.mean(1).mean() - n.mean(1).mean()) / s, "over the dimensions")],
    "check_split_half": [(lambda p, n: torch.cosine_similarity(p[::2].mean(0), p[1::2].mean(0), dim=0), "negatives are missing"),
                         (lambda p, n: (p[::2].mean(0) - n[::2].mean(0)) @ (p[1::2].mean(0) - n[1::2].mean(0)), "norms"),
                         (lambda p, n: torch.cosine_similarity(p[:4].mean(0) - n[:4].mean(0), p[4:].mean(0) - n[4:].mean(0), dim=0), "middle"),
                         (lambda p, n: torch.cosine_similarity(p[::2].mean(0) - n.mean(0), p[1::2].mean(0) - n.mean(0), dim=0), "share the same negatives")],
    "check_separation": [(lambda p, n: (p[:, None] > n).float().mean(), "counts nothing"), (lambda p, n: (p[:, None] >= n).float().mean(), "counts fully"),
                         (lambda p, n: (p[:, None] < n).float().mean() + (p[:, None] == n).float().mean() / 2, "negative is higher"), (lambda p, n: p.mean() - n.mean(), "difference of the means")],
    "check_soft_threshold": [(lambda c, by: c * (c.abs() > by), "hard threshold"), (lambda c, by: (c.abs() - by).clamp(min=0), "signs are gone"), (lambda c, by: (c - by).clamp(min=0), "cut off"),
                             (lambda c, by: c - by * c.sign(), "crossed zero")],
    "check_omp_step": [(lambda z, D, t: omp(z, D, t, norms=False), "norm"), (lambda z, D, t: omp(z, D, t, absolute=False), "absolute"), (lambda z, D, t: omp(z, D, t, left=False), "unexplained"),
                       (lambda z, D, t: omp(z, D, t)[-1], "whole support")],
    "check_take_out": [(lambda z, D, c, i: z - (z @ D[i]) / (D[i] @ D[i]) * D[i], "orthogonal"), (lambda z, D, c, i: c @ D - c[i] * D[i], "residual"), (lambda z, D, c, i: z + c[i] * D[i], "added"),
                       (lambda z, D, c, i: z - c @ D, "every concept")],
    "check_fve": [(lambda z, h: (z - h).square().sum() / (z - z.mean(0)).square().sum(), "unexplained"), (lambda z, h: share(z, h, 0, (0, 1)), "mean is missing"),
                  (lambda z, h: share(z, h, z.mean(0), 1), "single rows"), (lambda z, h: share(z, h, z.mean(0), 0), "single dimensions"), (lambda z, h: share(z, h, z.mean(), (0, 1)), "own mean")],
    "check_topk": [(top, "negative entry"), (lambda x, k: x * (x.abs() >= x.abs().topk(k).values[:, -1:]), "absolute value"), (lambda x, k: x.relu(), "no more than k"),
                   (lambda x, k: x.relu().topk(k).values, "scatter"), (lambda x, k: (top(x.relu(), k) > 0).float(), "values are asked")],
    "check_tangent": [(lambda g, W: (g * W).sum(1, keepdim=True) * W, "should go"), (lambda g, W: g - (g * W).sum() * W, "whole matrix"), (lambda g, W: g - (g * W).sum(0) * W, "columns"),
                      (lambda g, W: unit(g - (g * W).sum(1, keepdim=True) * W), "divided by its norm")],
    "check_label": [(labels(lambda b, g, eta: (1 - b <= eta, 1 - g <= eta)), "compared the cosine"), (labels(cos=lambda u, v: (u * v).sum(1)), "norms are missing"),
                    (labels(lambda b, g, eta: (b <= 9, g <= 9)), "near neither"), (labels(worst_first=True), "undesirable always won"),
                    (lambda *a: -labels()(*a), "exchanged")],
    "check_precision_recall": [(lambda f, t: ((f & t).sum() / t.sum(), (f & t).sum() / f.sum()), "exchanged"), (lambda f, t: ((f == t).float().mean(),) * 2, "accuracy"),
                               (lambda f, t: (int((f & t).sum()) / max(1, int(f.sum())), (f & t).sum() / t.sum()), "nan, not 0"), (lambda f, t: (f & t).sum() / f.sum(), "both")],
    "check_push": [(lambda h, r, v: h + v, "every position"), (lambda h, r, v: h + (r == 4)[..., None] * v, "Generated tokens"), (lambda h, r, v: h + (r == 5)[..., None] * v, "last prompt token is left"),
                   (lambda h, r, v: torch.cat([h[:, :-1], h[:, -1:] + v], 1), "read along")],
    "check_gated": [(lambda h, s, c, t, v: h + v * ((s * c).sum(1) / c.sum(1) > t)[:, None, None], "maximum"), (lambda h, s, c, t, v: h + v * bool((s[c] > t).any()), "opened all"),
                    (lambda h, s, c, t, v: h + v * (s.amax(1) > t)[:, None, None], "Padding"), (lambda h, s, c, t, v: h + v * ((s > t) & c)[..., None], "only the tokens")],
    "check_adding": [(unsafe, "finally"), (lasting, "remove the hook after"), (silent, "nothing changed"), (weighty, "never on weights"), (twice, "added twice"), (instead, "replaced"), (sweeping, "Somebody else"), (swallowing, "swallowed"),
                     (lambda layer, v: layer.register_forward_hook(lambda m, a, out: out + v) and 3, "@contextmanager")],
    "check_clustered_error": [(lambda h, t: spread(h, t), "independent"), (lambda h, t: (np.mean(h) * (1 - np.mean(h)) / len(h)) ** .5, "independent"),
                              (lambda h, t: spread(h, t, groups=True), "topic means"), (lambda h, t: np.mean(h), "rate")],
    "check_kappa": [(agreement, "plain agreement"), (lambda a, b: agreement(a, b) - luck(a, b), "1 - chance"), (lambda a, b: (agreement(a, b) - 1 / 3) / (2 / 3), "number of words"), (luck, "by luck")],
    "check_declines": [(at_all(["sorry", "can't", "can’t", "cannot"]), "anchor"), (lambda text: text.startswith(("I'm sorry", "I can")), "curly"),
                       (lambda text: bool(re.match(r"\s*i(['’]m sorry| can['’]t| cannot)", text, re.I)), "lookahead"),
                       (lambda text: re.match("I'm sorry", text), "bool(")],
    "check_negatives": [(lambda drawn, own, per, count: [o * per + k % per for k, o in enumerate(drawn[:count])], "concept itself"),
                        (lambda drawn, own, per, count: [o * per + k % per for k, o in enumerate(drawn) if o != own][:count], "left out"),
                        (lambda drawn, own, per, count: [o * per + j for o in drawn if o != own for j in range(per)][:count], "one pair from each"),
                        (lambda drawn, own, per, count: list(range(90, 90 + count)), "that was not drawn"), (lambda drawn, own, per, count: [own + 1], "negatives, got 1")],
    "check_read_label": [(lambda line: next((w for w in LABELS if w in line.lower()), "unparsed"), "anywhere"),
                         (lambda line: next((w for w in LABELS if line.strip().lower().startswith(w)), "unparsed"), "nothing else"),
                         (lambda line: next((w for w in LABELS if re.search(w, line.partition(":")[0], re.I)), "unparsed"), "nothing else"),
                         (lambda line: w if (w := line.split(":")[0].strip().lower()) in LABELS else "unparsed", "without a colon"),
                         (lambda line: next((w for w in sorted(LABELS) if w in line.lower()), "unparsed"), "inside")],
    "check_alarm_auc": [(lambda high, low: alarm(high, low, torch.mean), "mean over tokens"), (lambda high, low: alarm(high, low, torch.sum), "sum over tokens"), (lambda high, low: alarm(high, low, tie=0), "nothing here"),
                        (lambda high, low: alarm(low, high), "harmless prompt is louder"), (lambda high, low: alarm(torch.cat(high), torch.cat(low)), "single tokens")],
    "check_top_pairs": [(lambda c, p, k: p[c.topk(min(k, len(c))).indices], "came twice"), (lambda c, p, k: best_pairs(c, p, k, sum), "added up"), (lambda c, p, k: best_pairs(c, p, k, max, -1), "never fired"),
                        (lambda c, p, k: c.sort(descending=True).values[:k], "Those are the codes")],
    "check_requery": [(lambda p, a, h, ask: [s if bad else x for s, x, bad in zip(ask(p), a, h)], "where the first answer was harmless"),
                      (lambda p, a, h, ask: [x for x, bad in zip(a, h) if not bad] + [s for q, bad in zip(p, h) if bad for s in ask([q])], "stand at the end"),
                      (lambda p, a, h, ask: ask([q for q, bad in zip(p, h) if bad]), "empty list"), (lambda p, a, h, ask: [ask(q) if bad else x for q, x, bad in zip(p, a, h)], "takes a list"), (lambda p, a, h, ask: a, "harmful ones too")],
    "check_guard": [(lambda w: "harmful" if "unsafe" in w else "safe" if "safe" in w else "unparsed", "anywhere"), (lambda w: "safe" if "safe" in w else "unparsed", "inside"),
                    (lambda w: {"safe": "safe", "unsafe": "harmful"}.get(w.split()[0] if w else "", "unparsed"), "first line alone"), (lambda w: guard(w) if guard(w) != "unparsed" else "safe", "never safe"),
                    (lambda w: guard(w, r"S\d+"), "S77")],
    "check_to_do": [(lambda text, keys: [k for k in keys if k not in text], "quote"), (lambda text, keys: [k for k in keys if k not in read_keys(text.splitlines()[1:-1])], "although it is whole"),
                    (lambda text, keys: [k for k in keys if k not in read_keys(text.splitlines()[1:])], "JSONDecodeError"), (lambda text, keys: read_keys(text.split("\n")[1:-1]), "others are asked for")],
    "check_pooled": [(lambda d, e: (np.mean(d), np.mean(e)), "plain mean"), (lambda d, e: (pooled(d, e, 1)[0], pooled(d, e)[1]), "variances that add"), (lambda d, e: pooled(d, e, -2), "The more unsure"),
                     (lambda d, e: (pooled(d, e)[0], min(e)), "another mean"), (lambda d, e: (pooled(d, e)[0], pooled(d, e)[1] ** 2), "a root is missing")],
    "check_beats": [(lambda t, n: [m for m, r in t.items() if r[0] > t[n][0]], "safety alone"), (lambda t, n: [m for m in t if m != n and no_worse(t[m], t[n])], "equal in everything"),
                    (lambda t, n: [m for m in t if no_worse(t[m], t[n], 1) and t[m] != t[n]], "a cost"), (lambda t, n: [m for m, r in t.items() if r[0] > t[n][0] or r[1] < t[n][1] or r[2] > t[n][2]], "a trade"),
                    (lambda t, n: [m for m in t if no_worse(t[m][:2], t[n][:2]) and t[m][:2] != t[n][:2]], "left utility out")],
    "check_collateral": [(lambda b, a, own: spill(b, a, own, rest=slice(None)), "among the others"), (lambda b, a, own: spill(b, a, own, size=torch.Tensor.clone), "cancel"),
                         (lambda b, a, own: spill(b, a, own, size=lambda x: x.abs() * 3), "add"), (lambda b, a, own: spill(b, a, own, still=0.), "not 0"), (lambda b, a, own: spill(b, a, own, total=torch.mean), "together")],
    "check_one_question": [(lambda c: (c, None) if isinstance(c, str) else parts_of(c, "\n"), "without a word"), (lambda c: (c, None) if isinstance(c, str) else one_of(c, " "), "line break"),
                           (lambda c: (c, None) if isinstance(c, str) else one_of(c, "\n")[::-1], "exchanged"), (lambda c: one_of(c, "\n"), "raised TypeError"), (lambda c: one_of(c, 3), "raised")],
    "check_eight_bits": [(lambda r: bytes_back(r, lambda r: r.abs().max() / 127), "own"), (lambda r: bytes_back(r, whole=torch.trunc), "nearest"), (lambda r: bytes_back(r, lambda r: r.abs().amax(0) / 127), "columns"),
                         (lambda r: bytes_back(r) / r.abs().amax(1, keepdim=True).clamp(min=1e-9) * 127, "whole numbers"), (lambda r: bytes_back(r, lambda r: r.abs().amax(1, keepdim=True) / 127, whole=lambda x: x.round()) + r * 0 / r.abs().amax(1, keepdim=True), "0/0"),
                         (lambda r: (r / (s := r.amax(1, keepdim=True).clamp(min=1e-9) / 127)).round() * s, "negative number may")],
    "check_grow": [(lambda t, ops: t | opinions_of(ops), "by hand"), (lambda t, ops: {c: (label, source) for c, label, source in ops} | t, "none of the three"), (lambda t, ops: {c: r for c, r in opinions_of(ops).items() if c not in t}, "Only the new"),
                   (lambda t, ops: t.update(opinions_of(ops)) or t, "in place"), (lambda t, ops: t | {c: r for c, r in opinions_of(ops).items() if c not in t or t[c][1] != "me"}, "not what a model wrote")],
    "check_at_threshold": [(ringing(lambda v, b, g, q: higher(g, q)), "of the test, and then"), (ringing(lambda v, b, g, q: v.quantile(q)), "interpolated"), (ringing(lambda v, b, g, q: higher(v, q), torch.ge), "equals"),
                           (ringing(lambda v, b, g, q: v.max()), "a few are allowed"), (ringing(lambda v, b, g, q: higher(v, q), where=slice(None, None, -1)), "exchanged")],
    "check_by_chance": [(lambda best, own, shown: (sum(b in o for b, o in zip(best, own)), luck_of(own, shown, lambda o, s: o)), "cannot be drawn"), (lambda best, own, shown: (sum(b in o for b, o in zip(best, own)), len(own) / len(shown)), "not one"),
                        (lambda best, own, shown: (sum(b in o for b, o in zip(best, own)), luck_of(own, shown) / len(own)), "add up"), (lambda best, own, shown: (np.mean([b in o for b, o in zip(best, own)]), luck_of(own, shown) / len(own)), "shares")],
    "check_low_rank": [(lambda x, W, A, B: x @ (W + B @ A), "Both W"), (lambda x, W, A, B: x @ W.T + x @ B @ A, "wrong side"), (lambda x, W, A, B: (x @ W.T) @ A.T @ B.T + x @ W.T, "reads what the layer was given"),
                       (lambda x, W, A, B: x @ (B @ A).T, "alone"), (lambda x, W, A, B: F.linear(x, W.add_(B @ A)), "in place")],
    "check_agree": [(lambda a, b: judged_alike(a, b, like=str.__eq__), "words"), (lambda a, b: judged_alike(a, b, keep=lambda x, y: True), "not harmful here"), (lambda a, b: judged_alike(a, b)[0], "got the number"),
                    (lambda a, b: (judged_alike(a, b)[0], sum(x == y == "unparsed" for x, y in zip(a, b))), "neither"), (lambda a, b: (judged_alike(a, b)[0], judged_alike(a, b)[1] / len(a)), "its number")],
    "check_paired": [(lambda n, o: (differences(n, o).mean(), np.hypot(*(np.std([x[q] for q in n if q in o], ddof=1) / len(differences(n, o)) ** .5 for x in (n, o)))), "separate groups"),
                     (lambda n, o: (differences(n, o).mean(), differences(n, o).std(ddof=1)), "single differences"), (lambda n, o: (differences(n, o).mean(), differences(n, o).std() / len(differences(n, o)) ** .5), "n - 1"),
                     (lambda n, o: ((d := np.subtract(*zip(*zip(n.values(), o.values())))).mean(), d.std(ddof=1) / len(d) ** .5), "by their place"),
                     (lambda n, o: (-differences(n, o).mean(), differences(n, o).std(ddof=1) / len(differences(n, o)) ** .5), "sign")],
    "check_amount": [(lambda s, o, v: max(0., (s @ v).mean().item() - (o @ v).mean().item()), "norm"), (lambda s, o, v: projected(s, v), "anyway"), (lambda s, o, v: projected(s, v) - projected(o, v), "Below zero"),
                     (lambda s, o, v: (s.mean(0) - o.mean(0)).norm(), "whole way"), (lambda s, o, v: abs(projected(s, v) - projected(o, v)), "size of a negative")],
    "check_rates": [(lambda rows: declined_rates(rows, lambda hits, rows: sum(hits) / len(rows)), "all questions"), (lambda rows: declined_rates(rows, lambda hits, rows: sum(hits) / max(1, len(hits))), "would look like"),
                    (lambda rows: declined_rates(rows, lambda hits, rows: np.mean(hits).item() if hits else math.nan, ("twin", "attack")), "exchanged"), (lambda rows: declined_rates(rows, lambda hits, rows: sum(hits) / len(hits)), "ZeroDivisionError"),
                    (lambda rows: declined_rates(rows, lambda hits, rows: sum(hits)), "counts")],
    "check_stands_out": [(lambda c, n: standing_out(c, n, lambda c: c.amax(0)), "loud everywhere tells"), (lambda c, n: standing_out(c, n, least=-1), "silent"), (lambda c, n: standing_out(c, n, lambda c: c.std(0)), "spread"),
                         (lambda c, n: standing_out(c.T, n), "Those are tokens"), (lambda c, n: standing_out(c, n, lambda c: c.amax(0) / (c.mean(0) + 1e-9)), "divided by the mean")],
    "check_ask_again": [(lambda b, a, own: affected(b, a, own, everybody=False), "concerns all"), (lambda b, a, own: list(own) if a != b else [], "need not be"), (lambda b, a, own: affected(b, a, own, lambda b, a: a), "gone"),
                        (lambda b, a, own: [m for m in own if m not in affected(b, a, own)], "can be kept"), (lambda b, a, own: affected(b, a, own, lambda b, a: b.keys() & a.keys()), "both have")],
    "check_times_as_fast": [(lambda s: (s[:, 0] / s[:, 1:].amin(1)).median(), "larger"), (lambda s: s.mean(0)[1:].min() / s.mean(0)[0], "divided means"), (lambda s: (s[:, 1:].amin(1) / s[:, 0]).mean(), "mean of the ratios"),
                            (lambda s: (s[:, 1] / s[:, 0]).median(), "first of the others"), (lambda s: s[:, 1:].amin(1).median() / s[:, 0].median(), "divided medians")],
    "check_race": [(lambda runners, rounds, clock: raced(runners, rounds, clock, by="runner"), "in a row"), (lambda runners, rounds, clock: raced(runners, rounds, clock, False, lambda t: list(zip(*t))), "Nobody ran"),
                   (lambda runners, rounds, clock: raced(runners, rounds, clock, rows=lambda t: list(zip(*t))), "leave it out"), (lambda runners, rounds, clock: raced(runners, rounds, clock, rows=lambda t: [r[1:] for r in t]), "row for each contender"),
                   (lambda runners, rounds, clock: raced(runners[:2], rounds, clock), "never ran"), (lambda runners, rounds, clock: np.cumsum(raced(runners, rounds, clock), 1), "just before")],
    "check_answer_loss": [(lambda l, i, s: F.cross_entropy(l[s], i[s]), "already read"), (lambda l, i, s: F.cross_entropy(l[:, :-1].flatten(0, 1), i[:, 1:].flatten()), "padding"), (lambda l, i, s: F.cross_entropy(l[:, :-1][s[:, :-1]], i[:, 1:][s[:, :-1]]), "one position before"),
                          (lambda l, i, s: np.mean([spoken_loss(l[b:b + 1], i[b:b + 1], s[b:b + 1]).item() for b in range(len(l))]), "each row first"), (lambda l, i, s: spoken_loss(l, i, s, reduction="sum"), "sum")],
    "check_nearest_name": [(lambda s, v: closest(s, v, lambda s, v: (0, 0)), "left in"), (lambda s, v: closest(s, v, lambda s, v: (0, v.mean(0))), "names only"), (lambda s, v: closest(s, v, lambda s, v: (s.mean(0), v.mean(0))), "these patches"),
                           (lambda s, v: closest(s, v, norm=lambda x: x), "Long names"), (lambda s, v: torch.cdist(s, v).argmin(1), "plain distance")],
    "check_cache_bytes": [(lambda s, t, b: in_cache(s, t, b, "heads"), "queries"), (lambda s, t, b: in_cache(s, t, b, factors=2), "half of it"), (lambda s, t, b: in_cache(s, t, 1), "one prompt"), (lambda s, t, b: in_cache(s | {"layers": 1}, t, b), "one layer"), (lambda s, t, b: in_cache(s, t, b) / 1e9, "the number")],
    "check_answer_seconds": [(lambda q, b, t, w, c, s: q * t * (w + c) / s, "batches pay"), (lambda q, b, t, w, c, s: q // b * t * (w + c) / s, "left out"), (lambda q, b, t, w, c, s: q / b * t * (w + c) / s, "not full"), (lambda q, b, t, w, c, s: math.ceil(q / b) * (w + c) / s, "every new token"), (lambda q, b, t, w, c, s: math.ceil(q / b) * t * w / s, "cache is read")],
    "check_write_report": [(straight, "in its place"), (half, "left behind"), (remade, "nothing before"), (silently, "swallowed"), (appended, "should hold"), (lambda path, parts: joined(path.with_name("other"), parts) and path, "no file of that name"), (lambda path, parts: str(joined(path, parts)), "Expected the path")]}


def message(check, answer):
    "What a checker says of an answer that it must refuse."
    with pytest.raises(NotYet) as told:
        check(answer)
    return str(told.value)


def test_each_checker_is_an_exercise_and_has_wrong_answers():
    "No checker without an exercise, none without a stub, a solution and two wrong answers; each is imported where it is used."
    assert set(CHECKS) == set(EXERCISES) == set(WRONG)
    assert {n.stem for n in NOTEBOOKS} == {notebook for notebook, *_ in EXERCISES.values()}
    for name, (notebook, _, cell) in EXERCISES.items():
        assert set(cell) == {"stub", "solution"}, name
        assert len({words for _, words in WRONG[name]}) >= 2, f"{name} needs two wrong answers with different diagnoses"
        assert CHECKS[name].__doc__.startswith(notebook.split("_")[0] + "."), name
        assert "#| code-fold: true" in cell["solution"], name
    for notebook in NOTEBOOKS:
        least = 1 if notebook.stem == "14_quickstart" else 2  # a console script, whose parts were exercises before
        assert least <= sum(n == notebook.stem for n, *_ in EXERCISES.values()) <= 4, notebook.stem
        text = "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
        titles = re.findall(r"^### (\d)\. .+ \([●○]{3}, \d+ minutes\)$", text[text.index("## Exercises"):], re.M)
        assert titles == [str(i + 1) for i in range(sum(n == notebook.stem for n, *_ in EXERCISES.values()))], f"{notebook.stem}: number, title, difficulty and minutes of each exercise"
        assert text.count("<summary>Hint</summary>") == len(titles), notebook.stem


@pytest.mark.parametrize("name", CHECKS)
def test_solution(name, capsys):
    "The notebook's own solution passes, with a word of praise."
    _, function, cell = EXERCISES[name]
    CHECKS[name](run(cell["solution"], name)[function])
    assert capsys.readouterr().out.startswith("Right. ")


class Replaced:
    "A block without hooks: the layer's forward is exchanged for a while."

    def __init__(self, layer, v):
        self.layer, self.v = layer, v

    def __enter__(self):
        old = self.layer.forward
        self.layer.forward = lambda x: old(x) + self.v

    def __exit__(self, *error):
        del self.layer.forward


def welford(parts):
    n, mean, square = 0, 0., 0.
    for row in (row.double() for part in parts for row in part):
        n += 1
        step = row - mean
        mean = mean + step / n
        square = square + step * (row - mean)
    return mean, (square / (n - 1)).sqrt()


OTHERWISE = [  # right answers of another kind: loops, numpy, lists, numbers as tensors
    ("check_pick", lambda names, seed, i: names[int(hashlib.sha256(f"{seed} {i}".encode()).hexdigest(), 16) % len(names)]),
    ("check_nearest", lambda p, t: [int(torch.cosine_similarity(x[None], t).argmax()) for x in p]),
    ("check_words_only", lambda h, r, v: torch.where((r == 2)[..., None], h + v, h)),
    ("check_commonest", lambda s: sorted(s, key=lambda x: (-x[2], x[1] not in ("noun.animal", "noun.plant")))[0][0]),
    ("check_geometric_distance", lambda a, b: np.sqrt(-np.log(a.numpy()) - np.log(b.numpy()))),
    ("check_hard_negatives", lambda a, b, p, n: [i for _, i in sorted((-max(x, y), i) for i, (x, y) in enumerate(zip(a.tolist(), b.tolist())) if i not in p and min(x, y) < 0)][:n]),
    ("check_walk", thirsty),
    ("check_caption_mean", lambda h, c: torch.stack([r[m].mean(0) if m.any() else torch.zeros(h.shape[2]) for r, m in zip(h, c)])),
    ("check_stream", welford),
    ("check_concept_vector", lambda p, n, s: ((p / s).double().mean(0) - (n / s).double().mean(0)).numpy()),
    ("check_split_half", lambda p, n: float(np.dot(*(x / np.linalg.norm(x) for x in ((p[i::2].mean(0) - n[i::2].mean(0)).numpy() for i in (0, 1)))))),
    ("check_separation", lambda p, n: np.mean([(a > b) + .5 * (a == b) for a in p.tolist() for b in n.tolist()])),
    ("check_soft_threshold", lambda c, by: (c - by).clamp(min=0) - (-c - by).clamp(min=0)),
    ("check_omp_step", lambda z, D, t: omp(z, D, t)),
    ("check_fve", lambda z, h: 1 - ((z - h)**2).mean() / z.var(0, correction=0).mean()),
    ("check_topk", lambda x, k: x.relu() * (x >= x.sort(descending=True).values[:, k - 1:k])),
    ("check_tangent", lambda g, W: torch.stack([a - torch.outer(w, w) @ a for a, w in zip(g, W)])),
    ("check_label", lambda a, b, g, eta: labels()(a, b, g, eta).tolist()),
    ("check_precision_recall", lambda f, t: [float("nan") if not d.any() else (f & t).sum().item() / d.sum().item() for d in (f, t)]),
    ("check_push", lambda h, r, v: torch.where(r.unsqueeze(-1) >= 4, h + v, h)),
    ("check_gated", lambda h, s, c, t, v: torch.stack([x + v if (y[m] > t).any() else x for x, y, m in zip(h, s, c)])),
    ("check_adding", Replaced),
    ("check_kappa", lambda a, b: np.float64((agreement(a, b) - luck(a, b)) / (1 - luck(a, b)))),
    ("check_declines", lambda t: re.match(r"\s*(i.m sorry|i can.t (?!wait)|i cannot)", t, re.I) is not None),
    ("check_negatives", lambda drawn, own, per, count: np.array([o * per + (count - k) % per for k, o in enumerate([o for o in drawn if o != own][:count])])),
    ("check_read_label", lambda line: m[1].lower() if (m := re.match(r"\s*(undesirable|desirable|neither)\s*:", line, re.I)) else "unparsed"),
    ("check_alarm_auc", lambda high, low: np.mean([(a.max() > b.max()).item() + .5 * (a.max() == b.max()).item() for a in high for b in low])),
    ("check_top_pairs", lambda c, p, k: torch.tensor(best_pairs(c, p, k, max))),
    ("check_requery", lambda p, a, h, ask: [ask([q])[0] if bad else x for q, x, bad in zip(p, a, h)]),
    ("check_guard", guard),
    ("check_to_do", lambda text, keys: sorted(set(keys) - set(read_keys(text[:text.rfind("\n")].split("\n")[1:])), key=keys.index)),
    ("check_collateral", spill),
    ("check_pooled", lambda d, e: np.array(pooled(d, e))),
    ("check_beats", lambda t, n: [m for m in t if no_worse(t[m], t[n]) and t[m] != t[n]]),
    ("check_one_question", lambda c: [c, None] if isinstance(c, str) else list(one_of(c, "\n"))),
    ("check_eight_bits", lambda rows: torch.stack([torch.zeros_like(r) if not r.any() else (r * 127 / r.abs().max()).round() * r.abs().max() / 127 for r in rows])),
    ("check_grow", lambda t, ops: dict([*((c, r) for c, r in opinions_of(ops).items() if c not in t), *t.items()])),
    ("check_at_threshold", lambda v, b, g, most: [np.mean(x.numpy() > v.sort(descending=True).values[int(most * len(v))].item()) for x in (b, g)]),
    ("check_by_chance", lambda best, own, shown: torch.tensor([sum(b in o for b, o in zip(best, own)), np.mean([[p in o for o in own] for p in shown]) * len(own)])),
    ("check_low_rank", lambda x, W, A, B: np.array([(W + B @ A).numpy() @ row.numpy() for row in x])),
    ("check_agree", lambda a, b: list(judged_alike(a, b))),
    ("check_paired", lambda n, o: np.array([(d := differences(n, o)).mean(), (((d - d.mean()) ** 2).sum() / (len(d) * (len(d) - 1))) ** .5])),
    ("check_amount", lambda s, o, v: torch.relu((s.mean(0) - o.mean(0)) @ F.normalize(v, dim=0))),
    ("check_rates", declined_rates),
    ("check_stands_out", lambda c, n: np.array([i for _, i in sorted(((c[:, i].mean() - c[:, i].max()).item(), i) for i in range(c.shape[1]) if c[:, i].std() > 0)][:n])),
    ("check_ask_again", affected),
    ("check_times_as_fast", lambda s: np.median([min(others) / ours for ours, *others in s.tolist()])),
    ("check_race", lambda runners, rounds, clock: np.array(raced(runners, rounds, clock))),
    ("check_answer_loss", spoken_loss),
    ("check_nearest_name", closest),
    ("check_cache_bytes", lambda s, t, b: float(in_cache(s, t, b))),
    ("check_answer_seconds", lambda q, b, t, w, c, s: sum(t * (w + c) / s for _ in range(0, q, b))),
    ("check_write_report", joined)]


@pytest.mark.parametrize("name,answer", OTHERWISE, ids=[n for n, _ in OTHERWISE])
def test_right_otherwise(name, answer, capsys):
    "A right answer passes, however it is written."
    CHECKS[name](answer)
    assert capsys.readouterr().out.startswith("Right. ")


@pytest.mark.parametrize("name", CHECKS)
def test_stub(name):
    "An untouched stub is not right yet, and says so without a traceback."
    _, function, cell = EXERCISES[name]
    told = message(CHECKS[name], run(cell["stub"], name)[function])
    assert "return" in told or "nothing changed" in told, told


@pytest.mark.parametrize("name,number", [(n, i) for n, rows in WRONG.items() for i in range(len(rows))])
def test_wrong(name, number):
    "A usual mistake is recognised."
    answer, words = WRONG[name][number]
    assert words in message(CHECKS[name], answer)


def shout(*args):
    raise KeyError("a bug of mine")


@pytest.mark.parametrize("name", CHECKS)
def test_nonsense(name):
    "None, a call instead of a function, a wrong type, a wrong shape and an exception explain themselves."
    check = CHECKS[name]
    assert "function" in message(check, None) and "without calling" in message(check, 3.)
    assert "`return`" in message(check, lambda *a: None)
    told = message(check, shout)
    assert "KeyError: 'a bug of mine'" in told and "line" in told
    assert "raised TypeError" in message(check, lambda: 1)  # too few parameters
    for nonsense, words in (("nonsense", "the str 'nonsense'"), (torch.zeros(7, 5, 2), "a tensor of shape (7, 5, 2)")):
        told = message(check, lambda *a: nonsense)
        assert words in told, told


@pytest.mark.parametrize("value,words", [(None, "None"), (True, "the bool True"), (2, "the int 2"), (.25, "the number 0.25"), (torch.tensor(1.), "no dimensions"), (torch.zeros(2, 5), "shape (2, 5)"),
                                         ([1, "a"], "a list of 2: the int 1, the str 'a'"), (list(range(9)), "…"), (Path("."), "Path")])
def test_describe(value, words):
    assert words in describe(value)


def test_same():
    "Kinds, shapes and numbers must agree; NaN agrees with NaN."
    assert same(torch.tensor([1., math.nan]), torch.tensor([1., math.nan])) and same(1, 1.) and same(np.float64(1), 1.) and same(torch.tensor(3), 3)
    assert same(np.array([1., 2.]), torch.tensor([1., 2.])) and same(torch.tensor([1, 2]), [1, 2])
    assert same((1., [2]), (1., [2])) and same({1: torch.zeros(2)}, {1: torch.zeros(2)})
    for got, want in ((1.1, 1.), (True, 1), (None, 0.), (torch.zeros(1), torch.zeros(2)), ([1], [1, 2]), ({1: 2}, {2: 2}), ("a", "b"), (torch.zeros(2), 0.), ([0., 0.], torch.zeros(2))):
        assert not same(got, want), (got, want)


def test_general_mistakes():
    "Sign, transpose, square, root, order and factor are recognised in any exercise."
    want = torch.tensor([[1., 2.], [3., 5.]])
    for got, words in ((-want, "sign"), (want.T, "transpose"), (want**2, "square root is missing"), (want**.5, "one too many"), (want * 4, "4 times"), (want[0], "shape"), (want * math.nan, "NaN"), (want + torch.eye(2), "largest difference")):
        assert words in diagnose(got, want, (), {})
    assert "another order" in diagnose([1, 2, 3], [2, 3, 1], (), {}) and "order is" in diagnose([1, 3, 2], [2, 3, 1], (), {})
    assert factor(2., 1.) is None and factor("a", want) is None


def test_call_guards_arguments():
    "Arguments are left alone, lists too."
    assert call(lambda x: x + 1, 1) == 2
    with pytest.raises(NotYet, match="argument 2 in place"):
        call(lambda n, xs: xs.sort() or xs, 0, [2, 1])


def test_a_mistake_must_explain_every_case():
    "If two mistakes give the same on one input, the one that fits all inputs is named."
    usual = {"product": lambda a, b: a * b, "power": lambda a, b: a**b}
    with pytest.raises(NotYet, match="power"):
        examine(lambda a, b: a**b, lambda a, b: a + b, [(3, 1), (2, 3)], usual, "")


@pytest.mark.parametrize("name", CHECKS)
def test_every_message_can_be_reached(name, monkeypatch):
    "Made on purpose, each usual mistake of a checker is refused, and told its own message, not that of another mistake."
    tables = []
    monkeypatch.setattr(checks, "examine", lambda *parts: tables.append(parts))
    _, function, cell = EXERCISES[name]
    CHECKS[name](run(cell["solution"], name)[function])
    for _, oracle, cases, usual, _ in tables:
        for why, mistakes in usual.items():
            for mistake in mistakes if isinstance(mistakes, tuple) else (mistakes,):
                with pytest.raises(NotYet) as told:
                    examine(mistake, oracle, cases, usual, "")
                assert str(told.value) == why


def test_not_yet_in_jupyter():
    "Jupyter shows the message, not a traceback."
    assert NotYet("Look here.")._render_traceback_() == ["Not yet. Look here."]


def test_roles():
    "The role codes that the checkers know by heart are those of notebook 01."
    assert dict(zip(ROLES, range(6))) == dict(zip(ROLES, (checks.PAD, checks.TEMPLATE, checks.TEXT, checks.IMAGE, checks.LAST, checks.ANSWER)))
    from daco_nb import mllm
    for name in ("PAD", "TEMPLATE", "TEXT", "IMAGE", "LAST", "ANSWER"):
        assert getattr(mllm, name) == getattr(checks, name)


def test_a_lasting_block_is_no_null_context():
    "A block that does nothing is told so."
    assert "nothing changed" in message(checks.check_adding, lambda layer, v: nullcontext())
