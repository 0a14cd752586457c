"""Exact arithmetic: what the calculator tool computes and how answers are compared."""

from __future__ import annotations

import ast
import re
from fractions import Fraction

MAX_EXPRESSION = 200

_ALLOWED = re.compile(rf"[0-9.+\-*/() ]{{1,{MAX_EXPRESSION}}}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_NUMBER = re.compile(r"-?\$?(\d+\.?\d*|\.\d+)(/\d+)?")
_FINAL = re.compile(r"####\s*(\S+)")


def calculate(expression: str) -> Fraction:
    """Return the exact value of an expression of `+ - * / ( )` and decimal numbers.

    Raises:
        ValueError: it is anything else, too long, or divides by zero.
    """
    text = _THOUSANDS.sub("", expression).strip()
    if not _ALLOWED.fullmatch(text):
        raise ValueError(f"{expression!r} is not made of numbers, + - * / and parentheses.")
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except SyntaxError:
        raise ValueError(f"{expression!r} is not a complete expression.") from None
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by zero.") from None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            # The digits as written: the parsed constant is a float, which may be near only.
            return Fraction(text[node.col_offset : node.end_col_offset])
        case ast.BinOp(left, ast.Add(), right):
            return _value(left, text) + _value(right, text)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left, text) - _value(right, text)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left, text) * _value(right, text)
        case ast.BinOp(left, ast.Div(), right):
            return _value(left, text) / _value(right, text)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, text)
        case ast.UnaryOp(ast.UAdd(), operand):
            return _value(operand, text)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not arithmetic.")


def format_number(number: Fraction) -> str:
    """Return `number` as an integer or finite decimal if it is one, else as `n/d`."""
    places, rest = 0, number.denominator
    for prime in (2, 5):
        exponent = 0
        while rest % prime == 0:
            rest //= prime
            exponent += 1
        places = max(places, exponent)
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    sign = "-" if number < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}" if places else f"{sign}{digits}"


def parse_number(text: str) -> Fraction | None:
    """Return the number that `text` is (`1,200`, `.5`, `3/4`, `$7`), None if it is none."""
    clean = _THOUSANDS.sub("", text.strip())
    if not _NUMBER.fullmatch(clean):
        return None
    numerator, _, denominator = clean.replace("$", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def final_number(solution: str) -> Fraction | None:
    """Return the number after the last `####`, None if there is none."""
    found = _FINAL.findall(solution)
    return parse_number(found[-1].lstrip("*").rstrip("*.")) if found else None
