"""Real models: the budget is arithmetic, nothing stays behind when methods move, and the walk takes any family."""
import functools
import io
import json
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoConfig

from daco_nb import real_models as rm
from daco_nb.demo import DemoEncoder, demo_folder
from daco_nb.evaluation import OfflineJudge, demobench, demobench_folder, mm_safetybench, sample
from daco_nb.mllm import IMAGE, MLLM
from daco_nb.steering import DACO, load_kit, make_methods
from daco_nb.stimuli import DemoCorpus

ROOT = Path(__file__).resolve().parent.parent
SEVEN = rm.QWEN["Qwen/Qwen2.5-VL-7B-Instruct"]


def test_published_sizes():
    "The parameter counts that the hub names for the two models."
    assert [rm.parameters(c)["all"] for c in rm.QWEN.values()] == [3_754_622_976, 8_292_166_656]


@pytest.mark.parametrize("family", ["llava", "qwen", "internvl"])
def test_parameters_of_any_family(family):
    "Counted on meta, a demo model has as many parameters as the real thing."
    config = AutoConfig.from_pretrained(demo_folder(family))
    model = MLLM.demo(family).model
    n = rm.parameters(config)
    assert n["all"] == sum(p.numel() for p in model.parameters())
    assert n["language"] == sum(p.numel() for p in model.model.language_model.parameters()) and 0 < n["vision"] < n["language"]


def test_budget_scales():
    "Twice the pairs take twice the disk and time of reading; a faster card only time; fewer concepts a smaller autoencoder."
    a, b, c, d = (dict((s.step, s) for s in rm.budget(SEVEN, **kw)) for kw in ({}, dict(pairs=800_000), dict(gpu=rm.GPUS["H100"]), dict(concepts=7500)))
    assert b["extract"].disk == 2 * a["extract"].disk and b["extract"].seconds == pytest.approx(2 * a["extract"].seconds)
    assert c["extract"].gpu == a["extract"].gpu and c["extract"].seconds == pytest.approx(a["extract"].seconds * 312 / 989)
    assert d["autoencoder"].disk == pytest.approx(a["autoencoder"].disk / 2, rel=1e-3) and d["extract"] == a["extract"]
    assert all(s.gpu >= 0 and s.seconds >= 0 and s.how for s in a.values())
    deep = rm.budget(SEVEN, layer=27)[1]
    assert deep.seconds > 1.5 * a["extract"].seconds and deep.disk == a["extract"].disk


def test_numbers_are_in_the_words():
    "The arithmetic that a row tells is the row's."
    load, extract, dictionary, *_ = rm.budget(SEVEN)
    assert load.how.startswith("8,292,166,656 parameters x 2 bytes") and load.gpu == 2 * 8_292_166_656
    assert extract.how.endswith("400,000 x 7 x 3,584 x 2 bytes") and extract.disk == 400_000 * 7 * 3584 * 2
    assert dictionary.how.startswith("15,000 concepts x 3,584 x 2 bytes") and dictionary.disk == 15_000 * 3584 * 2


def test_nothing_stays_behind():
    "Methods move as a whole, with what they have cached, and the originals stay where they were."
    methods = make_methods(load_kit())
    methods["DACO"].desirable  # cached
    moved = rm.to_device(methods, "meta")
    daco = moved["DACO"]
    tensors = [daco.label, daco.desirable, daco.sae.W_dec, daco.sae.W_enc, daco.D.mean, daco.D.std, daco.gate.probe.weight, daco.behaviour.shown,
               moved["ActAdd"].direction, moved["MOP"].undesirable, moved["MOP"].D.vectors, moved["DACO (paper)"].label]
    assert {t.device.type for t in tensors} == {"meta"}
    assert methods["DACO"].sae.W_dec.device.type == methods["DACO"].label.device.type == "cpu" and isinstance(daco, DACO)
    assert moved["none"] is None and moved["Prompting"].system == methods["Prompting"].system


def test_limit_pictures():
    mllm = MLLM.demo("qwen")
    big = DemoCorpus(1)[0][0].resize((640, 480))
    tokens = lambda: int((mllm.prepare(["What is this?"], [big])["roles"] == IMAGE).sum())
    counts = []
    for most in (4, 16, 64):
        rm.limit_pictures(mllm, most)
        counts.append(tokens())
        assert counts[-1] <= most
    assert counts[0] < counts[2]
    with pytest.raises(ValueError, match="nothing to limit"):
        rm.limit_pictures(MLLM.demo("llava"), 9)


