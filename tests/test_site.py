"""The built docs site: every notebook has its page, with figures and maths, and it works offline, in a browser, on a phone.

Build it first (`python .ci/build_docs.py`). DACO_NB_SITE names another folder than _docs; DACO_NB_STRICT=1 (as in CI) turns
"not built" into a failure; DACO_NB_ARTEFACTS names a folder for screenshots (default: build/artefacts, ignored by git).
The system's Chromium is driven by playwright, which brings no browser of its own here; without either those tests are skipped.
"""
import ast
import functools
import http.server
import json
import os
import re
import shutil
import sys
import threading
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("DACO_NB_SITE") or ROOT / "_docs").resolve()
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
ARTEFACTS = Path(os.environ.get("DACO_NB_ARTEFACTS") or ROOT / "build" / "artefacts").resolve()
DRAWN = """() => document.readyState == 'complete' && !document.querySelector('.mermaid:not(:has(svg g.node))')
           && (!document.querySelector('.math') || !!document.querySelector('.katex'))"""
CONTRAST = """() => {  // texts whose contrast with the colour behind them is below 3:1, as [ratio, text]
    const rgb = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126*r + .7152*g + .0722*b };
    const over = (a, b) => { const t = a.length > 3 ? a[3] : 1; return [0, 1, 2].map(i => t*a[i] + (1 - t)*b[i]) };
    const behind = e => e ? over(rgb(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
    const poor = [];
    for (const e of document.querySelectorAll('main *, nav *, footer *')) {
        const text = [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent.trim()).join('');
        if (!text || !e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) || e.closest('svg, .katex-mathml, .visually-hidden')) continue;
        const back = behind(e), [a, b] = [light(over(rgb(getComputedStyle(e).color), back)), light(back)].sort((x, y) => y - x), ratio = (a + .05)/(b + .05);
        if (ratio < 3) poor.push([Math.round(ratio*100)/100, text.slice(0, 40), e.tagName + '.' + e.className]);
    }
    return poor }"""
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
    "A page exists, has the notebook's title, its figures with a text for who can't see them, its maths, and no traceback."
    html = page(notebook).read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", cells(notebook)[0]["source"], re.M)[1]
    assert title.replace("`", "").split()[0] in re.sub(r"<[^>]+>", "", html.split("</title>")[0])
    assert html.count("<img") >= pictures(notebook)
    assert not re.findall(r'<img(?![^>]*\balt="[^"]+")', html), "a figure without `#| fig-alt`, or with a colon in it, which YAML does not allow"
    assert not formulas(notebook) or 'class="math' in html
    assert "cell-output-error" not in html
    assert "?it/s]" not in html and "widget-view+json" not in html  # progress bars


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


@pytest.fixture(scope="module")
def chromium():
    "The system's Chromium, headless, started once."
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `pip install -e '.[dev]'`")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    "A function that opens a page of the site and waits until its maths and diagrams are drawn; errors of the console are kept."
    contexts, Handler.missed[:] = [], []

    def visit(name, width=1280, height=900, scheme="light"):
        source = (SITE / f"{name}.html").read_text(encoding="utf-8")
        if "https://cdn." in source:
            pytest.skip("the page takes KaTeX or Mermaid from a CDN (built by Quarto, or without npm)")
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and "favicon.ico" not in str(m.location) else None)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.goto(f"{address}/{name}.html")
        page.wait_for_function(DRAWN, timeout=60_000)
        return page

    yield visit
    for c in contexts:
        c.close()


def keep(page, name, whole=False):
    "Keep a screenshot as an artefact."
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    data = page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=whole)
    assert len(data) > 20_000


PAGES = [page(n).stem for n in NOTEBOOKS]


@pytest.mark.parametrize("name", PAGES)
def test_in_browser(name, visit):
    "A page loads without console errors, with its sidebar, its links and its search; its pictures load, its maths and diagrams are drawn."
    seen = visit(name)
    source = (SITE / f"{name}.html").read_text(encoding="utf-8")
    assert seen.errors == [] and Handler.missed == []
    seen.evaluate("[...document.images].forEach(i => i.loading = 'eager')")
    seen.wait_for_function("[...document.images].every(i => i.complete)")
    assert seen.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
    assert ('class="math' in source) <= (seen.locator(".katex").count() > 0) and seen.locator(".katex-error").count() == 0
    assert seen.locator("#quarto-sidebar a:visible").count() >= 15 and seen.locator("#quarto-search").count() > 0


@pytest.mark.parametrize("name", PAGES)
def test_on_a_phone(name, visit):
    "On a screen of 390 pixels nothing is wider than the screen; tables and code scroll by themselves."
    seen = visit(name, 390, 844)
    wide = seen.evaluate("document.documentElement.scrollWidth")
    culprits = seen.evaluate("""[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391
        && !e.closest('pre, table, .katex, .cell-output, .sourceCode, .table-responsive')).slice(0, 3).map(e => e.outerHTML.slice(0, 120))""")
    assert wide <= 390 and culprits == []


