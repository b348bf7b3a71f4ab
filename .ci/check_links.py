"""Find broken links inside a built site: every relative href and src, and every #fragment, must lead somewhere.

    python .ci/check_links.py [_docs]

Links to other sites are not fetched.
"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "The links and the anchors of one page."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


def target(path, link):
    "The file a link leads to, and its fragment; None for a link to another site. `/x` is wrong: the site lives in a folder."
    url = urlsplit(link)
    if url.scheme or url.netloc:
        return None
    file = path.parent / unquote(url.path) if url.path else path
    return (file / "index.html" if file.is_dir() else file).resolve(), unquote(url.fragment)


def broken(site):
    "A line for each broken link of the site in folder `site`."
    site = Path(site).resolve()
    pages = {p: Page(p) for p in sorted(site.rglob("*.html"))}
    bad = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            if not (found := target(path, link)):
                continue
            file, fragment = found
            if not file.is_file():
                bad.append(f"{path.relative_to(site)}: {link}: no such file")
            elif file in pages and fragment not in pages[file].anchors:
                bad.append(f"{path.relative_to(site)}: {link}: no such place in the page")
    return bad


if __name__ == "__main__":
    lines = broken(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    print(*lines, f"{len(lines)} broken links", sep="\n")
    sys.exit(bool(lines))
