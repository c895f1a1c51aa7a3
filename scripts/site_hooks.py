"""What `make docs` makes out of the repository: called by mkdocs at every build, so nothing goes stale.

- the navigation, from the pages that are there;
- for each algorithm a page with its code, section by section, beside what is said of it: docstrings,
  and for the losses the page's equations (BESIDE);
- a page for every other source file or folder that a page links to;
- the bibliography, from docs/bibliography.bib, and under each algorithm the papers that it names;
- equations typeset: indented plain text (scripts/typeset.py) and ```math blocks of TeX.

Pages stay plain Markdown, read on a code host as well as here.
"""

import ast
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from html import escape
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))
import typeset  # noqa: E402  (mkdocs loads this file by its path)

FONT = "STIXTwoMath-Regular.ttf"  # SIL Open Font License; ziamath carries it
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
# Which equation or paragraph of docs/algos/<algorithm>.md stands beside which function. An equation
# is named by its left side, a paragraph by its bold beginning. A name that is gone fails the build.
BESIDE = {
    "bc_chunk": {"clone_loss": ["--loss act", "--loss flow"]},
    "distill_go1": {"distill_loss": ["L"]},
    "drqv2": {
        "critic_loss": ["R", "a′", "y", "L_Q"],
        "actor_loss": ["**Actor."],
        "noise_std": ["**Exploration."],
        "random_shift": ["**Random shift."],
    },
    "ppo_mjx_go1": {
        "log_prob": ["log π(a | s)"],
        "gae": ["δ_t", "A_t"],
        "ppo_loss": ["L", "H"],
        "merge_stats": ["n"],
    },
    "resfit": {"choose": ["a'"], "critic_loss": ["y", "L"], "actor_loss": ["L_π"]},
    "sac_pixels": {
        "critic_loss": ["y", "L_Q", "L_α"],
        "actor_loss": ["L_π"],
        "autoencoder_loss": ["L_AE"],
    },
    "sapo_rewarped": {
        "soft_rewards": ["ĥ", "r̃"],
        "objective": ["J"],
        "td_lambda": ["G_t"],
        "update_alpha": ["**Temperature."],
    },
    "squint_sac": {
        "squint": ["**Squint."],
        "critic_loss": ["r̃", "𝒯zⱼ", "mᵢ", "L_Q", "**Temperature."],
        "actor_loss": ["**Actor."],
        "update_block": ["**Schedule."],
    },
}


# --- Navigation ---------------------------------------------------------------------------------
def title_of(path: Path) -> str:
    return re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)[1].replace("`", "")


def pages(folder: str) -> list[dict]:
    paths = sorted((DOCS / folder).glob("*.md"), key=lambda path: title_of(path).lower())
    return [{title_of(path): f"{folder}/{path.name}" for path in [path]} for path in paths]


def on_config(config):
    taken = {"index.md", "install.md", "hardware.md", "sim2sim_go1.md", "visual_rl.md"}
    rest = [path for path in sorted(DOCS.glob("*.md")) if path.name not in taken]
    config.nav = [
        {"Home": ["index.md", {"Installations": "install.md"}, {"README": "readme.md"}]},
        {"Algorithms": [*pages("algos"), {"Visual control, a survey": "visual_rl.md"}]},
        {"Code": [{f"{name}.py": f"code/{name}.md"} for name in ALGOS]},
        {"Environments": pages("envs")},
        {"Hardware": ["hardware.md", "sim2sim_go1.md"]},
        {"Results": [{title_of(path): path.name} for path in rest]},
        {"Papers": "bibliography.md"},
    ]
    fence = {"name": "math", "class": "math", "format": tex}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files, config):
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    for name in ALGOS:
        try:
            page = code_page(name)
        except ValueError as error:
            raise PluginError(str(error)) from error
        files.append(File.generated(config, f"code/{name}.md", content=page))
        copied = File.generated(config, f"code/{name}.py", abs_src_path=ROOT / f"algos/{name}.py")
        files.append(copied)
    files.append(File.generated(config, "bibliography.md", content=bibliography_page()))
    readme = relink((ROOT / "README.md").read_text(), ROOT / "README.md", PurePosixPath("."))
    files.append(File.generated(config, "readme.md", content=readme))
    font = package_files("ziamath") / "fonts" / FONT
    files.append(File.generated(config, f"assets/{FONT}", content=font.read_bytes()))
    for target in sorted(linked_sources()):
        page = File.generated(config, source_page_name(target), content=source_page(target))
        files.append(page)
    return files


# --- Links --------------------------------------------------------------------------------------
LINK = re.compile(r"(?<=\]\()([^)\s#]*)(#[^)\s]*)?(?=\))")


