"""Build the docs site into _docs, with Quarto or without it.

    python .ci/build_docs.py

With `quarto` on the PATH this is `nbdev_docs`. Without it, nbdev prepares the notebooks, smalldocs (pure Python) renders
them, and this script finishes the pages: file names as nbdev writes them, links inside the site relative, and KaTeX and
Mermaid brought from npm and served with the site. Without npm the pages keep their CDN links. Quarto is never installed.
Either way each page gets a link to Colab and to its source.
"""
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_links import broken

ROOT = Path(__file__).resolve().parent.parent
PROC, DOCS, DOWNLOADS = ROOT / "_proc", ROOT / "_docs", ROOT / "build" / "npm"
CDN = "https://cdn.jsdelivr.net/npm/"
PACKAGES = {  # the versions that smalldocs 0.5.4 links to: npm's integrity of each, and the files that pages need
    "katex@0.16.11": ("sha512-RQrI8rlHY92OLf3rho/Ts8i/XvjgguEjOkO1BEXcU3N8BqPpSzBNwV/G0Ukr+P/l3ivvJUE/Fa/CwbS6HesGNQ==",
                      r"LICENSE|dist/(katex\.min\.(js|css)|contrib/auto-render\.min\.js|fonts/.*\.woff2)"),
    "mermaid@11.4.1": ("sha512-Mb01JT/x6CKDWaxigwfZYuYmDZ6xtrNwNlidKZwkSrDaY9n90tdrJTV5Umk+wP1fZscGptmKFXHsXMDEVZ+Q6A==",
                       r"LICENSE|dist/(mermaid\.esm\.min\.mjs|chunks/mermaid\.esm\.min/.*\.mjs)"),
}


def no_progress(cell):
    "A processor of nbdev: take progress bars out of a page; they need a kernel, and what is stored says 0 %."
    def bar(out):
        return "application/vnd.jupyter.widget-view+json" in out.get("data", {}) or "it/s]" in "".join(out.get("text", "")) and out.get("name") == "stderr"
    if cell.cell_type == "code":
        cell.outputs = [out for out in cell.outputs if not bar(out)]


def render():
    "Notebooks -> _proc -> _docs."
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_docs, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    from smalldocs.site import build
    shutil.rmtree(PROC, ignore_errors=True)
    get_config().d["procs"] = "build_docs:no_progress"
    if shutil.which("quarto"):
        (ROOT / "README.md").touch()  # newer than index.ipynb: .ci/readme.py writes it, not Quarto
        return nbdev_docs.__wrapped__(n_workers=0)
    refresh_quarto_yml()
    proc_nbs(n_workers=0)
    for warning in build(PROC, quiet=True).warnings:
        if not ("output-file" in warning or "api.ipynb: broken link" in warning):  # both wait for the names that `nbdev_names` gives
            print("smalldocs:", warning)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)


def edit(pattern, change):
    "Apply `change(text, path)` to every file of the site that matches the glob."
    for path in sorted(DOCS.rglob(pattern)):
        if "site_libs" not in path.parts:
            path.write_text(change(path.read_text(encoding="utf-8"), path), encoding="utf-8")


def nbdev_names():
    "Name pages as nbdev and Quarto do (00_demo.html -> demo.html), and make links to our own site relative."
    from nbdev.config import get_config
    from nbdev.doclinks import _nbpath2html
    names = {p.name: _nbpath2html(p).name for p in DOCS.glob("*.html")}
    for old, new in names.items():
        (DOCS / old).rename(DOCS / new)
    old_name = re.compile("|".join(rf"(?<![\w-]){re.escape(n)}" for n in names))
    cfg = get_config()
    home = re.compile(f'href="{re.escape(cfg.doc_host + cfg.doc_baseurl)}/?')
    for pattern in ("*.html", "*.json", "*.xml"):
        edit(pattern, lambda text, path: home.sub('href="./', old_name.sub(lambda m: names[m[0]], text)))


def npm(package, integrity):
    "The tarball of a pinned npm package, checked; None if npm is absent or reaches nothing."
    path = DOWNLOADS / (package.replace("@", "-") + ".tgz")
    if not path.exists():
        if not shutil.which("npm"):
            return print("npm is not installed: pages keep their CDN links to", package)
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", package], cwd=DOWNLOADS, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            return print(f"npm pack {package} failed: pages keep their CDN links\n{done.stderr.strip()[-500:]}")
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != integrity:
        path.unlink()
        raise ValueError(f"{package}: npm gave {digest}, expected {integrity}; removed. Run again, or look at the registry in use.")
    return path


def serve_locally(package):
    "Unpack a package's files into site_libs and point the pages there."
    integrity, wanted = PACKAGES[package]
    tarball = npm(package, integrity)
    if not tarball:
        return
    folder = DOCS / "site_libs" / package.split("@")[0]
    with tarfile.open(tarball) as tar:
        for member in tar.getmembers():
            name = member.name.removeprefix("package/")
            if member.isfile() and re.fullmatch(wanted, name):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    edit("*.html", lambda text, path: text.replace(CDN + package, "./" + os.path.relpath(folder, path.parent)))


def open_links():
    "Under each title: open the notebook in Colab, or look at its source on GitHub. The notebook's first cell installs the package there."
    from nbdev.config import get_config
    from nbdev.doclinks import _nbpath2html
    cfg = get_config()
    notebooks = {_nbpath2html(p).name: p.name for p in sorted((ROOT / "nbs").glob("*.ipynb"))}

    def add(text, path):
        if path.name not in notebooks:
            return text
        place = f"github.com/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{notebooks[path.name]}"
        links = (f'<p class="open-links"><a href="https://colab.research.google.com/{place.replace("github.com", "github", 1)}">Open in Colab</a>'
                 f'<a href="https://{place}">View source</a></p>')
        return re.sub(r'<header id="title-block-header".*?</header>', lambda m: m[0] + links, text, count=1, flags=re.S)

    edit("*.html", add)


def own_fonts():
    "Take web fonts of other sites out of the theme: readers' own fonts do, and no third party is asked."
    for css in (DOCS / "site_libs" / "themes").rglob("*.css"):
        css.write_text(re.sub(r"@import url\(https?:[^)]*\);?", "", css.read_text(encoding="utf-8")), encoding="utf-8")


def main():
    "Build, finish and check the site; the exit code is 1 if a link inside it is broken."
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    render()
    if not shutil.which("quarto"):
        nbdev_names()
        own_fonts()
        for package in PACKAGES:
            serve_locally(package)
    open_links()
    bad = broken(DOCS)
    print(*bad, f"{len(list(DOCS.glob('*.html')))} pages in {DOCS.name}/, {len(bad)} broken links", sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