@pytest.mark.parametrize("name", ["index", "steering", "playground", "limits", "glossary"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(name, scheme, visit):
    "Text can be read in either mode: at least 3:1 against what lies behind it."
    seen = visit(name, scheme=scheme)
    dark = seen.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) < 200")
    assert dark == (scheme == "dark")
    assert seen.evaluate(CONTRAST) == []


def test_toggle_dark_mode(visit):
    "The button in the bar changes the mode, and the choice lasts on the next page."
    dark = "document.documentElement.classList.contains('quarto-dark')"
    seen = visit("index")
    assert not seen.evaluate(dark)
    seen.locator(".quarto-color-scheme-toggle:visible").first.click()
    seen.wait_for_function(dark)
    seen.goto(seen.url.replace("index", "glossary"))
    seen.wait_for_function(dark)


def test_diagram(visit):
    "Mermaid, served with the site, draws the glossary's diagram."
    seen = visit("glossary")
    seen.locator(".mermaid svg", has_text="concept dictionary").wait_for()  # the labels come after the frame
    assert seen.locator(".mermaid svg").count() == 1


def test_search(visit):
    "The search finds a term of the course."
    seen = visit("index")
    box = seen.locator("#quarto-search input:visible").first
    box.click()
    box.type("oblique projection")
    hit = seen.locator("a[href*='sparse_coding']:visible").filter(has_text=re.compile("projection|Sparse", re.I))
    hit.first.wait_for(timeout=10_000)


def test_before_and_after_within_one_screen(visit):
    "Whoever lands on the site sees an attack before and after without scrolling."
    seen = visit("index")
    box = seen.locator("main img").first.bounding_box()
    assert box["y"] + box["height"] <= 900 and box["width"] > 400


@pytest.mark.parametrize("name, width, height, scheme", [("index", 1280, 900, "light"), ("playground", 1280, 900, "dark"), ("steering", 390, 844, "light")])
def test_screenshots(name, width, height, scheme, visit):
    "Three pages are kept as pictures for people to look at."
    seen = visit(name, width, height, scheme)
    seen.wait_for_function("[...document.images].filter(i => i.loading != 'lazy').every(i => i.complete)")
    keep(seen, f"{name}-{width}-{scheme}")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_source_and_colab(notebook):
    "Every page links to its source and opens in Colab; there the first cell installs the package before anything imports it."
    html = page(notebook).read_text(encoding="utf-8")
    assert f'href="https://colab.research.google.com/github/daco-nb/daco_nb/blob/main/nbs/{notebook.name}"' in html
    assert f'href="https://github.com/daco-nb/daco_nb/blob/main/nbs/{notebook.name}"' in html
    code = [c["source"] for c in cells(notebook) if c["cell_type"] == "code"]
    if any("daco_nb" in c for c in code):
        assert "google.colab" in code[0] and "pip install" in code[0] and code[0].startswith("#| hide")
    assert "google.colab" not in re.sub(r"<[^>]+>", "", html)


def exported(notebook):
    "Public functions, methods and classes of the exported cells that the site documents, with the source of each."
    for c in cells(notebook):
        if c["cell_type"] != "code" or not re.search(r"^#\|\s*exports?\b", c["source"], re.M) or re.search(r"^#\|\s*(hide|eval:\s*false)\b", c["source"], re.M):
            continue
        for node in ast.parse(c["source"]).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield node, ast.get_source_segment(c["source"], node)


def plain(text):
    "Text without spaces, tags and typographic quotes, so that a docstring can be found in a page."
    return re.sub(r"[^\w]", "", unescape(re.sub(r"<[^>]+>", "", text)))


@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if n.name[0].isdigit()], ids=lambda p: p.stem)
def test_reference(notebook):
    "The page documents every exported name: a heading, its docstring, and the comment on each parameter."
    html = page(notebook).read_text(encoding="utf-8")
    anchors, text = {a.lower() for a in check_links.Page(page(notebook)).anchors}, plain(html)
    for node, source in exported(notebook):
        assert any(a.split(".")[-1] == node.name.lower() for a in anchors), f"{node.name} has no heading on the page"
        assert plain((ast.get_docstring(node) or "").split("\n")[0]) in text, f"{node.name}: its docstring is missing"
        if isinstance(node, ast.FunctionDef):
            head = source[:source.index('"')] if '"' in source else source
            for comment in re.findall(r"#\s*(.+)$", head, re.M):
                assert plain(comment) in text, f"{node.name}: the comment {comment!r} is missing"
