"""Write README.md from nbs/index.ipynb, without Quarto.

    python .ci/readme.py            write README.md
    python .ci/readme.py --check    exit 1 if README.md is not what index.ipynb says

Markdown cells go in as they are, code cells as fenced blocks with their text or Markdown outputs.
Cells marked `#| hide`, `#| export`, `#| default_exp` or `#| include: false` are left out; `#| echo: false` keeps the output only.
Pictures are files that Markdown cells link to: `images/x.png` beside the notebook becomes `nbs/images/x.png`.
"""
import difflib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->"
LEFT_OUT = re.compile(r"^#\|\s*(hide|export|exporti|default_exp|include:\s*false)\b", re.M)
LINK = re.compile(r"""(\]\(|\b(?:src|href|srcset)=["'])(?![a-zA-Z][a-zA-Z0-9+.-]*:|//|#|/)([^)\s"']+)""")


def joined(text):
    "A notebook stores text as one string or as a list of lines: give one string."
    return text if isinstance(text, str) else "".join(text)


def from_root(markdown, folder):
    "Rewrite links that are relative to the notebook's folder, so that they hold from the root; code is left alone."
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.M | re.S)
    return "".join(p if i % 2 else LINK.sub(rf"\1{folder}/\2", p) for i, p in enumerate(parts))


def output(out, folder):
    "One output of a code cell as Markdown; ValueError for a picture, which belongs in a file."
    if out["output_type"] == "stream":
        return f"```\n{joined(out['text']).rstrip()}\n```"
    data = out.get("data", {})
    if "text/markdown" in data:
        return from_root(joined(data["text/markdown"]).strip(), folder)
    if any(k.startswith("image/") for k in data):
        raise ValueError("index.ipynb holds a picture as output: save it in nbs/images/ and link to it from a Markdown cell")
    return f"```\n{joined(data.get('text/plain', '')).rstrip()}\n```"


def cell_markdown(cell, folder):
    "One cell as a list of Markdown blocks."
    src = joined(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [from_root(src, folder)]
    if cell["cell_type"] != "code" or LEFT_OUT.search(src):
        return []
    shown = not re.search(r"^#\|\s*echo:\s*false\b", src, re.M)
    code = "\n".join(line for line in src.split("\n") if not line.startswith("#|")).strip()
    return [f"```python\n{code}\n```"] * (shown and bool(code)) + [output(o, folder) for o in cell["outputs"]]


def readme(notebook):
    "The README that the notebook at this path makes."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    blocks = [b for c in cells for b in cell_markdown(c, notebook.parent.name) if b]
    return "\n\n".join(blocks[:1] + [NOTE] + blocks[1:]) + "\n"


def main(check):
    "Write README.md, or compare it with what it should be; the exit code."
    source, path = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
    if not source.exists():
        print("nbs/index.ipynb is missing: README.md is made from it")
        return 1
    new = readme(source)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if check and old != new:
        print("README.md differs from nbs/index.ipynb: run `python .ci/readme.py`")
        print("".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "index.ipynb")))
        return 1
    if old != new:
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
