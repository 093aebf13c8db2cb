"""Sets the formulas of docstrings as formulas.

A paragraph that is an equation, such as `wₙ = 1 − alpha · tanh(n / timescale)`, becomes LaTeX. Its
sides are read as Python. A form that is not listed here is an error, and ends the build.
"""

from __future__ import annotations

import ast
import re
import unicodedata

from sphinx.application import Sphinx

EQUATION = re.compile(r"(?P<left>\S+) (?P<sign>[=←]) (?P<right>.+?)(?:,? (?P<words>after .+))?")
PYTHON = str.maketrans({"−": "-", "·": "*", "^": "**", "√": "sqrt"})
GREEK = {"alpha", "eta", "gamma", "sigma", "tau"}


def set_formulas(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    texts = ["", *map(str.strip, lines), ""]
    for i, text in enumerate(texts[1:-1]):
        if EQUATION.match(text) and texts[i] == texts[i + 2] == "":
            lines[i] = f".. math:: {as_latex(text)}"


def as_latex(equations: str) -> str:
    """Return the LaTeX of equations, which commas and wide spaces separate."""
    return r" \qquad ".join(map(_equation, re.split(r",\s{2,}", equations)))


def _equation(text: str) -> str:
    found = EQUATION.fullmatch(text)
    if found is None:
        raise ValueError(f"A formula must be an equation, got {text!r}.")
    sign = {"=": "=", "←": r"\leftarrow"}[found["sign"]]
    words = rf" \quad \text{{{found['words']}}}" if found["words"] else ""
    return f"{_side(found['left'])} {sign} {_side(found['right'])}{words}"


def _side(text: str) -> str:
    text = re.sub("[₀-₉₊₋ᵢⱼₙ]+", r"[\g<0>]", text)
    # Compatible characters of subscripts are the plain ones.
    text = unicodedata.normalize("NFKC", text).translate(PYTHON)
    return _latex(ast.parse(text, mode="eval").body)


def _latex(node: ast.expr, *, with_slashes: bool = False) -> str:
    """Return the LaTeX of an expression, with fractions or, for exponents, with slashes."""

    def part(node: ast.expr, *in_brackets: type[ast.operator]) -> str:
        latex = _latex(node, with_slashes=with_slashes)
        is_weaker = isinstance(node, ast.BinOp) and isinstance(node.op, in_brackets)
        return rf"\left({latex}\right)" if is_weaker else latex

    sums, products = (ast.Add, ast.Sub), (ast.Mult, ast.Div)
    match node:
        case ast.Constant(int(number)):
            return str(number)
        case ast.Name(name):
            return _symbol(name)
        case ast.Subscript(ast.Name(name), index):
            return f"{_symbol(name)}_{{{_latex(index)}}}"
        case ast.Call(ast.Name("sqrt"), [argument]):
            return rf"\sqrt{{{_latex(argument)}}}"
        case ast.Call(ast.Name(name), arguments):
            listed = ", ".join(_latex(each, with_slashes=True) for each in arguments)
            return rf"{_symbol(name)}({listed})"
        case ast.UnaryOp(ast.USub(), operand):
            return f"-{part(operand, *sums)}"
        case ast.BinOp(left, ast.Add(), right):
            return f"{part(left)} + {part(right)}"
        case ast.BinOp(left, ast.Sub(), right):
            return f"{part(left)} - {part(right, *sums)}"
        case ast.BinOp(left, ast.Mult(), right):
            return rf"{part(left, *sums)} \cdot {part(right, *sums)}"
        case ast.BinOp(left, ast.Div(), right) if with_slashes:
            return f"{part(left, *sums)} / {part(right, *sums, *products)}"
        case ast.BinOp(left, ast.Div(), right):
            return rf"\frac{{{_latex(left)}}}{{{_latex(right)}}}"
        case ast.BinOp(left, ast.Pow(), right):
            base = part(left, *sums, *products, ast.Pow)
            return f"{base}^{{{_latex(right, with_slashes=True)}}}"
    raise ValueError(f"A formula must have a form that is listed, got {ast.unparse(node)!r}.")


def _symbol(name: str) -> str:
    """Return a letter, a word in upright type, or either with an index, as in sigma_rel."""
    base, _, index = name.partition("_")
    if index and (len(base) == 1 or base in GREEK):
        return f"{_symbol(base)}_{{{_symbol(index)}}}"
    if name in GREEK:
        return rf"\{name}"
    return name if len(name) == 1 else rf"\mathrm{{{name}}}".replace("_", r"\_")
