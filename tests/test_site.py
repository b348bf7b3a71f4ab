"""The built docs site: every notebook has its page, with figures and maths, and it works offline.

Build it first (`python .ci/build_docs.py`). DACO_NB_SITE names another folder than _docs; DACO_NB_STRICT=1 (as in CI) turns
"not built" into a failure; DACO_NB_SCREENSHOTS names a folder for pictures of the pages that Chromium loads.
"""
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("DACO_NB_SITE") or ROOT / "_docs").resolve()
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1800 --virtual-time-budget=6000 "
         "--enable-logging=stderr").split()
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith(("_", ".")))
sys.path.insert(0, str(ROOT / ".ci"))
import check_links  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def built():
    "Every test here needs the built site."
    if not (SITE / "search.json").exists():
        reason = f"no site in {SITE}: run `python .ci/build_docs.py` first"
        (pytest.fail if os.environ.get("DACO_NB_STRICT") == "1" else pytest.skip)(reason)


def page(notebook):
    "The page of a notebook: 00_demo.ipynb -> demo.html."
    return SITE / (re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.stem.lower()) + ".html")


def cells(notebook):
    "The cells of a notebook, with their source as one string."
    return [{**c, "source": "".join(c["source"])} for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]


def pictures(notebook):
    "How many pictures the visible cells of a notebook hold as outputs."
    shown = [c for c in cells(notebook) if not re.search(r"^#\|\s*(hide|export\b|exporti|include:\s*false|output:\s*false)", c["source"], re.M)]
    return sum(any(k.startswith("image/") for k in o.get("data", {})) for c in shown for o in c.get("outputs", []))


def formulas(notebook):
    "Whether the prose of a notebook holds display maths."
    return any("$$" in c["source"] for c in cells(notebook) if c["cell_type"] == "markdown")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_page(notebook):
    "A page exists, has the notebook's title, its figures and its maths, and no traceback."
    html = page(notebook).read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", cells(notebook)[0]["source"], re.M)[1]
    assert title.replace("`", "").split()[0] in re.sub(r"<[^>]+>", "", html.split("</title>")[0])
    assert html.count("<img") >= pictures(notebook)
    assert not formulas(notebook) or 'class="math' in html
    assert "cell-output-error" not in html


def test_course_has_figures_and_maths():
    "The site as a whole is not text only."
    html = [p.read_text(encoding="utf-8") for p in SITE.glob("*.html")]
    assert any("<img" in h for h in html) and any('class="math' in h for h in html)


def test_links():
    "Every link inside the site leads somewhere."
    assert check_links.broken(SITE) == []


def test_no_cdn():
    "Maths and diagrams are served with the site."
    if "smalldocs" not in (SITE / "index.html").read_text(encoding="utf-8")[:400]:
        pytest.skip("built by Quarto")
    if not shutil.which("npm"):
        pytest.skip("npm is not installed: pages keep their CDN links to KaTeX and Mermaid")
    left = {u for p in SITE.rglob("*.html") for u in re.findall(r"https://cdn\.[^\s\"'<]*", p.read_text(encoding="utf-8"))}
    assert left == set()
    assert (SITE / "site_libs/katex/dist/katex.min.js").exists() and (SITE / "site_libs/mermaid/dist/mermaid.esm.min.mjs").exists()


class Handler(http.server.SimpleHTTPRequestHandler):
    "Serve quietly, and remember what was asked for in vain."

    missed = []

    def log_message(self, *args):
        pass

    def send_error(self, code, *args, **kwargs):
        if self.path != "/favicon.ico":
            self.missed.append((code, self.path))
        super().send_error(code, *args, **kwargs)


@pytest.fixture(scope="module")
def address():
    "The site, served on a free local port."
    handler = functools.partial(Handler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def chromium(url, picture, folder, seconds=240):
    "Load a page, take its picture; the page as the browser left it, and the browser's log. Output goes to files: no pipe can hang."
    out, err = folder / "dom", folder / "log"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", "--dump-dom", url]
    with open(out, "wb") as o, open(err, "wb") as e:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=o, stderr=e, start_new_session=True)
        try:
            process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its helpers, too
            process.wait()
    return out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8", errors="replace")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("name", ["index", "steering"])
def test_in_browser(name, address, tmp_path):
    "A page loads in a browser without console errors; its pictures load, its maths and diagrams are drawn."
    source = (SITE / f"{name}.html").read_text(encoding="utf-8")
    if "https://cdn." in source:
        pytest.skip("the page takes KaTeX or Mermaid from a CDN (built by Quarto, or without npm)")
    picture = Path(os.environ.get("DACO_NB_SCREENSHOTS") or tmp_path) / f"site_{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    dom, log = chromium(f"{address}/{name}.html", picture, tmp_path)
    assert picture.stat().st_size > 20_000
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert Handler.missed == [] and "</html>" in dom
    assert ('class="math' in source) <= ('class="katex' in dom)
    assert ('class="mermaid' in source) <= ('data-processed="true"><svg' in dom)
    assert "katex-error" not in dom
