"""The site: equations typeset from plain text, code beside what is said of it, links and papers that lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import site_hooks
import typeset
from conftest import ROOT

PAGES = sorted((ROOT / "docs/algos").glob("*.md"))


def shape(text: str) -> str:
    """The MathML of an expression without spaces and attributes, short."""
    tree = ElementTree.fromstring(typeset.mathml(text))
    for parent in tree.iter():
        for space in parent.findall("mspace"):
            parent.remove(space)

    def told(node) -> str:
        inside = "".join(told(child) for child in node) or (node.text or "")
        name = node.tag.removeprefix("m")
        return inside if name in ("row", "i", "n", "o", "text", "ath") else f"{name}({inside})"

    return told(tree)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x_t", "sub(xt)"),
        ("A_{t+1}", "sub(At+1)"),
        ("a_(t+1) b", "sub(at+1)b"),
        ("zⱼ²", "subsup(zj2)"),
        ("Σᵢ xᵢ", "under(∑i)sub(xi)"),
        ("Π_{j<n} d_{t+j}", "under(∏j<n)sub(dt+j)"),
        ("r̃ + Q̄₁", "over(r~)+sub(over(Q¯)1)"),
        ("õ", "over(o~)"),
        ("s′", "s′"),
        ("o′ₖ", "sub(o′k)"),
        ("tanh² x", "sup(tanh2)x"),
        ("minᵢ q", "sub(mini)q"),
        ("√(a + 1)", "sqrt(a+1)"),
        ("½ x", "frac(12)x"),
        ("5,120 - 0.5", "5,120−0.5"),
        ("π(a | s)", "π(a|s)"),
        ("q* - q", "sup(q∗)−q"),
        ("|x| p(a | b)", "|x|p(a|b)"),
        ("(a", "(a)"),  # an open bracket ends with the line
    ],
)
def test_an_expression_is_read_as_it_is_meant(text, expected):
    assert shape(text) == expected


def test_signs_that_belong_to_one_thing_stand_close_to_it():
    assert typeset.mathml("clip(x, -c, c) - 1").count('form="prefix"') == 1
    assert typeset.mathml("|x| + π(a | s)").count('rspace="0"') == 2


def test_a_block_is_aligned_and_remarks_stay_text():
    table = typeset.equations(
        ["    y    = R + Γ q          (paper, eq. 2)", "    L_Q = y        two of the ten heads"]
    )
    rows = re.findall(r"<tr>.*?</tr>", table)
    assert len(rows) == 2 and all("<mo" in row.split('class="right"')[1] for row in rows)
    assert "(paper, eq. 2)</span>" in rows[0] and "two of the ten heads</span>" in rows[1]


def test_only_equations_of_a_page_are_changed():
    listing = "    forward(state float32 (N, S)) -> actions"
    page = f"```\n    x = 1\n```\n\n- a point:\n\n    y = 2\n\nText.\n\n{listing}\n\nAnd\n\n    z = α + 1\n"
    out = typeset.typeset_page(page)
    assert out.count("<math") == 2 and "    x = 1" in out and "    y = 2" in out and listing in out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_equation_of_a_page_is_well_formed(page):
    out = typeset.typeset_page(page.read_text())
    blocks = re.findall(r'<div class="equations">.*?</div>', out)
    assert blocks or page.stem not in site_hooks.ALGOS
    for block in blocks:
        tree = ElementTree.fromstring(block)
        for name, count in {"msub": 2, "msup": 2, "msubsup": 3, "munder": 2, "mfrac": 2}.items():
            assert all(len(node) == count for node in tree.iter(name)), block


@pytest.mark.parametrize("name", site_hooks.ALGOS)
def test_code_stands_beside_what_is_said_of_it(name):
    """Every section and definition of the file, and the equations that BESIDE names, or a clear error."""
    page, text = site_hooks.code_page(name), (ROOT / f"algos/{name}.py").read_text()
    for title in re.findall(r"^# --- (.+?) -+$", text, re.MULTILINE):
        assert f"\n## {title}\n" in page
    for definition in re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE):
        assert f"\n### {definition}\n" in page
    assert page.count('<div class="pair">') == page.count('<div class="code">')
    assert "<math" in page
    # nothing is lost: all code of all pieces, in its order
    pieces = [piece.code for _, parts in site_hooks.sections(text) for piece in parts]
    kept = {line.strip() for piece in pieces for line in piece.split("\n")}
    tail = text.split("# --- Imports")[1].split("\n")[1:]
    code = [line.strip() for line in tail if line.strip() and not line.startswith("# ---")]
    assert sum(line not in kept for line in code) <= sum(
        len(piece.docstring.split("\n"))
        for _, parts in site_hooks.sections(text)
        for piece in parts
    )


def test_an_equation_that_is_gone_is_named():
    page = (ROOT / "docs/algos/drqv2.md").read_text()
    assert "<math" in site_hooks.quoted(page, "L_Q", "drqv2")
    for key in ("L_nothing", "**Nothing."):
        with pytest.raises(
            ValueError, match=r"docs/algos/drqv2.md has no longer .*nothing"
        ) as error:
            site_hooks.quoted(page, key.lower() if key[0] == "*" else key, "drqv2")
        assert "BESIDE" in str(error.value)


def test_every_paper_that_is_named_is_in_the_bibliography():
    papers = {paper["eprint"]: paper for paper in site_hooks.papers()}
    named = set()
    for folder in ("algos", "docs", "envs", "hardware", "scripts"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
            named |= set(re.findall(r"arXiv:? ?(\d{4}\.\d{4,5})", path.read_text()))
    assert not named - set(papers), "docs/bibliography.bib lacks a paper"
    for paper in papers.values():
        assert {"title", "author", "year", "archiveprefix"} <= set(paper)
        assert "code = " not in paper["bibtex"] and paper["bibtex"].count("{") == paper[
            "bibtex"
        ].count("}")
    assert site_hooks.users(papers["2602.21203"]) == ["squint_sac"]


def test_links_out_of_the_pages_lead_to_pages_made_of_what_they_mean():
    page = ROOT / "docs/algos/drqv2.md"
    text = "[a](../../algos/drqv2.py) [b](../../envs/dmc) [c](../../docs/images/x.png) [d](../log.md#x)"
    assert site_hooks.relink(text, page) == (
        "[a](../code/drqv2.md) [b](../source/envs/dmc.md) [c](../../docs/images/x.png) [d](../log.md#x)"
    )
    assert all(path.exists() for path in site_hooks.linked_sources())


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: make docs, or the extra docs"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for name in (
        "index.html",
        "code/drqv2.html",
        "bibliography.html",
        "assets/STIXTwoMath-Regular.ttf",
    ):
        assert (tmp_path / name).exists()
    # nothing is fetched from elsewhere when a page is looked at
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert not [url for url in fetched if 'rel="canonical"' not in url], page
