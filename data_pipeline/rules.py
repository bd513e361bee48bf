"""What a corpus leaves out: rules on an image's header when it is indexed, and a user's expression over the index."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from cogvit.errors import ConfigError, DataError
from data_pipeline.decode import MAX_PIXELS


@dataclass(frozen=True)
class Rules:
    """What indexing takes of a sample and what it leaves out, beside what it cannot read."""

    min_side_px: int = 8
    max_aspect: float = 6.0  # longer side over shorter, as in CogVLM's data
    max_pixels: int = MAX_PIXELS
    captions: Literal["any", "required"] = "any"
    caption_field: str = ""  # of a json; its `captions` and `caption` if empty
    source_field: str = "source"

    def check_size(self, height_px: int, width_px: int) -> None:
        """Raise DataError with the reason when an image of this size is left out."""
        shorter, longer = sorted((height_px, width_px))
        if shorter < self.min_side_px:
            raise DataError(f"a side is shorter than {self.min_side_px} px")
        if longer > self.max_aspect * shorter:
            raise DataError(f"the aspect ratio is beyond {self.max_aspect:g}")
        if height_px * width_px > self.max_pixels:
            raise DataError(f"more than {self.max_pixels:,} pixels")


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, options: value.isin(options),
    ast.NotIn: lambda value, options: ~value.isin(options),
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Not: operator.invert,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def read_rule(text: str, columns: tuple[str, ...]) -> pc.Expression:
    """Return a user's rule as an expression over columns of the index.

    Comparisons, arithmetic, `and`, `or`, `not` and `in`, as in
    `width_px * height_px >= 50000 and source not in ("ads", "memes")`.
    Errors: ConfigError names what is not understood.
    """
    try:
        rule = _translate(ast.parse(text.strip(), mode="eval").body, columns)
    except SyntaxError as error:
        raise ConfigError(f"--data.where {text!r} is no expression: {error.msg}") from None
    except (TypeError, ArithmeticError, UnicodeError, pa.ArrowException):  # 1 < 'a', 1 / 0, 10^20, half a surrogate
        rule = None
    if not isinstance(rule, pc.Expression):
        raise ConfigError(f"--data.where {text!r} does not compare columns; they are {', '.join(columns)}")
    return rule


def _translate(node: ast.expr, columns: tuple[str, ...]) -> Any:
    match node:
        case ast.Name(id=name) if name in columns:
            return pc.field(name)
        case ast.Constant(value=value) if isinstance(value, (bool, int, float, str)):
            return value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return [_translate(part, columns) for part in parts]
        case ast.BoolOp(op=how, values=parts):
            first, *rest = (_translate(part, columns) for part in parts)
            for part in rest:
                first = _OPERATORS[type(how)](first, part)
            return first
        case ast.UnaryOp(op=how, operand=part) if type(how) in _OPERATORS:
            return _OPERATORS[type(how)](_translate(part, columns))
        case ast.BinOp(left=one, op=how, right=other) if type(how) in _OPERATORS:
            return _OPERATORS[type(how)](_translate(one, columns), _translate(other, columns))
        case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[ast.Constant() as single]):
            told = ast.unparse(single)  # Python would look for its letters
            raise ConfigError(f"--data.where looks in {told}, which is no list; write ({told},)")
        case ast.Compare(left=one, ops=[how], comparators=[other]) if type(how) in _OPERATORS:
            return _OPERATORS[type(how)](_translate(one, columns), _translate(other, columns))
    raise ConfigError(f"--data.where does not understand {ast.unparse(node)!r}; columns are {', '.join(columns)}")
