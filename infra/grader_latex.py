# docs/grader.md
r"""Repairs of one answer's LaTeX in front of math-verify: what it says, written so that math-verify's grammar reads it.

Strings only, and no recursion: a repair takes time linear, at worst quadratic, in the length of an answer, which is bounded.
"""

import re

BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # three deep
BRACKET = re.compile(r"[(\[{]|(?P<closes>[)\]}])")
TEXT = r"\\(?:text(?:rm|bf|it|normal|up)?|mathrm|mbox|mathit)\s*"
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
).split()
FUNCTIONS = (
    "sin cos tan csc sec cot arcsin arccos arctan sinh cosh tanh ln log exp sqrt pi infty max min gcd lcm det"
).split()
WORDS = {word: "\\" + word for word in [*GREEK, *FUNCTIONS] if word not in ("eta", "nu", "xi", "chi", "det")}
WORDS |= {word: r"\infty" for word in ("inf", "infinity", "oo")} | {f"a{f}": rf"\arc{f}" for f in ("sin", "cos", "tan")}
ALSO_UNITS = ("min", "max", "sec", "gcd", "lcm")  # functions only in front of a bracket

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
VULGAR = {"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35", "⅘": "45", "⅙": "16",
          "⅚": "56", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78"}  # fmt: skip
UNICODE = {c: rf"\frac{{{v[0]}}}{{{v[1]}}}" for c, v in VULGAR.items()} | {
    "°": r"^\circ ", "∞": r"\infty ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "−": "-",
    "–": "-", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "±": r"\pm ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "′": "'", "∠": r"\angle ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "“": "", "”": "",
}  # fmt: skip
UNICODE |= dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (rf"\{w} " for w in (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split()), strict=True))  # fmt: skip


