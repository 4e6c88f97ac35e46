# docs/grader.md
r"""What a reference and an answer say side by side: readings() is what grader.py asks of a pair.

Pairs of repaired texts, of which one being equal is enough: 45^\circ is read as 45 and as pi/4. No pair means unequal.
"""

import re

from infra.grader_latex import BRACES, GREEK, TEXT, clean, enclosure, final, scientific, split_at

MAX_EXPONENT = 2000  # an answer of 1,000 characters without a power of ten is no larger, so it is not that number

# a unit's names; two answers in different units of this table are different
UNITS = {name: group.split()[0] for group in (
    "mm millimeter millimetre", "cm centimeter centimetre", "dm", "m meter metre", "km kilometer kilometre", "in inch inche",
    "ft feet foot", "yd yard", "mi mile", "mg", "g gram", "kg kilogram", "lb pound", "oz ounce", "ms", "s sec second",
    "min minute", "h hr hour", "day", "week", "month", "yr year", "ml milliliter", "l L liter litre", "deg degree",
    "rad radian", "mph", "kmh kph km/h", "Hz", "kHz", "Pa", "kPa", "J", "kJ", "N", "W", "kW", "V", "A", "K", "F", "C", "eV",
    "mol", "cent", "dollar", "sq square", "cu cubic", "gal gallon", "unit", "man men",
) for name in group.split()}  # fmt: skip
CHANGES_VALUE = (
    "factorial squared cubed dozen pair pairs half halves third thirds quarters modulo times plus minus root".split()
)
NO_UNIT = re.compile(r"\b(?:or|and|more|less|least|most|not|no|if|when|for|even|odd|is|are|only|mod)\b")
OPERATOR_AT_END = re.compile(r"\\(?:le|leq|ge|geq|in|cdot|times|cup|cap|pm)$")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
UNIT_TEXT = re.compile(
    rf"(?:\s|\\[,;:!]|~|/|\\cdot(?![A-Za-z])|{TEXT}(?P<unit>{BRACES})(?:\s*\^\s*(?P<power>[0-9]|\{{-?[0-9]\}}))?)+$"
)
BARE_UNIT = re.compile(r"(?P<words>[A-Za-z]+(?:[ /][A-Za-z]+){0,3})(?:\s*\^\s*(?P<power>\{?[0-9]\}?))?\.?$")
NUMERIC = re.compile(r"(?:[-+0-9.,/(){}\s]|\\(?:frac|times|cdot|sqrt|pi|pm)(?![A-Za-z])|\^)*[0-9})]")

LETTER = rf"(?:[A-Za-z]|\\(?:{'|'.join(GREEK)})(?![A-Za-z])|{TEXT}{BRACES})"
INDEX = rf"\s*_\s*(?:{BRACES}|\\[A-Za-z]+|[A-Za-z0-9])"
NAME = re.compile(  # x, v_0, f(x), AB, \angle ABC, \text{Area}
    r"(?:\\(?:angle|triangle|overline|vec|hat|bar|widehat)\s*)?"
    rf"(?:[A-Z]{{2,4}}|\{{[A-Z]{{1,4}}\}}|{LETTER})(?:{INDEX})?'*(?:\^\{{-1\}})?(?:\s*\([^()=<>]{{1,30}}\))?\s*"
)
RELATIONS = re.compile(r"\\(?:leq?|leqslant|lt|geq?|geqslant|gt|neq?)(?![A-Za-z])|<=|>=|!=|[<>]")
OPERATORS = {"le": "≤", "leq": "≤", "leqslant": "≤", "<=": "≤", "lt": "<", "ge": "≥", "geq": "≥", "geqslant": "≥", ">=": "≥",
             "gt": ">", "ne": "≠", "neq": "≠", "!=": "≠"}  # fmt: skip
# (a) 3 (b) 4
SEVERAL = re.compile(r"(?:^|[\s;,.])\(?(?:1|a|i|A)\s?[).:]\s*\S.*[\s;,.]\(?(?:2|b|ii|B)\s?[).:]\s*\S", re.DOTALL)


def unit_of(text: str, other: str) -> tuple[str, str]:
    r"""(text without its unit, the unit). Units stand in \text{...} or behind a number and a blank."""
    if (match := UNIT_TEXT.search(text)) and match["unit"]:
        head, unit = text[: match.start()].strip(), match["unit"][1:-1].strip(" .")
        allowed = head and head[-1] not in "_^{=<>+-*(,&|" and not NO_UNIT.search(unit) and not OPERATOR_AT_END.search(head)
    elif (match := BARE_UNIT.search(text)) and NUMERIC.fullmatch(text[: match.start()].strip()):
        head, unit = text[: match.start()], match["words"]
        words, letters = re.split("[ /]", unit), re.findall("[A-Za-z]+", re.sub(TEXT + BRACES, "", other))
        known = all(w in UNITS or w.rstrip("s") in UNITS or w == "per" or w.lower() in SCALES for w in words)
        known = known or (len(words) == 1 and len(unit) > 3 and unit.lower() not in CHANGES_VALUE)  # 10 apples
        if len(words[0]) == 1:
            allowed = known and head[-1].isspace() and not re.search(r"\\(?:sqrt|pi|frac)", head) and words[0] not in letters
        else:
            allowed = known and words[0] not in letters and (head[-1].isspace() or not letters)
        head = head.strip()
    else:
        return text, ""
    if not allowed:
        return text, ""
    unit += " ^" + match["power"].strip("{}") if match["power"] else ""
    scale = SCALES.get(unit.lower().split()[0]) if unit else None
    return (rf"{head} \cdot 10^{{{scale}}}", "".join(unit.split()[1:])) if scale else (head, unit)


