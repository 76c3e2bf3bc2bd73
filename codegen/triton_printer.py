"""Expressions of the IR as Triton source text.

The closed vocabulary of `rewrite.ir.expression` is a table here: one row per operator. Symbols and tensors are printed through a table
of names, so that the same score reads ``i[:, None]`` inside a tile and ``i`` where only rows are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from rewrite.ir.errors import RewriteError
from rewrite.ir.semantics import without_fractions

Names = Mapping[str, str]


def _integer_quotient(numerator: sympy.Expr, denominator: sympy.Expr, names: Names) -> str:
    """floor(n / d) for d > 0. Triton's ``//`` truncates as C does, so that a numerator which may be negative is corrected by one."""
    top, bottom = _atom(numerator, names), _atom(denominator, names)
    truncated = f"{top} // {bottom}"
    return f"({truncated})" if numerator.is_nonnegative else f"({truncated} - tl.where({top} % {bottom} < 0, 1, 0))"


def _floor(expression: sympy.Expr, names: Names) -> str:
    numerator, denominator = sympy.fraction(sympy.together(expression.args[0]))
    if not (numerator.is_integer and denominator.is_integer and denominator.is_positive):
        raise RewriteError(f"floor of {expression.args[0]} is not an integer quotient; write it as floor(x / n) with integers x and n > 0")
    return _atom(numerator, names) if denominator == 1 else _integer_quotient(numerator, denominator, names)


def _mod(expression: sympy.Expr, names: Names) -> str:
    """The non-negative remainder. Triton's ``%`` takes the sign of its left side, so that one that may be negative is shifted."""
    left, right = expression.args
    if not right.is_positive:
        raise RewriteError(f"{expression} has a divisor that is not known to be positive; take the remainder by a positive number")
    remainder = f"{_atom(left, names)} % {_atom(right, names)}"
    return f"({remainder})" if left.is_nonnegative else f"(({remainder} + {_atom(right, names)}) % {_atom(right, names)})"


def _add(expression: sympy.Expr, names: Names) -> str:
    first, *rest = expression.as_ordered_terms()
    text = _print(first, names)
    for term in rest:
        negative = term.could_extract_minus_sign()
        text += f" - {_atom(-term, names)}" if negative else f" + {_print(term, names)}"
    return text


def _mul(expression: sympy.Expr, names: Names) -> str:
    above: list[sympy.Basic] = []
    below: list[sympy.Basic] = []
    for factor in expression.as_ordered_factors():
        if isinstance(factor, sympy.Pow) and factor.exp.is_negative and factor.exp.is_number:
            below.append(sympy.Pow(factor.base, -factor.exp))
        elif isinstance(factor, sympy.Rational) and factor.q != 1:
            above += [sympy.Integer(factor.p)] if factor.p != 1 else []
            below.append(sympy.Integer(factor.q))
        else:
            above.append(factor)
    text = " * ".join(_atom(factor, names) for factor in above) or "1.0"
    return text + "".join(f" / {_atom(factor, names)}" for factor in below)


def _pow(expression: sympy.Expr, names: Names) -> str:
    base, exponent = expression.args
    text = _atom(base, names)
    # Beyond the fifth power (the slope of 1 / x^4) a chain of products is no longer what a reader would write.
    if exponent.is_Integer and 1 < abs(int(exponent)) <= 5:
        product = " * ".join([text] * abs(int(exponent)))
        return product if exponent > 0 else f"1.0 / ({product})"
    if exponent == -1:
        return f"1.0 / {text}"
    # x^(n + 1/2), such as the slope of 1 / sqrt(x).
    whole = abs(exponent) - sympy.Rational(1, 2)
    if whole.is_Integer and 0 <= whole <= 2:
        product = " * ".join([f"tl.sqrt({_print(base, names)} * 1.0)", *[text] * int(whole)])
        return product if exponent > 0 else f"1.0 / ({product})" if whole else f"1.0 / {product}"
    if base.is_positive:
        return f"tl.exp2({_atom(exponent, names)} * tl.log2({text} * 1.0))"
    raise RewriteError(f"{expression} has no Triton form: only powers -5..5, square roots and powers of a positive base are printed")


def _call(function: str) -> Callable[[sympy.Basic, Names], str]:
    return lambda expression, names: f"{function}({', '.join(_print(argument, names) for argument in expression.args)})"


def _real(function: str) -> Callable[[sympy.Basic, Names], str]:
    """A call of a function of floating point; Triton refuses it integers such as positions."""

    def call(expression: sympy.Basic, names: Names) -> str:
        (argument,) = expression.args
        if expression.is_number:
            return repr(float(expression))
        return f"{function}({_atom(argument, names)} * 1.0)" if argument.is_integer else f"{function}({_print(argument, names)})"

    return call


