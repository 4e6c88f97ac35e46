# docs/grader.md
r"""Whether two sympy expressions have the same value: exactly where it is rational, to 1,000 digits where it is not.

math-verify takes numbers for equal whose difference is small in absolute terms, 3e-17 and 2e-17 for example. Expressions
with symbols are evaluated at several points, of both signs.
"""

import math
import random
from contextlib import suppress
from fractions import Fraction

import mpmath
import sympy
from mpmath import mp

BITS = 300_000  # of an exact fraction: (x+1)^100000 goes to simplify() instead
DIGITS = 1000  # 2^2024 has 610
SCREEN = 60  # digits enough to tell most wrong answers
LEFT_THE_REALS = 0  # beside the symbols' values: a root or logarithm of a negative number was taken


class TooLarge(Exception):
    pass


class Unknown(Exception):
    pass


class Undefined(Exception):
    pass


# ------------------------------------------------------------------------------------------------------------- numbers


def inexact(x):
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def bounded(x):
    if isinstance(x, Fraction) and x.numerator.bit_length() + x.denominator.bit_length() > BITS:
        raise TooLarge
    return x


def small(x, bits: int = 40):
    """x, whose exponential can be taken."""
    if not mp.isfinite(x) or (x and mp.mag(x) > bits):
        raise TooLarge
    return x


def product(factors):
    exact, rest = Fraction(1), None
    for x in factors:
        if isinstance(x, Fraction):
            exact = bounded(exact * x)
        else:
            rest = x if rest is None else rest * x
    return exact if rest is None or (exact == 0 and mp.isfinite(rest)) else inexact(exact) * rest


def total(terms):
    exact, rest = Fraction(0), None
    for x in terms:
        if isinstance(x, Fraction):
            exact = bounded(exact + x)
        else:
            rest = x if rest is None else rest + x
    return exact if rest is None else inexact(exact) + rest


def power(base, exponent):
    """The real root where there is one: of -8 the third is -2."""
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        n = exponent.numerator
        if isinstance(base, Fraction):
            if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(n) > BITS:
                raise TooLarge
            return base**n
        return base ** int(small(mp.mpf(n)))
    negative = isinstance(base, Fraction) and base < 0 and isinstance(exponent, Fraction) and exponent.denominator % 2
    sign = -1 if negative and exponent.numerator % 2 else 1
    base, exponent = inexact(abs(base) if negative else base), inexact(exponent)
    if base == 0 and mp.re(exponent) < 0:
        raise ZeroDivisionError
    if base and abs(mp.mag(base)) + abs(mp.mag(exponent)) > 10_000_000:
        raise TooLarge
    return sign * base ** small(exponent, 24)


def factorial(x):
    if isinstance(x, Fraction) and x.denominator == 1:
        if x < 0:
            raise ZeroDivisionError
        if x > 20_000:
            raise TooLarge
        return Fraction(math.factorial(x.numerator))
    return mp.gamma(small(inexact(x), 14) + 1)


def binomial(n, k):
    if all(isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 20_000 for x in (n, k)):
        return Fraction(math.comb(n.numerator, k.numerator))
    return mp.binomial(small(inexact(n), 14), small(inexact(k), 14))


def logarithm(x, base=None):
    return mp.log(inexact(x)) if base is None else mp.log(inexact(x)) / mp.log(inexact(base))


def rounded(function):
    name = function.__name__
    return lambda x: Fraction(function(x) if isinstance(x, Fraction) else int(getattr(mp, name)(mp.re(small(x, 4000)))))


BY_NAME = {
    "Pow": power,
    "factorial": factorial, "binomial": binomial, "log": logarithm, "Abs": abs, "UnevaluatedExpr": lambda x: x,
    "exp": lambda x: mp.exp(small(inexact(x), 24)), "gamma": lambda x: factorial(x - 1) if x != 0 else 1 / Fraction(0),
    "floor": rounded(math.floor), "ceiling": rounded(math.ceil), "Mod": lambda a, b: a - b * rounded(math.floor)(a / b),
    "Max": lambda *xs: max(xs, key=inexact), "Min": lambda *xs: min(xs, key=inexact),
}  # fmt: skip
COUNTING = (sympy.factorial, sympy.binomial, sympy.gamma)
OF_MPMATH = "sin cos tan csc sec cot asin acos atan acsc asec acot sinh cosh tanh asinh acosh atanh".split()


def value(e, at: dict):
    """Fraction, mpf or mpc of an expression whose symbols have the values `at`, at mpmath's present precision."""
    if e.is_Rational:
        return Fraction(int(e.p), int(e.q))
    if e.is_Float:
        small(e._mpf_ and mp.mpf(e), 4000)
        return Fraction(str(e))
    if e.is_Symbol:
        return at[e.name]
    if e.is_Add:
        return total(value(x, at) for x in e.args)
    if e.is_Mul:
        return product(value(x, at) for x in e.args)
    constants = {sympy.pi: mp.pi, sympy.E: mp.e, sympy.I: mp.mpc(0, 1), sympy.oo: mp.inf, -sympy.oo: -mp.inf}
    if e in constants:
        return +constants[e]
    name = type(e).__name__
    if name not in BY_NAME and name not in OF_MPMATH:
        raise Unknown
    arguments = [value(x, at) for x in e.args]
    if name in BY_NAME:
        x = bounded(BY_NAME[name](*arguments))
    else:
        x = getattr(mp, name)(small(inexact(arguments[0]), 4000))
    if isinstance(x, mpmath.mpc) and not any(isinstance(a, mpmath.mpc) for a in arguments):
        at[LEFT_THE_REALS] = True
    return x


