"""Equations written as plain text, `L_Q = Σᵢ mean of (Qᵢ(o, a) − y)²`, as MathML for the site.

The pages and the code hold equations that read well where nothing typesets them: in an editor, in a
terminal, in a diff. Browsers typeset MathML by themselves, so the site needs no script for it.

    x_t  x_{t+1}  x_(t+1)  xᵢ      subscripts; under a Σ or Π they go below it
    x^k  x²  x′  x'                superscripts and primes
    r̃  Q̄  ĥ  √x  ½                 accents, roots, fractions of one character
    mean over the batch, clip      words and names of functions stand upright
"""

import re
import unicodedata
from html import escape

SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ᵢⱼₖₙₜ", "0123456789+−ijknt", strict=True))
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+−n", strict=True))
ACCENTS = {"\u0303": "~", "\u0304": "¯", "\u0302": "^", "\u0307": "˙"}
FRACTIONS = {"½": ("1", "2"), "¼": ("1", "4"), "¾": ("3", "4")}
CLOSING = {"(": ")", "{": "}", "[": "]"}
TOKEN = re.compile(
    r"\s+|\d[\d,]*\d(?:\.\d+)?|\d+(?:\.\d+)?|[A-Za-z]{2,}|[^\W\d_][\u0302\u0303\u0304\u0307]?|.",
    re.S,
)
BIG = "ΣΠ"
SPACE = '<mspace width="0.22em"/>'
FUNCTIONS = set("log exp tanh softplus clip min max mean var sin cos".split())


class Reader:
    """Tokens of an equation, taken one after another."""

    def __init__(self, text: str):
        text = unicodedata.normalize("NFD", text)
        self.tokens, self.at = TOKEN.findall(text), 0

    @property
    def before(self) -> str:
        """The token, blanks left out, that stands before the one just taken."""
        taken = [token for token in self.tokens[: self.at - 1] if not token.isspace()]
        return taken[-1] if taken else ""

    @property
    def after(self) -> str:
        """The token behind the next one."""
        return self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else ""

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.next
        self.at += 1
        return token