def split_at(text: str, separator: str) -> list[str]:
    """The parts of `text` between matches of `separator` outside of all brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"(?P<separator>{separator})|\\[A-Za-z]+|\\.|.", text, re.DOTALL):
        if token["separator"] and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
        depth += {"(": 1, "[": 1, "{": 1, r"\{": 1, ")": -1, "]": -1, "}": -1, r"\}": -1}.get(token[0], 0)
    return [*parts, text[start:]]


def closing(text: str, start: int) -> int | None:
    """Position behind the bracket that closes the one at `start`."""
    depth = 0
    for bracket in BRACKET.finditer(text, start):
        depth += -1 if bracket["closes"] else 1
        if depth == 0:
            return bracket.end()
    return None


def enclosure(text: str) -> str:
    r"""The bracket, one of ( [ \{, that closes at the text's very end, else an empty string."""
    text = text.strip()
    start = 1 if text.startswith(r"\{") else 0
    if text and text[start : start + 1] in "([{" and closing(text, start) == len(text):
        return text[: start + 1] if start or text[0] != "{" else ""
    return ""


def with_braces(text: str, i: int) -> tuple[str, int]:
    """`text` with braces around the argument that TeX takes at i, or a plain-text sqrt(...), and the position behind it."""
    start = re.compile(r"\s*").match(text, i).end()
    end = closing(text, start) if text[start : start + 1] in ("{", "(") else None
    if end:
        return f"{text[:start]}{{{text[start + 1 : end - 1]}}}{text[end:]}", end
    token = re.compile(r"\\[A-Za-z]+|[^{}]", re.DOTALL).match(text, start)
    return (f"{text[:start]}{{{token[0]}}}{text[token.end() :]}", token.end() + 2) if token else (text, len(text))


def with_arguments(text: str) -> str:
    r"""\frac12, \sqrt 2, sqrt(2), x^(2), x^-1 and x^10 with the braces that the grammar wants."""
    text = re.sub(r"\^\s*([-+]\s*(?:[0-9.]+|\\?[A-Za-z]+)|[0-9]+(?:\.[0-9]+)?)", r"^{\1}", text)
    commands, i = re.compile(r"\\(?P<two>frac|binom)(?![A-Za-z])|\\sqrt(?![A-Za-z])(?:\s*\[[^][]*\])?|\^"), 0
    while token := commands.search(text, i):
        i = end = token.end()
        for _ in range(2 if token["two"] else 1):
            text, end = with_braces(text, end)
    return text


def plain_words(text: str) -> str:
    r"""pi, sin(x), sqrt(2), inf as commands; the contents of \text{...} stay."""

    def command(match: re.Match) -> str:
        word = match["word"]
        if not word:
            return match[0]
        if word in ("and", "or"):
            return rf"\text{{ {word} }}"
        if word in WORDS and (word not in ALSO_UNITS or re.compile(r"\s*\(").match(text, match.end())):
            return WORDS[word] + " "
        inner = re.fullmatch("([A-Za-z]?)(sin|cos|tan|ln|log|sqrt)([a-z]?)", word)
        return f"{inner[1]}\\{inner[2]} {inner[3]}" if inner else word

    return re.sub(
        rf"{TEXT}{BRACES}|\\(?:begin|end|operatorname)\*?\s*{BRACES}|\\[A-Za-z]+|(?P<word>[A-Za-z]{{2,}})", command, text
    )


def repeating(match: re.Match) -> str:
    whole, part, period = match.groups()
    bottom = 10 ** len(part) * (10 ** len(period) - 1)
    return rf"\frac{{{int(whole + part + period) - int((whole + part) or 0)}}}{{{bottom}}}"


def numbers(text: str) -> str:
    """1,234 and 1.7e4 as the grammar reads them. A blank behind a comma makes a list, and so do brackets around it."""
    text = re.sub(
        r"(?<=[0-9])(?:\{,\}|,\\!|\\,(?=[0-9]{3}(?![0-9]))|\\!\s*,|\\ (?=[0-9]{3}(?![0-9])))\s*(?=[0-9]{3})", ",", text
    )

    def grouped(match: re.Match) -> str:
        before = match.string[: match.start()]
        open_now = sum(map(before.count, "([")) - sum(map(before.count, ")]")) + before.count(r"\{") - before.count(r"\}")
        return match[0].replace(",", "") if open_now <= 0 else match[0]

    text = text.replace(" ", "") if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(?: [0-9]{3})+", text) else text
    text = re.sub(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])", grouped, text)
    text = re.sub(
        r"(?<![A-Za-z0-9.\\_])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([-+]?[0-9]{1,18})(?![0-9.^_])", r"(\1 \\cdot 10^{\2})", text
    )
    text = re.sub(r"(?<![0-9.])([0-9]{0,99})\.([0-9]{0,99})\\overline\s*\{?([0-9]{1,99})\}?", repeating, text)
    return re.sub(r"([0-9])\.(?![0-9.])", r"\1 ", text)


def clean(text: str) -> str:
    """What one text means by itself, before it is seen beside the other."""
    text = re.sub(r"([0-9])\s*(?:([kcdm]?m|ft|in|yd|mi)([²³]))$", r"\1 \\text{\2}^\3", text)  # 100m²
    if whole := re.fullmatch(rf"{TEXT}\{{([^{{}}]*[0-9][^{{}}]*)\}}", text.strip()):
        text = whole[1]  # \text{12 cents}
    text = re.sub(f"(?<=[0-9])(?=[{''.join(VULGAR)}])", " ", text)
    for table, mark in ((SUPERSCRIPTS, "^"), (SUBSCRIPTS, "_")):
        text = re.sub(
            rf"\^?[{''.join(table)}]+", lambda m, t=table, k=mark: k + "{" + "".join(t.get(c, "") for c in m[0]) + "}", text
        )
    text = re.sub("√ ?([0-9.]+)", r"\\sqrt{\1}", text)
    text = "".join(UNICODE.get(c, c) for c in text)
    text = re.sub(r"\\(?:[dtc]frac)(?![A-Za-z])", r"\\frac", text)
    text = re.sub(
        r"\\(?:displaystyle|textstyle|limits|[bB]igg?[lrm]?|(?:left|right)(?:\.|(?![A-Za-z])))(?![A-Za-z])|\\(?=\$)",
        " ",
        text,
    )
    text = re.sub(r"^[$€£¥]+|[$€£¥]+$|(?<=[-=(])\s*[$€£]|\$", "", numbers(text).strip()).strip()
    text = re.sub(r"\\q?quad(?![A-Za-z])|(?<!\\)\\[,;:! ]|~", " ", text)
    text = re.sub(r"\\(?:mathrm|text|rm|operatorname)\s*\{\s*([eid])\s*\}|\\imath(?![A-Za-z])", lambda m: m[1] or "i", text)
    text = re.sub(r"\\(?:mathrm|operatorname\*?|text)\s*\{\s*(" + "|".join(FUNCTIONS) + r")\s*\}", r"\\\1 ", text)
    text = (
        text.replace(r"\varnothing", r"\emptyset").replace("**", "^").replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    )
    text = text.replace(r"\bmod", r"\mod").replace(r"\langle", "(").replace(r"\rangle", ")")
    text = re.sub(r"\\(?:bf|rm|it)(?![A-Za-z])", "", text)
    text = re.sub(rf"\s*(?:{TEXT}\{{\s*(?:percent|percentage|pct)\s*\}}|\b(?:percent|pct)\b)", r"\\%", text)
    text = re.sub(r"\s*\^\s*\{?\s*(?:\\circ|\\degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", "° ", text)
    while (call := re.search(r"(?<![A-Za-z\\])abs\s*\(", text)) and (end := closing(text, call.end() - 1)):
        text = f"{text[: call.start()]}|{text[call.end() : end - 1]}|{text[end:]}"
    text = with_arguments(plain_words(text)).strip()
    return re.sub(r"^([-+]?)([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)$", r"\1\2\\frac{\3}{\4}", text)  # 1 1/2


def final(text: str) -> str:
    r"""The names that the grammar cannot read, as \variable{...}; i as the imaginary unit."""
    index_i = re.search(r"_\s*\{?\s*i\s*=", text)

    def name(match: re.Match) -> str:
        base = match["name"]
        if not base:
            return match[0]
        index = re.sub(rf"{TEXT}|\\(?:rm|mathbf|bf)(?![A-Za-z])|[{{}}\s\\]", "", match["index"] or "") + "p" * len(
            match["primes"]
        )
        index = re.sub(r"[^A-Za-z0-9]", lambda m: f"o{ord(m[0])}o", index)
        follows = re.compile(r"\s*\(").match(match.string, match.end())
        if base == r"\Gamma" and not index and follows:
            return match[0]
        if base == "i" and not index and not index_i:
            return "{I}" + (r" \cdot " if follows else "")  # in braces: of I^2 math-verify reads I
        if index or base in ("E", "I", "d", r"\gamma", r"\Gamma", "T", "S"):
            symbol = rf"\variable{{{base.lstrip(chr(92))}{'u' + index if index else ''}}}".replace("inf", "iNf")
        else:
            symbol = match[0]
        return symbol + (r" \cdot " if follows and (index or base not in "fghFGHPQT") else " ")

    names = "|".join(rf"\\{g}" for g in GREEK)
    index = rf"\s*_\s*(?P<index>{BRACES}|\\[A-Za-z]+|[A-Za-z0-9])"
    skip = rf"{TEXT}{BRACES}|\\(?:begin|end|operatorname|mathbb|mathcal|mathbf|vec|overline|hat|bar|tilde)\*?\s*{BRACES}"
    differential = r"\\frac\{d\}\{d[a-z]|\\int(?![A-Za-z])"
    text = re.sub(
        rf"{skip}|(?P<name>(?:{names})(?![A-Za-z])|(?<!\\)[A-Za-z])(?:{index})?(?P<primes>'*)|\\[A-Za-z]+", name, text
    ) if not re.search(differential, text) else text  # fmt: skip
    text = re.sub(r"(\)|\\pi)\s*\((?![^()]*,)", r"\1 \\cdot (", text)
    return re.sub(r"(?<![_^0-9.{}])([0-9]+(?:\.[0-9]+)?)\s*\((?!\s*\\mod)", r"\1 \\cdot (", text)


def scientific(text: str) -> tuple[int, int] | None:
    r"""(m, k) of a number m 10^k, such as 1.7e4 or 1.7 \times 10^{4}. m has no factor 10: equal numbers are equal pairs."""
    times = r"(?:\\times|\\cdot|\*|×|·)"
    mantissa = r"(?P<sign>[-+]?)(?P<whole>[0-9]{0,999})\.?(?P<part>[0-9]{0,999})"
    power = r"10\s*\^\s*(?P<brace>\{?)\s*(?P<power>[-+]?[0-9]{1,18})\s*(?(brace)\}?)"
    match = re.fullmatch(rf"{mantissa}\s*(?:[eE](?P<e>[-+]?[0-9]{{1,18}})|{times}\s*{power})?", text)
    if not match and (match := re.fullmatch(power, text)):
        return 1, int(match["power"])
    if not match or not (match["whole"] or match["part"]):
        return None
    digits = match["whole"] + match["part"]
    m, exponent = digits.rstrip("0"), int(match["e"] or match["power"] or 0) - len(match["part"])
    return (int(match["sign"] + m), exponent + len(digits) - len(m)) if m else (0, 0)