def _folded(function: str) -> Callable[[sympy.Basic, Names], str]:
    """A two-argument Triton function over any number of arguments."""

    def fold(expression: sympy.Basic, names: Names) -> str:
        first, *rest = (_print(argument, names) for argument in expression.args)
        for argument in rest:
            first = f"{function}({first}, {argument})"
        return first

    return fold


def _comparison(operator: str) -> Callable[[sympy.Rel, Names], str]:
    """A comparison of fractions of positions is written as one of integers: floating point would round it."""

    def compare(expression: sympy.Rel, names: Names) -> str:
        exact = without_fractions(expression)
        return _infix(operator)(exact, names) if isinstance(exact, sympy.Rel) else _print(exact, names)

    return compare


def _infix(operator: str) -> Callable[[sympy.Basic, Names], str]:
    return lambda expression, names: f" {operator} ".join(_atom(argument, names) for argument in expression.args)


def _piecewise(expression: sympy.Piecewise, names: Names) -> str:
    """Nested ``tl.where``; a last piece without an `otherwise` covers all that is left, by the vocabulary's convention."""
    *leading, (last, _) = expression.args
    text = _print(last, names)
    for value, condition in reversed(leading):
        text = f"tl.where({_print(condition, names)}, {_print(value, names)}, {text})"
    return text


def _either(expression: sympy.Basic, names: Names) -> str:
    condition, yes, no = (_atom(argument, names) for argument in expression.args)
    return f"({condition} & {yes}) | (~{condition} & {no})"


# One row per operator of the vocabulary: sympy class name -> its text.
_PRINT: Mapping[str, Callable[..., str]] = {
    "Add": _add,
    "Mul": _mul,
    "Pow": _pow,
    "Mod": _mod,
    "floor": _floor,
    "Min": _folded("tl.minimum"),
    "Max": _folded("tl.maximum"),
    "Abs": _call("tl.abs"),
    "exp": _real("tl.exp"),
    "log": _real("tl.log"),
    # tl has no tanh that every target (and the interpreter) knows; this form neither overflows nor turns NaN for any argument.
    "tanh": lambda expression, names: f"(2.0 * tl.sigmoid(2.0 * {_atom(expression.args[0], names)}) - 1.0)",
    "Sigmoid": _real("tl.sigmoid"),
    "Equality": _comparison("=="),
    "Unequality": _comparison("!="),
    "LessThan": _comparison("<="),
    "StrictLessThan": _comparison("<"),
    "GreaterThan": _comparison(">="),
    "StrictGreaterThan": _comparison(">"),
    "And": _infix("&"),
    "Or": _infix("|"),
    "Not": lambda expression, names: f"~{_atom(expression.args[0], names)}",
    "ITE": _either,
    "Piecewise": _piecewise,
}

# What prints as a call, a name or a parenthesis needs no parentheses of its own.
_CLOSED = {"Mod", "floor", "Min", "Max", "Abs", "exp", "log", "tanh", "Sigmoid", "Piecewise"}


def _atom(expression: sympy.Basic, names: Names) -> str:
    text = _print(expression, names)
    simple = expression.is_Symbol or isinstance(expression, sympy.Indexed) or type(expression).__name__ in _CLOSED
    return text if simple or text.replace(".", "", 1).isalnum() else f"({text})"


def _name(name: str, names: Names) -> str:
    if name not in names:
        raise RewriteError(f"{name} cannot be read in this part of a kernel; it may use {', '.join(sorted(names))}")
    return names[name]


def _print(expression: sympy.Basic, names: Names) -> str:
    if isinstance(expression, BooleanTrue | BooleanFalse):
        return str(bool(expression))
    if isinstance(expression, sympy.Integer):
        return str(int(expression))
    if isinstance(expression, sympy.Rational | sympy.Float):
        return repr(float(expression))
    if expression is sympy.oo or expression is -sympy.oo:
        return f'float("{"-" if expression is -sympy.oo else ""}inf")'
    if isinstance(expression, sympy.Symbol):
        return _name(expression.name, names)
    if isinstance(expression, sympy.Indexed):
        return _name(str(expression.base.label), names)
    kind = type(expression).__name__
    if kind not in _PRINT:
        raise RewriteError(f"{kind} has no Triton form (in {expression}); use the operators of rewrite.ir.expression")
    return _PRINT[kind](expression, names)


def triton_text(expression: sympy.Basic, names: Names) -> str:
    """The expression as Triton source.

    names: what each symbol ("qk", "i", "Nq", "mass_text" and so on) and each tensor prints as, for example ``{"i": "i[:, None]"}``.
    Raises `RewriteError` for an operator or a name that has no text here.
    """
    return _print(expression, names)