def outside(target: str, page: Path) -> Path | None:
    """The file or folder of the repository, not of docs/, that a relative link means."""
    if not target or re.match(r"[a-z]+:|#|/", target):
        return None
    path = Path(os.path.normpath(page.parent / target))
    if not path.exists() or not path.is_relative_to(ROOT):
        return None
    return path


def linked_sources() -> set[Path]:
    """Files and folders outside docs/ that a page links to, but algorithms and the README."""
    found = set()
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for target, _ in LINK.findall(page.read_text()):
            path = outside(target, page)
            if path and not path.is_relative_to(DOCS) and place_of(path).startswith("source/"):
                found.add(path)
    return found


def place_of(path: Path) -> str:
    """Where on the site a path of the repository is shown."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if path.parent == ROOT / "algos" and path.suffix == ".py":
        return f"code/{path.stem}.md"
    named = {"README.md": "readme.md", "algos": f"code/{ALGOS[0]}.md"}
    return named.get(name) or source_page_name(path)


def source_page_name(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def relink(markdown: str, page: Path, here: PurePosixPath | None = None) -> str:
    """Links out of docs/ lead to the pages made of what they mean. here: the page's folder on the site"""
    here = here or PurePosixPath(page.relative_to(DOCS).as_posix()).parent

    def changed(match: re.Match) -> str:
        path = outside(match[1], page)
        if path is None or (path.is_dir() and path.is_relative_to(DOCS)):
            return match[0]
        place = os.path.relpath(place_of(path), here).replace(os.sep, "/")
        return place + ((match[2] or "") if path.suffix == ".md" else "")

    return LINK.sub(changed, markdown)


def source_page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    head = f"---\ntitle: {name}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in (".py", ".xml", ".md", ".toml"))
        documented = path / "__init__.py"
        text = documented.read_text() if documented.exists() else ""
        listed = "\n".join(f"- `{p.name}`" for p in inside)
        return head + listed + "\n\n" + listing(text, "a.py")
    return head + listing(path.read_text(), path.name)


def listing(text: str, name: str) -> str:
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = get_lexer_for_filename("a.txt")
    return coloured(text, lexer)


def coloured(text: str, lexer=None) -> str:
    """Source as HTML; no empty line may end the HTML block that Markdown sees."""
    html = highlight(text, lexer or PythonLexer(), HtmlFormatter(cssclass="highlight"))
    return re.sub(r"\n(?=\n)", "\n&#8203;", html)


# --- Code beside what it does -------------------------------------------------------------------
@dataclass
class Piece:
    """A definition, or the lines between two, of a section."""

    name: str  # empty between definitions
    docstring: str
    code: str
    line: int


def code_page(name: str) -> str:
    """The page of one algorithm's file."""
    text = (ROOT / f"algos/{name}.py").read_text()
    said = (DOCS / f"algos/{name}.md").read_text()
    beside, used = BESIDE.get(name, {}), set()
    about = ast.get_docstring(ast.parse(text))
    out = [
        f"---\ntitle: {name}.py\nhide: [toc]\n---\n",
        f"# {name}.py\n",
        f"[What it does and what it reaches](../algos/{name}.md) · [the file alone]({name}.py), to copy\n",
        f'<pre class="about">{escape(about)}</pre>\n',
    ]
    for title, pieces in sections(text):
        out.append(f"## {title}\n")
        for piece in pieces:
            names = beside.get(piece.name, [])
            used |= {piece.name} & set(beside)
            if piece.name:
                out.append(f"### {piece.name}\n")
            left = prose(piece.docstring) + "".join(quoted(said, key, name) for key in names)
            lines = f"line {piece.line}"
            out.append(
                f'<div class="pair"><div class="says">{left}<p class="line">{lines}</p></div>'
                f'<div class="code">{coloured(piece.code)}</div></div>\n'
            )
    if missing := set(beside) - used:
        raise ValueError(f"scripts/site_hooks.py, BESIDE: algos/{name}.py has no {min(missing)}")
    return "\n".join(out)


def sections(text: str) -> list[tuple[str, list[Piece]]]:
    """(banner's name, its pieces) of a file in the house's layout."""
    lines, tree = text.split("\n"), ast.parse(text)
    banners = [
        (n, m[1]) for n, line in enumerate(lines) if (m := re.match(r"# --- (.+?) -+$", line))
    ]
    found = []
    for (start, title), end in zip(
        banners, [n for n, _ in banners[1:]] + [len(lines)], strict=True
    ):
        pieces, at = [], start + 1
        for node in tree.body:
            if (
                not isinstance(node, ast.FunctionDef | ast.ClassDef)
                or not start < node.lineno <= end
            ):
                continue
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first > at and lines[first - 1].startswith("#"):
                first -= 1
            pieces += between(lines, at, first)
            pieces.append(definition(lines, node, first))
            at = node.end_lineno
        found.append((title, pieces + between(lines, at, end)))
    return found


