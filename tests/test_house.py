"""The rules of the house that a machine can check: packaging, the order of notebooks, sizes of cells, safety of files."""
import ast
import io
import json
import re
import sys
import tokenize
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*_*.ipynb"))
MODULES = sorted((ROOT / "daco_nb").glob("[!_]*.py"))
NUMBER = {p.stem.split("_", 1)[1]: p.stem.split("_", 1)[0] for p in NOTEBOOKS}  # as text: "01" < "01a" < "02"
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
sys.path.insert(0, str(ROOT / ".ci"))
import readme  # noqa: E402


def cells(notebook, kind=None):
    "The cells of a notebook, of one kind or of all, with their source as one string."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if kind in (None, c["cell_type"])]


def code_lines(source):
    "The lines of a code cell without directives and blank lines."
    return [line for line in source.split("\n") if line.strip() and not line.startswith("#|")]


def imported(source):
    "The modules of the package that a cell imports; lines of IPython (`%`, `!`) don't count."
    tree = ast.parse("\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.split("\n")))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "daco_nb" else [node.module]
        yield from (n.split(".")[1] for n in names if n.startswith("daco_nb."))


def test_settings():
    "Requirements parse, every one has an upper bound or a pin, and the version is the package's."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = parser["DEFAULT"]
    for text in (cfg["requirements"] + " " + cfg["dev_requirements"]).split():
        assert Requirement(text).specifier, text
    for text in cfg["requirements"].split():
        assert any(s.operator in ("<", "==", "~=") for s in Requirement(text).specifier), text
    assert f'"{cfg["version"]}"' in (ROOT / "daco_nb/__init__.py").read_text()


UNSAID = {"gguf", "accelerate"}  # what transformers imports on its own when it reads the language model's GGUF file


def test_requirements_cover_imports():
    "Whoever installs without extras can run everything: what a module imports at its top is required, and what transformers imports for it."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    required = {Requirement(r).name.lower() for r in parser["DEFAULT"]["requirements"].split()}
    trees = [ast.parse(m.read_text(encoding="utf-8")) for m in MODULES]
    found = {a.name.split(".")[0] for t in trees for n in t.body if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module.split(".")[0] for t in trees for n in t.body if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    found -= set(sys.stdlib_module_names) | {"daco_nb"}
    names = packages_distributions()
    needed = {names.get(f, [f])[0].lower() for f in found} | UNSAID
    assert {"torch", "transformers"} < needed and needed <= required, f"not in settings.ini's requirements: {sorted(needed - required)}"


@pytest.mark.parametrize("path", sorted((ROOT / "daco_nb" / "assets").rglob("*.json*")), ids=lambda p: p.name)
def test_json_is_strict(path):
    "What ships as JSON is JSON: no NaN, which other readers refuse."
    text = path.read_text(encoding="utf-8")
    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
        json.loads(part, parse_constant=lambda word: pytest.fail(f"{path.name} holds {word}"))


def test_package_data():
    "Whatever lies in daco_nb/assets is shipped, and none of it is of a kind that must be unpickled."
    patterns = re.search(r"package_data=.*?\[(.*?)\]", (ROOT / "setup.py").read_text(), re.S)[1]
    shipped = {p for pattern in re.findall(r'"(.+?)"', patterns) for p in (ROOT / "daco_nb").glob(pattern)}
    assets = {p for p in (ROOT / "daco_nb/assets").rglob("*") if p.is_file()}
    assert assets <= shipped, f"not shipped: {sorted(assets - shipped)}"
    assert not {p for p in assets if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy")}
    assert sum(p.stat().st_size for p in assets) <= 100e6


@each_notebook
def test_imports_only_lower_numbers(notebook):
    "A notebook imports only from lower numbers (and its own module); 15_checks, which imports nothing of the package, is for exercises."
    own, exercises = notebook.stem.split("_")[0], False
    for cell in cells(notebook):
        if cell["cell_type"] == "markdown":
            for title in re.findall(r"^##? (.+)$", cell["source"], re.M):
                exercises = title == "Exercises"
            continue
        exported = re.search(r"^#\|\s*exports?i?\b", cell["source"], re.M)
        for name in imported(cell["source"]):
            assert name in NUMBER, f"no notebook makes daco_nb.{name}"
            allowed = NUMBER[name] < own or NUMBER[name] == own and not exported or name == "checks" and exercises and not exported
            assert allowed and own != "15", f"{notebook.name} imports {name}" + (" outside its exercises" if name == "checks" else "")


@each_notebook
def test_cells(notebook):
    "A title cell comes first, as nbdev wants it; exported cells have at most 25 lines."
    every, code = cells(notebook), cells(notebook, "code")
    assert re.fullmatch(r"# [^\n]+\n> [^\n]+", every[0]["source"].strip()), "first cell: `# Title` and `> subtitle`, nothing else"
    for cell in code:
        if re.search(r"^#\|\s*exports?i?\b", cell["source"], re.M):
            assert len(code_lines(cell["source"])) <= 25, cell["source"][:200]


@each_notebook
def test_outputs(notebook):
    "No stored output is an error, and none names a folder of the machine it was run on."
    for cell in cells(notebook, "code"):
        for out in cell["outputs"]:
            assert out["output_type"] != "error", cell["source"][:200]
            text = json.dumps({k: v for k, v in out.get("data", {}).items() if not k.startswith("image/")}) + "".join(out.get("text", ""))
            assert not re.search(r"(?<![\w.])/(root|home|work|tmp|Users)/", text), text[:300]


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_no_progress_bars(notebook):
    "No progress bar is stored: it needs a kernel, and says 0 % without one."
    for cell in cells(notebook, "code"):
        for out in cell["outputs"]:
            assert "application/vnd.jupyter.widget-view+json" not in out.get("data", {}), cell["source"][:200]
            assert not re.search(r"\d%\||\dit/s|s/it\b", "".join(out.get("text", ""))), cell["source"][:200]


LESSONS = [n for n in NOTEBOOKS if not n.stem.startswith("15")]  # 15_checks is a reference: it has nothing to predict
PARTS = {"what you will learn": r"\*\*You will learn\b", "the time, in a paragraph of its own": r"(?<=\n\n)\*\*Time\*\*: .*\d+ minutes",
         "what one should see": r"^## What you should see$", "exercises": r"^## Exercises$", "a recap": r"^## Recap$", "where to go next": r"^\*\*Next\*\*: "}


@pytest.mark.parametrize("notebook", LESSONS, ids=lambda p: p.stem)
def test_lesson(notebook):
    "Every lesson says what it teaches and how long it takes, asks for a prediction, says what should be seen, practises, and sums up, in this order."
    prose = "\n\n".join(c["source"] for c in cells(notebook, "markdown"))
    found = {what: re.search(pattern, prose, re.M) for what, pattern in PARTS.items()}
    assert all(found.values()), f"{notebook.name} lacks {', '.join(k for k, m in found.items() if not m)}"
    places = [m.start() for m in found.values()]
    assert places == sorted(places), f"{notebook.name}: the order is {', '.join(sorted(found, key=lambda k: found[k].start()))}"
    assert re.search(r"^\*\*Predict\b.*\?", prose, re.M), f"{notebook.name} asks for no prediction"


@each_module
def test_nothing_is_unpickled(module):
    "No pickle, no torch.load without weights_only=True, no trust_remote_code=True, no allow_pickle=True."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {n.split(".")[0] for n in names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, ast.unparse(node)
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert keywords.get("trust_remote_code", False) is False, ast.unparse(node)
            assert keywords.get("allow_pickle") is not True, ast.unparse(node)
            assert ast.unparse(node.func) != "torch.load" or keywords.get("weights_only") is True, ast.unparse(node)


def public(tree):
    "Public functions, patched methods, classes and their public methods, `__init__` and `__call__` included, as (name, node)."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and (not inner.name.startswith("_") or inner.name in ("__init__", "__call__")):
                    yield f"{node.name}.{inner.name}", inner


def gives(node):
    "Whether a function returns a value (functions inside it don't count)."
    if isinstance(node, ast.Return):
        return node.value is not None
    return any(gives(n) for n in ast.iter_child_nodes(node) if not isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)))


@each_module
def test_public_names_are_documented(module):
    "Every public name has a docstring, every parameter and field a comment on its line, and what is returned a type or a comment."
    source = module.read_text(encoding="utf-8")
    commented = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    lacks = []
    for name, node in public(ast.parse(source)):
        if not ast.get_docstring(node) and not name.endswith("__init__"):
            lacks.append(f"{name}: no docstring")
        if isinstance(node, ast.ClassDef):
            named = [(n.target.id, n.lineno) for n in node.body if isinstance(n, ast.AnnAssign)]
        else:
            a = node.args
            named = [(x.arg, x.lineno) for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if x and x.arg not in ("self", "cls")]
            last = range(max([line for _, line in named], default=node.lineno), node.body[0].lineno)
            if gives(node) and not node.returns and not commented & {line for line in last if source.split("\n")[line - 1].lstrip().startswith(")")}:
                lacks.append(f"{name}: what does it return?")
        lacks += [f"{name}: {x}" for x, line in named if line not in commented]
    assert not lacks, lacks


def test_every_module_comes_from_a_notebook():
    "daco_nb/ holds what the notebooks export, and nothing else."
    assert {m.stem for m in MODULES} == set(NUMBER)


def test_readme():
    "README.md is what index.ipynb says, and names the commands that .ci/run runs."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.readme(ROOT / "nbs/index.ipynb"), "run `python .ci/readme.py`"
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.search(r"README_TEST='(.*)'", run)[1] in text
    assert re.search(r"pip install --quiet (-e '.*?')", run)[1] in text
    for link in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text):
        assert "://" in link or (ROOT / link).exists(), f"README.md links to {link}"


SECTIONS = {"Playground": ["10_playground"], "Results": ["11_benchmarks", "limits"], "Reference": ["api", "glossary", "15_checks"]}


def test_sidebar():
    "The site's sidebar has a first page and four sections; every notebook stands in one place, the course in its order, and no other page is named."
    text = (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8")
    first, *sections = re.split(r"^ *- section: ", text, flags=re.M)
    pages = {s.split("\n")[0]: [n.removesuffix(".ipynb") for n in re.findall(r"[\w-]+\.ipynb", s)] for s in sections}
    assert re.findall(r"[\w-]+\.ipynb", first) == ["index.ipynb"]
    assert list(pages) == ["Course", *SECTIONS]
    assert {title: pages[title] for title in SECTIONS} == SECTIONS
    elsewhere = {"index"}.union(*SECTIONS.values())
    assert pages["Course"] == sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb") if p.stem not in elsewhere)
    assert (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_api_page():
    "The API page lists the functions, classes and patched methods of every module, with the first line of each docstring."
    page = ROOT / "nbs/api.ipynb"
    shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells(page, "code") for o in c["outputs"])
    rows = {title: set(re.findall(r"^\| \[<code>([^<]+)</code>\]\(\S+\) \| \S", part, re.M)) for title, part in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", shown, re.M | re.S)}
    wanted = {}
    for module in MODULES:
        tree, names = ast.parse(module.read_text(encoding="utf-8")), wanted.setdefault(module.stem, set())
        for name, node in ((n.name, n) for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            names.add(f"{ast.unparse(node.args.args[0].annotation)}.{name}" if patched else name)
    assert rows == wanted, "run nbs/api.ipynb again"