def same_unit(a: str, b: str) -> bool:
    (a, _, power), (b, _, power_b) = a.partition(" ^"), b.partition(" ^")
    known = [UNITS.get(u) or UNITS.get(u.lower().rstrip("s")) for u in (a, b)]
    return (None in known or known[0] == known[1]) and ("" in (power, power_b) or power == power_b)


def interval_of(text: str) -> tuple[str, str] | None:
    """(name, the interval) of an inequality in one name: 1 < x <= 3, x > 2 or x < 1."""
    alternatives = split_at(text, rf"{TEXT}\{{\s*or\s*\}}|\\lor(?![A-Za-z])")
    if len(alternatives) > 1:
        found = [interval_of(part) for part in alternatives]
        return (
            (found[0][0], r" \cup ".join(f[1] for f in found))
            if None not in found and len({f[0] for f in found}) == 1
            else None
        )
    if builder := re.fullmatch(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|\||:)(.*)\\\}", text.strip()):
        return interval_of(builder[2])
    operators = [OPERATORS.get(o.lstrip("\\"), o) for o in RELATIONS.findall(text)]
    sides = [side.strip() for side in RELATIONS.split(text)]
    if len(sides) == 2 and (inside := re.fullmatch(r"\|(.*)\|", sides[0])) and operators[0] in ("<", "≤"):
        sides, operators = [f"-({sides[1]})", inside[1].strip(), sides[1]], operators * 2
    turned = {"<": ">", "≤": "≥", ">": "<", "≥": "≤"}
    if "=" in text or not all(sides) or len(split_at(text, ",")) > 1:
        return None
    if len(operators) == 1 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        sides, operators = sides[::-1], [turned.get(o, o) for o in operators]
    if len(operators) == 2 and all(o in (">", "≥") for o in operators):
        sides, operators = sides[::-1], [turned[o] for o in operators[::-1]]
    name = sides[len(operators) - 1] if operators else ""
    ends = [s for s in sides if s != name]
    if not NAME.fullmatch(name) or any(name in re.findall(r"\\?[A-Za-z]+", e) for e in ends):
        return None
    if operators == ["≠"]:
        return name, rf"(-\infty, {ends[0]}) \cup ({ends[0]}, \infty)"
    if len(operators) == 1 and len(ends) == 1:
        low = {">": "(", "≥": "["}.get(operators[0])
        return name, f"{low}{ends[0]}, \\infty)" if low else rf"(-\infty, {ends[0]}" + (")" if operators[0] == "<" else "]")
    if len(operators) == 2 and len(ends) == 2 and all(o in ("<", "≤") for o in operators):
        return name, f"{'(' if operators[0] == '<' else '['}{ends[0]}, {ends[1]}{')' if operators[1] == '<' else ']'}"
    return None


def named(text: str) -> tuple[str, str]:
    """(name, value) of S_{max} = 12, 12 = x or x in [1, 2]; an empty name for another text."""
    parts = split_at(text, r"\\in(?![A-Za-z])")
    parts = parts if len(parts) == 2 else split_at(text, "(?<![<>!:=])=(?!=)")
    if len(parts) == 2 and NAME.fullmatch(parts[1].strip()) and not NAME.fullmatch(parts[0].strip()):
        parts.reverse()
    names = split_at(parts[0].strip()[1:-1], ",") if enclosure(parts[0]) == "(" else parts[:1]  # (x, y) = (1, 2)
    if len(parts) > 1 and all(NAME.fullmatch(name.strip()) for name in names):
        return "".join(parts[0].split()), "=".join(parts[1:]).strip()
    return "", text


def value_named(text: str) -> tuple[str, str]:
    """(name, value), of a list x = 1 or x = 2 too if all have one name; x = 1, y = 2 has none."""
    found = [named(part) for part in split_at(text, rf"[,;]|{TEXT}\{{\s*(?:or|and)\s*\}}|\\lor(?![A-Za-z])")]
    if len(found) > 1 and found[0][0] and len({name for name, _ in found}) == 1:
        return found[0][0], ", ".join(value for _, value in found)
    return named(text) if len(found) == 1 or not any(name for name, _ in found[1:]) else ("", text)


