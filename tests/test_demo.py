"The demo world: assets that are damaged or mixed up, fonts that are missing, words in pictures."
import numpy as np
import pytest
import torch

from daco_nb import demo
from daco_nb.mllm import MLLM


def test_unknown_family():
    with pytest.raises(ValueError, match="Unknown family 'gpt'.*llava"):
        MLLM.demo("gpt")


def test_parts_of_another_family(tmp_path):
    path = tmp_path / "x.safetensors"
    demo.save_part({"a": torch.ones(2)}, path, "qwen")
    assert demo.load_part(path, "qwen")["a"].dtype == torch.float16
    with pytest.raises(ValueError, match="x.safetensors.*'qwen'.*'llava'.*reinstall"):
        demo.load_part(path, "llava")


def test_damaged_parts(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="x.safetensors is missing or damaged.*reinstall"):
        demo.load_part(path, "llava")
    demo.save_part({"a": torch.ones(200)}, path, "llava")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="x.safetensors is missing or damaged.*reinstall"):
        demo.load_part(path, "llava")


def test_missing_font():
    with pytest.raises(FileNotFoundError, match="NoSuchFont.ttf is missing.*matplotlib"):
        demo.letters("NoSuchFont", 12)


def test_letters_without_libfribidi(monkeypatch):
    "Where Pillow can't space letters as in the pictures of training, that is said."
    monkeypatch.setattr(demo.features, "check", lambda name: False)
    with pytest.warns(UserWarning, match="lacks libfribidi.*install it"):
        demo.letters.__wrapped__("DejaVuSans", 12)


@pytest.mark.skipif(not demo.features.check("raqm"), reason="the system lacks libfribidi: letters stand wider")
@pytest.mark.parametrize("text", demo.phrases()[::97])
def test_words_fit_and_are_owned(text):
    s = demo.scene(1, 5, (), text=text)
    assert s.text == text and text in s.caption and not s.drawings
    assert set(np.unique(s.owner)) == {*range(len(text.split()) + 1)} and (s.owner > 0).mean() > .05
    both = demo.scene(1, 5, (demo.by_name()["cat"],), text=text)
    rows = lambda k: np.where((both.owner == k).any(1))[0]
    assert rows(2).min() > rows(1).min() and both.owner.max() == 1 + len(text.split())


def test_long_text_still_fits():
    im, owner = demo.compose([], "white", np.random.default_rng(0), text="a very long phrase with many more words than anybody would write there")
    assert im.size == (demo.SIZE, demo.SIZE) and owner.max() == 13


def test_line_breaks():
    assert demo.line_breaks("one two three four".split(), 2) == ["one two", "three four"]
    assert demo.line_breaks(["word"], 1) == ["word"]


def test_tables():
    names = set(demo.by_name())
    for t in demo.topics():
        assert t.split in ("train", "validation", "test") and t.type in ("product", "activity", "text", "advice")
        assert set(t.drawings) | set(t.twin_drawings) <= names
    assert len(demo.drawings()) >= 1000 and len(set(demo.phrases())) >= 600
    assert {*demo.phrases("train"), *demo.phrases("validation"), *demo.phrases("test")} == set(demo.phrases())