def defined(e, at: dict):
    try:
        x = value(e, at)
    except (ZeroDivisionError, ValueError, mpmath.libmp.NoConvergence) as error:
        raise Undefined from error
    if not isinstance(x, Fraction) and mp.isnan(x):
        raise Undefined
    return x


def same_at(x, y, at: dict, digits: int = DIGITS) -> bool:
    """Whether the values agree at one point, relative to their size."""
    gaps = []
    for digits_now in (SCREEN, digits, 2 * digits):
        with mp.workdps(digits_now):
            u, v = defined(x, at), defined(y, at)
            if isinstance(u, Fraction) and isinstance(v, Fraction) or u == v:
                return u == v
            u, v = inexact(u), inexact(v)
            if not (mp.isfinite(u) and mp.isfinite(v)):
                return False
            size, tiny = max(abs(u), abs(v)), mp.mpf(10) ** (-digits_now * 9 // 10)
            gaps.append(abs(u - v))
            if len(gaps) == 1:
                if gaps[0] > size / 1000 and size > mp.mpf(10) ** (-SCREEN // 2):
                    return False
            elif gaps[-1] <= tiny * size:
                return True
            elif gaps[-1] > tiny:
                return False
    return gaps[2] < gaps[1] * mp.mpf(10) ** (
        -digits // 2
    )  # rounding of a zero shrinks with the precision, a tiny value not


def is_real(x) -> bool:
    return isinstance(x, Fraction | mpmath.mpf) or abs(mp.im(x)) <= abs(x) * mp.mpf(10) ** (-SCREEN // 2)


def points(names: list[str], count: int, whole: bool = False):
    """Values for the symbols: of both signs, below and above 1, the same for the same names; `whole`: integers above 2."""
    for k in range(count):
        rng = random.Random(k)
        signs = (1, 1, -1, -1, 1, 0)[k % 6]
        scale = (1, 4, 1, 4, 9, 3)[k % 6]
        if whole:
            yield {n: Fraction(rng.randrange(3, 40)) for n in names}
            continue
        yield {n: Fraction(rng.randrange(13, 97), 101) * scale * (signs or rng.choice([-1, 1])) for n in names}


def names_in(*expressions) -> list[str]:
    return sorted({s.name for e in expressions for s in e.free_symbols})


def written_decimal(e) -> tuple[Fraction, Fraction] | None:
    """Value and last place of a decimal as it was written, 2.31 or 2.31 x 10^-3; None for another expression."""
    scale, number = Fraction(1), None
    for x in e.args if e.is_Mul else (e,):
        if x.is_Float and number is None:
            number = value(x, {})
        elif x == -1:
            scale = -scale
        elif x.is_Pow and x.base == 10 and x.exp.is_Integer and abs(x.exp) <= 400:
            scale *= Fraction(10) ** int(x.exp)
        else:
            return None
    if number is None:
        return None
    places = 0
    while (number * 10**places).denominator != 1:
        places += 1
    return number * scale, abs(scale) / 10**places


def same_decimal(decimal: tuple[Fraction, Fraction], e) -> bool:
    """0.333333 is 1/3: the value rounded or cut at the last place, six places or more and five digits or more."""
    number, place = decimal
    with mp.workdps(SCREEN):
        x = defined(e, {})
        if not is_real(x) or not mp.isfinite(mp.re(inexact(x))):
            return False
        x = x if isinstance(x, Fraction) else mp.re(x)
        gap = abs(number - x) if isinstance(x, Fraction) else abs(inexact(number) - x)
        size, place = (abs(x), place) if isinstance(x, Fraction) else (abs(x), inexact(place))
        return bool(gap < place and (gap * 10**6 <= 1 or gap * 10**9 <= size) and gap * 10**6 <= 5 * size)


def same_value(x, y) -> bool | None:
    """Of two expressions; None if they cannot be evaluated."""
    names = names_in(x, y)
    digits = 2 * SCREEN if x.has(*COUNTING) or y.has(*COUNTING) else DIGITS  # gamma(1/3) to 1,000 digits takes seconds
    if not names:
        decimals = written_decimal(x), written_decimal(y)
        try:
            if (decimals[0] is None) != (decimals[1] is None):
                other = y if decimals[0] else x
                return same_at(x, y, {}, digits) or same_decimal(decimals[0] or decimals[1], other)
            return same_at(x, y, {}, digits)
        except Undefined:
            return False
        except Unknown:
            return None
    complex_allowed = x.has(sympy.I) or y.has(sympy.I)
    agreed = 0
    counting = x.has(*COUNTING) or y.has(*COUNTING)  # n! and binomials speak of whole n
    for at in points(names, 12, counting):
        try:
            with mp.workdps(SCREEN):
                real = is_real(defined(x, at)), is_real(defined(y, at))
            if not complex_allowed and real != (True, True):
                if any(real):
                    return False
            elif complex_allowed or LEFT_THE_REALS not in at:  # at -1, \sqrt x \sqrt x is a matter of taste
                if not same_at(x, y, at, SCREEN if agreed else digits):
                    return False
                agreed += 1
                if agreed == 4:
                    return True
        except Undefined:
            pass
        except Unknown:
            return None
    return True if agreed else None


def same_expression(x, y) -> bool:
    """By value; sums, integrals and limits worked out first; what still has no value, by algebra."""
    with suppress(TooLarge):
        verdict = same_value(x, y)
        if verdict is None:
            verdict = same_value(x.doit(), y.doit())
        if verdict is not None:
            return verdict
    return bool(sympy.simplify(x - y) == 0)
