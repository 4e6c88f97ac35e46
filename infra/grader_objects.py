# docs/grader.md
r"""Whether two texts are the same answer: math-verify's grammar reads them, their kinds and values are compared.

What has no values to compare, sets without end points and systems of equations, is left to math-verify's verify().
"""

from contextlib import suppress
from functools import lru_cache

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from mpmath import mp

from infra.grader_values import SCREEN, TooLarge, Undefined, Unknown, defined, inexact, names_in, points, same_expression

# units=False: it takes the h of \pi r^2 h for hours; lowercase_symbols=False: R - r is not 0
NORMALIZATION = NormalizationConfig(True, units=False, malformed_operators=True, nits=True, boxed="none")
READING = {"is_real": True, "normalization_config": None, "conversion_config": ConversionConfig(lowercase_symbols=False)}


@lru_cache(1000)
def parsed(latex: str):
    """The whole text as a sympy object, never the one number that can be read somewhere inside it; None if it is none."""
    try:
        return latex2sympy(normalize_latex(latex, NORMALIZATION), **READING)
    except Exception:
        return None


def all_of(verdicts) -> bool | None:
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def same_in_order(a, b) -> bool | None:
    return all_of(same(x, y) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else False


def same_in_any_order(a, b) -> bool | None:
    if len(a) != len(b):
        return False
    left = list(b)
    for x in a:
        verdicts = [same(x, y) for y in left]
        if True not in verdicts:
            return None if None in verdicts else False
        left.pop(verdicts.index(True))
    return True


def same_relation(a, b) -> bool | None:
    """Two equations or inequalities that differ by a constant factor. An assignment is its name and its value."""
    turned = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    sides = [(r.rhs, r.lhs) if type(r) in turned else (r.lhs, r.rhs) for r in (a, b)]
    kinds = [turned.get(type(r), type(r)) for r in (a, b)]
    if kinds[0] is not kinds[1]:
        return False
    if not all(isinstance(s, sympy.Expr) for pair in sides for s in pair) or a.lhs == b.lhs:
        return same_in_order(sides[0], sides[1]) if a.lhs == b.lhs else None
    if kinds[0] is sympy.Eq and all(r.lhs.is_Symbol and not r.rhs.free_symbols for r in (a, b)):
        return False  # x = 5 and y = 5
    f, g = (left - right for left, right in sides)
    ratios, gaps = [], []
    try:
        with mp.workdps(SCREEN):
            for at in points(names_in(f, g), 6):
                with suppress(Undefined):
                    u, v = inexact(defined(f, at)), inexact(defined(g, at))
                    if v:
                        ratios.append(u / v)
                        gaps.append(abs(u - v))
            if len(ratios) >= 3 and all(abs(r - ratios[0]) < mp.mpf(10) ** -40 * abs(r) for r in ratios):
                return bool(kinds[0] in (sympy.Eq, sympy.Ne) or mp.re(ratios[0]) > 0)
            return False if gaps and max(gaps) < 1e-4 else None  # math-verify would call it zero
    except (Unknown, TooLarge):
        return None


def items(x) -> tuple | None:
    """Members of a list, tuple or open interval in the order in which they were written."""
    if isinstance(x, sympy.Interval) and x.left_open and x.right_open:
        return x.start, x.end
    if isinstance(x, sympy.FiniteSet):
        return tuple(getattr(x, "_unsorted_args", x.args))
    return tuple(x) if isinstance(x, sympy.Tuple) else None


def same(a, b) -> bool | None:
    """Whether two sympy objects are the same answer; None where math-verify shall say."""
    a, b = (x.args[0] if isinstance(x, sympy.FiniteSet) and len(x) == 1 else x for x in (a, b))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return same_in_order(list(a), list(b)) if a.shape == b.shape else False
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return None if isinstance(a, sympy.MatrixExpr) or isinstance(b, sympy.MatrixExpr) else same_expression(a, b)
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return same_in_any_order(a.args, b.args)
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return same_in_order((a.start, a.end), (b.start, b.end)) if ends else False
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple) and all(x.is_Relational for x in (*a, *b)):
        return same_in_any_order(a, b)  # p = 5, q = 2
    if items(a) and items(b):
        return same_in_order(items(a), items(b))
    if isinstance(a, sympy.Union) and isinstance(b, sympy.Union):
        return same_in_any_order(a.args, b.args) or None
    if isinstance(a, sympy.Rel) and isinstance(b, sympy.Rel):
        return same_relation(a, b)
    if isinstance(a, sympy.And) and isinstance(b, sympy.And):
        return same_in_any_order(a.args, b.args) or None
    for x, y in ((a, b), (b, a)):
        if isinstance(x, sympy.Expr) and (items(y) or isinstance(y, sympy.Interval)):
            return False
        if isinstance(x, sympy.Expr) and isinstance(y, sympy.Eq | sympy.And):
            return same_as_chain(x, y)
    return None


def same_as_chain(x, chain) -> bool | None:
    """Of 2 + 3 = 5 each side counts if all are equal; of x^2 + y^2 = 25 none does. A name's value never comes here."""
    parts = getattr(chain, "_unsorted_args", (chain,))
    if not all(isinstance(r, sympy.Eq) for r in parts):
        return False
    return all_of([same(r.lhs, r.rhs) is True for r in parts] + [same(x, parts[-1].rhs)])


def judge(reference: str, answer: str, read: bool) -> bool:
    """`read`: the texts must be understood, not only be the same letters."""
    a, b = parsed(reference), parsed(answer)
    if a is None or b is None:
        return not read and a is b and "".join(reference.split()) == "".join(answer.split())
    verdict = same(a, b)
    return bool(verify(a, b, timeout_seconds=None)) if verdict is None else verdict
