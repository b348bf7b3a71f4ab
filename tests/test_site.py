"""The built docs site: every notebook has its page, with figures and maths, and it works offline.

Build it first (`python .ci/build_docs.py`). DACO_NB_SITE names another folder than _docs; DACO_NB_STRICT=1 (as in CI) turns
"not built" into a failure; DACO_NB_SCREENSHOTS names a folder for pictures of the pages that Chromium loads.
"""
import base64
import contextlib
import functools
import http.server
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("DACO_NB_SITE") or ROOT / "_docs").resolve()
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1800").split()
DRAWN = """document.readyState == 'complete' && !document.querySelector('.mermaid:not(:has(svg))')
           && (!document.querySelector('.math') || !!document.querySelector('.katex'))"""
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
    "Maths, diagrams and fonts are served with the site."
    if "smalldocs" not in (SITE / "index.html").read_text(encoding="utf-8")[:400]:
        pytest.skip("built by Quarto")
    if not shutil.which("npm"):
        pytest.skip("npm is not installed: pages keep their CDN links to KaTeX and Mermaid")
    left = {u for p in SITE.rglob("*.html") for u in re.findall(r"https://cdn\.[^\s\"'<]*", p.read_text(encoding="utf-8"))}
    left |= {u for p in SITE.rglob("*.css") for u in re.findall(r"(?:@import |url\()[\"']?(?:url\()?https?:[^)\s]*", p.read_text(encoding="utf-8"))}
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


class Browser:
    "A headless Chromium, driven over a pair of pipes with its DevTools protocol: messages are JSON, each ended by a NUL."

    def __init__(self, folder, seconds=400):
        self.deadline, self.sent, self.buffer, self.events = time.monotonic() + seconds, 0, b"", []
        (reads, self.to), (self.frm, writes) = os.pipe(), os.pipe()
        command = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "chromium", *command]
        self.process = subprocess.Popen(shell, pass_fds=(reads, writes), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(reads), os.close(writes)
        self.session = None

    def message(self):
        "The next message; TimeoutError when the time is up, EOFError when the browser is gone."
        while b"\0" not in self.buffer:
            if not select.select([self.frm], [], [], max(0, self.deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium did not answer in time")
            if not (data := os.read(self.frm, 1 << 20)):
                raise EOFError("Chromium has ended")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        "Call a method of the protocol and wait for its result; events that come meanwhile are kept."
        self.sent += 1
        target = {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps({"id": self.sent, "method": method, "params": params, **target}).encode() + b"\0")
        while (reply := self.message()).get("id") != self.sent:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def evaluate(self, expression):
        "The value of a JavaScript expression in the page."
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, url):
        "Load a page and wait until its maths and diagrams are drawn."
        self.session, self.events = None, []
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        before, now = None, 0
        while not (self.evaluate("location.href") == url and self.evaluate(DRAWN) and before == now):
            time.sleep(0.4)
            before, now = now, self.evaluate("document.body.innerHTML.length")  # a diagram is drawn piece by piece

    def errors(self):
        "What the console holds against the page: exceptions, console.error, failed loads."
        seen = [e for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        seen += [e for e in self.events if e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]
        seen += [e for e in self.events if e["method"] == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "assert")]
        return [e for e in seen if "favicon.ico" not in json.dumps(e)]

    def close(self):
        "End the browser and its helpers."
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.to), os.close(self.frm)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "One browser for all the tests here."
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("name", ["index", "steering"])
def test_in_browser(name, address, browser, tmp_path):
    "A page loads in a browser without console errors; its pictures load, its maths and diagrams are drawn."
    source = (SITE / f"{name}.html").read_text(encoding="utf-8")
    if "https://cdn." in source:
        pytest.skip("the page takes KaTeX or Mermaid from a CDN (built by Quarto, or without npm)")
    browser.open(f"{address}/{name}.html")
    picture = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    path = Path(os.environ.get("DACO_NB_SCREENSHOTS") or tmp_path) / f"site_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    assert browser.errors() == [] and Handler.missed == []
    assert browser.evaluate("[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).length") == 0
    assert ('class="math' in source) <= (browser.evaluate("document.querySelectorAll('.katex').length") > 0)
    assert browser.evaluate("document.querySelectorAll('.katex-error').length") == 0
    assert len(picture) > 20_000