def between(lines: list[str], start: int, end: int) -> list[Piece]:
    while start < end and not lines[start].strip():
        start += 1
    code = "\n".join(lines[start:end]).strip("\n")
    return [Piece("", "", code, start + 1)] if code else []


def definition(lines: list[str], node, first: int) -> Piece:
    """A function or class, its docstring apart from its code."""
    docstring, code = ast.get_docstring(node) or "", lines[first : node.end_lineno]
    if docstring:
        said = node.body[0]
        code = lines[first : said.lineno - 1] + lines[said.end_lineno : node.end_lineno]
    return Piece(node.name, docstring, "\n".join(code), first + 1)


def prose(docstring: str) -> str:
    """A docstring as paragraphs; what is indented keeps its lines."""
    out = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if re.search(r"^ {2,}", paragraph, re.MULTILINE):
            out.append(f"<pre>{escape(paragraph)}</pre>")
        elif paragraph:
            text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(paragraph.replace("->", "→")))
            out.append(f"<p>{text}</p>")
    return "".join(out)


def quoted(page: str, key: str, name: str) -> str:
    """The equations of a page with this left side, or the paragraph that begins so."""
    if key.startswith("**"):
        match = re.search(rf"^{re.escape(key)}.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
        if match:
            text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(match[0]))
            return "<p>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", text) + "</p>"
    lines = [
        line
        for line in page.split("\n")
        if re.match(rf" {{4}}{re.escape(key)}(?:  |\s*[=]\s)", line)
    ]
    if not lines:
        raise ValueError(
            f"docs/algos/{name}.md has no longer {key!r}; change BESIDE in scripts/site_hooks.py"
        )
    return typeset.equations(lines)


# --- Papers -------------------------------------------------------------------------------------
def papers() -> list[dict[str, str]]:
    """The entries of docs/bibliography.bib: fields, `key`, and the whole entry as `bibtex`."""
    found = []
    for entry in re.findall(r"@\w+\{.*?\n\}", (DOCS / "bibliography.bib").read_text(), re.DOTALL):
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.MULTILINE))
        shown = re.sub(r"\n  code = .*", "", entry)
        key = re.match(r"@\w+\{(\w+)", entry)[1]
        found.append(fields | {"key": key, "bibtex": re.sub(r",\n\}", "\n}", shown)})
    return found


def plain(text: str) -> str:
    accented = re.sub(r"\{\\'(\w)\}", "\\1\u0301", text)
    return unicodedata.normalize("NFC", re.sub(r"[{}]", "", accented))


def paper_lines(paper: dict[str, str]) -> list[str]:
    authors = [
        " ".join(reversed(name.split(", "))) for name in plain(paper["author"]).split(" and ")
    ]
    names = ", ".join(authors if len(authors) < 5 else [authors[0], "et al."])
    links = [f"[arXiv {paper['eprint']}](https://arxiv.org/abs/{paper['eprint']})"]
    if "code" in paper:
        links.append(f"[the authors' code]({paper['code']})")
    head = f"**{plain(paper['title'])}** {names}, {paper['year']}. {' · '.join(links)}"
    return [head, "", "```bibtex", paper["bibtex"], "```", ""]


def users(paper: dict[str, str]) -> list[str]:
    """The algorithms whose file names the paper."""
    return [name for name in ALGOS if paper["eprint"] in (ROOT / f"algos/{name}.py").read_text()]


def bibliography_page() -> str:
    lines = ["# Papers", "", "All entries in one file: [bibliography.bib](bibliography.bib).", ""]
    for paper in sorted(papers(), key=lambda paper: paper["title"]):
        lines += paper_lines(paper)
        if named := users(paper):
            lines += ["In " + ", ".join(f"[{name}](algos/{name}.md)" for name in named) + ".", ""]
    return "\n".join(lines)


# --- A page -------------------------------------------------------------------------------------
def tex(source, language, css_class, options, md, **kwargs) -> str:
    """A ```math block, for pymdownx.superfences."""
    import latex2mathml.converter

    return f'<div class="equations">{latex2mathml.converter.convert(source, display="block")}</div>'


def on_page_markdown(markdown, page, config, files):
    place = page.file.src_uri
    if place.startswith(("code/", "source/")) or place in ("bibliography.md", "readme.md"):
        return markdown
    markdown = typeset.typeset_page(relink(markdown, DOCS / place))
    name = PurePosixPath(place).stem
    if place == f"algos/{name}.md":
        named = [paper for paper in papers() if name in users(paper)]
        lines = [
            "",
            "",
            "## Code and papers",
            "",
            f"[{name}.py, section by section](../code/{name}.md)",
        ]
        markdown += "\n".join([*lines, "", *(line for p in named for line in paper_lines(p))])
    return markdown