def test_stimuli_and_dictionary_of_another_family(tmp_path):
    "The first part of the walk on InternVL, with names and sizes of its own."
    mllm, seconds = MLLM.demo("internvl"), {}
    D, Z = rm.read_dictionary(mllm, DemoCorpus(24), ["cat", "dog"], DemoEncoder(), tmp_path, rm.SMALL._replace(n_pos=2, n_neg=2, chats=3, prompts=2), 5, seconds)
    assert D.names == ["cat", "dog", "refusal"] and D.layer == 5 and D.behaviours["declining"].layer == 7
    assert next(iter(Z)).shape[1] == mllm.d_model and list(seconds) == ["stimuli", "extract", "dictionary"]


TINY = rm.SMALL._replace(n_pos=2, n_neg=2, chats=4, phrases=16, prompts=2, k=3, steps=4, rows=32, new_tokens=3)


def tiny_tar(folder, pairs):
    "A webdataset tar of a few pairs of the demo's corpus."
    corpus = DemoCorpus(pairs)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(pairs):
            image, caption = corpus[i]
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            for end, data in (("png", buffer.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:05}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_cuda_cells_run(tmp_path, monkeypatch):
    "The cells for a GPU, one after the other, on the CPU: the demo model for the 3B one, a tar of 24 pairs, three concepts, DemoBench's folder, few questions and steps."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cc3m").mkdir()
    tiny_tar(tmp_path / "cc3m", 24)
    (tmp_path / "MM-SafetyBench").symlink_to(demobench_folder() / "test" / "mm")
    cells = json.loads((ROOT / "nbs/13_real_models.ipynb").read_text(encoding="utf-8"))["cells"]
    cuda = [c for c in ("".join(c["source"]) for c in cells if c["cell_type"] == "code") if c.startswith("#| cuda")]
    here = dict(torch=torch, pd=pd, Path=Path, MLLM=MLLM, OfflineJudge=OfflineJudge, demobench=demobench, limit_pictures=rm.limit_pictures,
                walk=functools.partial(rm.walk, plan=TINY), sample=lambda items, n: sample(items, 2), load_concepts=lambda: ["cat", "dog", "pistol"])
    imports, *rest = cuda
    exec(imports, here)
    here |= dict(DualEncoder=lambda name, device: DemoEncoder(), mm_safetybench=lambda folder: mm_safetybench(folder)[:2])
    for cell in rest:
        exec(cell.replace("'Qwen/Qwen2.5-VL-3B-Instruct'", repr(str(demo_folder("qwen")))).replace("'cuda'", "'cpu'"), here)
    assert [r["method"] for r in here["out"].rows] == ["none", "DACO (paper)", "DACO"] and all(r["n"] for r in here["out"].rows)
    assert here["real"].model.dtype == torch.bfloat16 and (tmp_path / "walk-3b" / "kit").exists()


def test_cuda_cells_come_last_and_call_the_same_walk():
    "What runs on a GPU is the function that the rehearsal runs."
    cells = json.loads((ROOT / "nbs/13_real_models.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    cuda = [i for i, s in enumerate(code) if s.startswith("#| cuda")]
    exercises = next(i for i, c in enumerate(cells) if "".join(c["source"]).startswith("## Exercises"))
    before = sum(c["cell_type"] == "code" for c in cells[:exercises])
    assert cuda == list(range(before - len(cuda), before))  # only the exercises come later
    assert any("walk(real, TarCorpus" in code[i] for i in cuda) and any("walk(mllm, DemoCorpus" in s for s in code)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_walk_on_a_gpu(tmp_path):
    "The rehearsal of the notebook, with the model in bfloat16 on the GPU."
    few = [sample(demobench(s, ("attack", "twin")), 2) for s in ("validation", "test")]
    mllm = MLLM.from_pretrained(str(demo_folder("qwen")), torch.bfloat16, "cuda")
    done = rm.walk(mllm, DemoCorpus(96), ["cat", "dog", "bomb", "pistol"], DemoEncoder(), *few, OfflineJudge(), tmp_path, rm.SMALL)
    assert [r["method"] for r in done.rows] == ["none", "DACO (paper)", "DACO"] and done.kit.sae.W_dec.device.type == "cpu"