def one_by_one(text: str) -> str:
    """x = 1, y = 2 for (x, y) = (1, 2)."""
    sides = [s.strip() for s in text.split("=")]
    if len(sides) != 2 or (enclosure(sides[0]), enclosure(sides[1])) != ("(", "("):
        return text
    names, values = (split_at(s[1:-1], ",") for s in sides)
    return ", ".join(f"{n} = {v}" for n, v in zip(names, values, strict=True)) if len(names) == len(values) else text


def words_of(text: str) -> str | None:
    r"""Letters and blanks of an answer in words, \text{...} taken off; None if it holds mathematics."""
    bare = re.sub(rf"{TEXT}\{{([^{{}}]*)\}}", r" \1 ", text)
    bare = re.sub(r"^\s*\(\s*([A-Za-z])\s*\)\s*$", r"\1", bare)
    if not re.fullmatch(r"[A-Za-z\s.',-]*[A-Za-z][A-Za-z\s.',-]*", bare):
        return None
    bare = " ".join(bare.strip(" .").split())
    return bare.lower() if len(bare) > 1 else bare


def readings(reference: str, answer: str) -> list[tuple[str, str]]:
    words = words_of(reference), words_of(answer)
    if None not in words and (
        re.search(TEXT, reference + answer) or all(re.search("[A-Za-z]{3,} |^[A-Za-z]{4,}$|^(?:yes|no)$", w) for w in words)
    ):
        return [("1", "1")] if words[0] == words[1] else []
    if any(n and abs(n[1]) > MAX_EXPONENT for n in map(scientific, (reference, answer))):
        return []
    pair = [clean(reference), clean(answer)]
    (a, unit), (b, unit_b) = unit_of(pair[0], pair[1]), unit_of(pair[1], pair[0])
    if not same_unit(unit, unit_b):
        return []
    if "=" in a and "=" in b:
        a, b = one_by_one(a), one_by_one(b)
    names = value_named(a), value_named(b)
    equations = ["=" in a, "=" in b]
    if names[0][0] and names[1][0]:
        if names[0][0] == names[1][0]:
            a, b = names[0][1], names[1][1]
    elif not all(equations) or "\\in" in a + b:
        a, b = names[0][1], names[1][1]
    ranges = interval_of(a), interval_of(b)
    if ranges[0] and ranges[1]:
        if ranges[0][0] != ranges[1][0]:
            return []
        a, b = ranges[0][1], ranges[1][1]
    elif ranges[0] and re.search(r"[\[(].*,.*[\])]", b):
        a = ranges[0][1]
    elif ranges[1] and re.search(r"[\[(].*,.*[\])]", a):
        b = ranges[1][1]
    braces = enclosure(a), enclosure(b)
    if r"\{" in braces and braces[0] != braces[1] and "" not in braces:
        inner = [x.strip()[2:-2] for x, e in zip((a, b), braces, strict=True) if e == r"\{"][0]
        if len(split_at(inner, ",")) > 1:
            return []  # a set for a tuple or an interval
    if "," in a and "," in b and ";" in a + b:
        a, b = (re.sub(rf"\s*,?\s*{TEXT}\{{\s*(?:and|or)\s*\}}", ";", x) for x in (a, b))
    return [(final(x), final(y)) for x, y in percentages(a, b) for x, y in angles(x, y)]


def percentages(a: str, b: str) -> list[tuple[str, str]]:
    """50% is 1/2; it is 50 too if the reference says %, or if it is a whole number."""
    bare = [re.fullmatch(r"(.*[0-9}\s])\\?%\s*", x) for x in (a, b)]
    if all(bare):
        return [(bare[0][1], bare[1][1])]
    if bare[0]:
        return [(bare[0][1], b), (rf"\frac{{{bare[0][1]}}}{{100}}", b)]
    if bare[1]:
        whole = [(a, bare[1][1])] if bare[1][1].strip().isdigit() else []
        return [*whole, (a, rf"\frac{{{bare[1][1]}}}{{100}}")]
    return [(a, b)]


def angles(a: str, b: str) -> list[tuple[str, str]]:
    """45 degrees are 45 if the other text says no degrees, and pi/4."""
    if "°" not in a + b:
        return [(a, b)]
    functions = re.compile(r"\\(?:sin|cos|tan|csc|sec|cot)(?![A-Za-z])")
    radians = tuple(
        re.sub(r"([0-9.]+|\)|[A-Za-z])\s*°", r"(\1 \\cdot \\frac{\\pi}{180})", x).replace("°", r"\cdot\frac{\pi}{180}")
        for x in (a, b)
    )
    return [radians] if functions.search(a + b) else [tuple(x.replace("°", "") for x in (a, b)), radians]


def another_form(text: str) -> str:
    """The same answer written otherwise, for Grader.gradable."""
    text = re.sub(r"\\[dt]?frac(?![A-Za-z])", r"\\dfrac", clean(text))
    return r"\displaystyle " + re.sub(r"(?<![\^_{eE])([-+=])", r" \1 ", text)