def row(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"<mrow>{''.join(parts)}</mrow>"


def until(reader: Reader, end: str) -> list[str]:
    """Everything up to `end`, which is taken too."""
    parts: list[str] = []
    while reader.next and reader.next != end:
        parts += atom(reader)
    reader.take()
    return parts


def group(reader: Reader) -> str:
    """What hangs on a `_`, a `^` or a `√`: one atom or, without its brackets, a group."""
    if reader.next in ("{", "("):
        return row(until(reader, CLOSING[reader.take()]) or ["<mrow></mrow>"])
    return row(base(reader))


def base(reader: Reader) -> list[str]:
    """One symbol, number, word or bracketed group, without what hangs on it."""
    token = reader.take()
    if token.isspace():
        return []
    if token in CLOSING:
        inner = "".join(until(reader, CLOSING[token]))
        pair = f'<mo stretchy="false">{token}</mo>', f'<mo stretchy="false">{CLOSING[token]}</mo>'
        return [f"<mrow>{pair[0]}{inner}{pair[1]}</mrow>"]
    if token in FRACTIONS:
        over, under = FRACTIONS[token]
        return [f"<mfrac><mn>{over}</mn><mn>{under}</mn></mfrac>"]
    if token == "√":
        return [f"<msqrt>{group(reader)}</msqrt>"]
    if token[0].isdigit() and token not in SUPERSCRIPTS and token not in SUBSCRIPTS:
        return [f"<mn>{token}</mn>"]
    if token[0] in BIG:
        return [f'<mo movablelimits="false">{"∑" if token[0] == "Σ" else "∏"}</mo>']
    if token[-1] in ACCENTS:
        accent = f'<mo stretchy="false">{ACCENTS[token[-1]]}</mo>'
        return [f'<mover accent="true"><mi>{escape(token[:-1])}</mi>{accent}</mover>']
    if token[0].isalpha():
        tag = "mtext" if len(token) > 1 else "mi"
        return [f"<{tag}>{escape(token)}</{tag}>"]
    return [sign(token, reader)]


def sign(token: str, reader: Reader) -> str:
    """An operator. A minus before one thing alone and the bars of |x| stand close to it; p(a | b) is set wide."""
    sign = {"-": "−", "*": "·"}.get(token, token)
    if sign in "−±+" and reader.before in ("", *"([{,=|·/+←≤≥<>"):
        return f'<mo form="prefix">{sign}</mo>'
    around = reader.tokens[max(reader.at - 2, 0)] + reader.next
    if sign in "|‖" and not around.isspace():
        return f'<mo stretchy="false" lspace="0" rspace="0">{sign}</mo>'
    return f'<mo stretchy="false">{escape(sign)}</mo>'


def atom(reader: Reader) -> list[str]:
    """A base with its primes, sub- and superscripts; a word has a space to a neighbour that is no bracket."""
    big, word = reader.next[0] in BIG, len(reader.next) > 1 and reader.next.isalpha()
    parts = base(reader)
    if not parts:
        return []
    before = reader.before
    # after a word there is a space already, after a sign its own
    spaced = word and (len(before) == 1 and before.isalnum() or before in tuple(")]}²′'"))
    below: list[str] = []
    above: list[str] = []
    while reader.next:
        token = reader.next
        if token in SUBSCRIPTS:
            below.append(script(SUBSCRIPTS[reader.take()]))
        elif token in SUPERSCRIPTS:
            above.append(script(SUPERSCRIPTS[reader.take()]))
        elif token in ("′", "'"):  # the character stands raised already
            reader.take()
            parts = [row([*parts, '<mo lspace="0" rspace="0">′</mo>'])]
        elif token == "*" and not reader.after[:1].isalnum():  # the optimum, not a product
            reader.take()
            above.append("<mo>∗</mo>")
        elif token in ("_", "^"):
            reader.take()
            (below if token == "_" else above).append(group(reader))
        else:
            break
    whole = parts[0]
    if big and below:
        whole = f"<munder>{whole}{row(below)}</munder>"
    elif below and above:
        whole = f"<msubsup>{whole}{row(below)}{row(above)}</msubsup>"
    elif below or above:
        tag = "msub" if below else "msup"
        whole = f"<{tag}>{whole}{row(below or above)}</{tag}>"
    follows = word and reader.next[:1] not in tuple("([)],;")
    return [*[SPACE] * spaced, whole, *[SPACE] * follows]


def script(character: str) -> str:
    tag = "mn" if character.isdigit() else "mi" if character.isalpha() else "mo"
    return f"<{tag}>{character}</{tag}>"


def mathml(text: str) -> str:
    """One expression as a <math> element."""
    reader, parts = Reader(text.strip()), []
    while reader.next:
        parts += atom(reader)
    return f'<math displaystyle="true"><mrow>{"".join(parts)}</mrow></math>'


def is_remark(text: str) -> bool:
    """Whether a column beside an equation is a sentence rather than a formula."""
    words = re.findall(r"\b[A-Za-z]{2,}\b", re.sub(r"_\w+", "", text))
    sentence = len(set(words) - FUNCTIONS) >= 3 and "=" not in text[:6]
    return sentence or text.startswith(("(paper", "equation"))


def equations(lines: list[str]) -> str:
    """A block of lines, aligned at their first sign of equality; wide gaps part columns."""
    rows = []
    for line in lines:
        columns = re.split(r"\s{3,}", line.strip())
        if len(columns) > 1 and columns[1].startswith("="):
            columns[:2] = [" ".join(columns[:2])]
        left, right, rest = "", columns[0], columns[1:]
        if re.match(r"[=~:←]", right):  # the line goes on with the one above
            left, right = "", right
        elif match := re.match(r"(.{1,24}?)\s*(=|~|←)\s(?!.*\bat\b)", right):
            left, right = match[1], right[match.start(2) :]
        elif rest and len(right) < 16 and is_remark(rest[0]):  # a symbol and what it stands for
            left, right, rest = columns[0], rest[0], rest[1:]
        elif rest and not is_remark(rest[0]) and re.match(r"(mean|Σ)", rest[0]):
            left, right, rest = columns[0], rest[0], rest[1:]
        cells = [f'<td class="left">{side(left)}</td><td class="right">{side(right)}']
        for column in rest:
            cells.append(f'<span class="beside">{side(column)}</span>')
        rows.append(f"<tr>{' '.join(cells)}</td></tr>")
    return f'<div class="equations"><table class="lines">{"".join(rows)}</table></div>'


def side(text: str) -> str:
    """A column: options as code, sentences as text with their formulas, else a formula."""
    if not text:
        return ""
    if text.startswith("--"):
        return f"<code>{escape(text)}</code>"
    if is_remark(text):
        first, colon, rest = text.partition(":")
        if colon and len(first) < 12 and not first.startswith("("):
            return f"{mathml(first)}: {escape(rest.strip())}"
        return escape(text)
    return mathml(text)


def is_equation(lines: list[str]) -> bool:
    """Whether an indented block is mathematics and not a listing."""
    text = "\n".join(lines)
    listing = re.search(r"float32|uint8|\$ |python |pip |->|^\s*\$", text)
    mathematical = re.search(r"[=−Σ√∈‖|]|[α-ωΑ-Ω]", text)
    return bool(mathematical) and not listing


def typeset_page(markdown: str) -> str:
    """A page with its indented equations as HTML; code fences and lists are left alone."""
    out: list[str] = []
    lines, i, fence = markdown.split("\n"), 0, False
    while i < len(lines):
        if lines[i].lstrip().startswith("```"):
            fence = not fence
        starts = lines[i].startswith("    ") and not fence and (i == 0 or not lines[i - 1].strip())
        if starts and not in_list(out):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or blank_inside(lines, end)):
                end += 1
            block = [line for line in lines[i:end] if line.strip()]
            if is_equation(block):
                out += [equations(block), ""]
                i = end
                continue
        out.append(lines[i])
        i += 1
    return "\n".join(out)


def blank_inside(lines: list[str], at: int) -> bool:
    return not lines[at].strip() and at + 1 < len(lines) and lines[at + 1].startswith("    ")


def in_list(above: list[str]) -> bool:
    """Whether the paragraph above belongs to a list, whose continuation is indented too."""
    for line in reversed(above):
        if re.match(r"\s*([-*]|\d+\.)\s", line):
            return True
        if line.strip() and not line.startswith(" "):
            return False
    return False
