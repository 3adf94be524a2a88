"""A condition on index columns, as text: `height >= 128 and source == "lup" and not (pid in [-1, 0])`.

The text is parsed into Python's syntax tree and never run: only the constructs below are known.

    columns, numbers, "text", true, false, null        + - * /
    == != < <= > >=, also chained: 1.5 < height / width < 4
    in [...], not in [...]                             and, or, not, ( )

`column == null` holds where the column is empty; every other comparison with an empty value does not hold.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute

from datapipe.core.errors import ConfigError

Compute = Callable[..., Any]
COMPARED: Mapping[type, Compute] = {
    ast.Eq: pyarrow.compute.equal,
    ast.NotEq: pyarrow.compute.not_equal,
    ast.Lt: pyarrow.compute.less,
    ast.LtE: pyarrow.compute.less_equal,
    ast.Gt: pyarrow.compute.greater,
    ast.GtE: pyarrow.compute.greater_equal,
}
ARITHMETIC: Mapping[type, Compute] = {
    ast.Add: pyarrow.compute.add,
    ast.Sub: pyarrow.compute.subtract,
    ast.Mult: pyarrow.compute.multiply,
    ast.Div: lambda left, right: pyarrow.compute.divide(_real(left), _real(right)),
}
CONSTANTS = {"true": True, "false": False, "null": None}
EXAMPLE = """for example --where 'height >= 128 and source == "lup"'"""


class Expression:
    """A parsed condition; `columns` are those it speaks of. Raises ConfigError for anything it does not know."""

    def __init__(self, text: str, known: Sequence[str]) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            names = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refused(f"cannot be read: {getattr(error, 'msg', error)}") from error
        self.columns = sorted(names - set(CONSTANTS))
        unknown = [name for name in self.columns if name not in known]
        if unknown:
            raise self._refused(f"names no column: {', '.join(unknown)}; there are {', '.join(known)}")
        if not self.columns:
            raise self._refused("speaks of no column")

    def holds(self, table: pyarrow.Table) -> pyarrow.ChunkedArray:
        """Boolean per row of a table that has `columns`; never null."""
        try:
            truth = self._truth(self._tree, table)
            return pyarrow.compute.fill_null(truth, False)
        except (pyarrow.ArrowException, TypeError, RecursionError) as error:
            raise self._refused(f"does not fit the columns: {str(error).splitlines()[0]}") from error

    def _truth(self, node: ast.expr, table: pyarrow.Table) -> Any:
        """A part of the text that is true or false for each row."""
        match node:
            case ast.BoolOp(op=operator, values=values):
                join = pyarrow.compute.and_ if isinstance(operator, ast.And) else pyarrow.compute.or_
                return _joined([self._truth(value, table) for value in values], join)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pyarrow.compute.invert(self._truth(operand, table))
            case ast.Compare(left=left, ops=operators, comparators=others):
                pairs = zip([left, *others], operators, others, strict=False)
                compared = [self._compared(one, operator, other, table) for one, operator, other in pairs]
                return _joined(compared, pyarrow.compute.and_)
            case ast.Name(id=name) if name in table.column_names and pyarrow.types.is_boolean(table[name].type):
                return table[name]
        raise self._refused(f"has no yes or no in `{ast.unparse(node)}`")

    def _compared(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, table: pyarrow.Table) -> Any:
        value = self._value(left, table)
        if isinstance(operator, ast.In | ast.NotIn):
            member = pyarrow.compute.is_in(value, value_set=self._listed(right, value.type))
            return member if isinstance(operator, ast.In) else pyarrow.compute.invert(member)
        other = self._value(right, table)
        if other is None and isinstance(operator, ast.Eq | ast.NotEq):
            empty = pyarrow.compute.is_null(value)
            return empty if isinstance(operator, ast.Eq) else pyarrow.compute.invert(empty)
        if type(operator) not in COMPARED or other is None or value is None:
            raise self._refused(f"has a comparison that is not known: `{ast.unparse(left)} ... {ast.unparse(right)}`")
        return pyarrow.compute.fill_null(COMPARED[type(operator)](value, other), False)

    def _value(self, node: ast.expr, table: pyarrow.Table) -> Any:
        """A part of the text that is a number or text: one for each row, or the same for all."""
        match node:
            case ast.Name(id=name) if name in CONSTANTS:
                constant = CONSTANTS[name]
                return None if constant is None else pyarrow.scalar(constant)
            case ast.Name(id=name):
                return table[name]
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pyarrow.scalar(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pyarrow.compute.negate(self._value(operand, table))
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
                return ARITHMETIC[type(operator)](self._value(left, table), self._value(right, table))
        raise self._refused(f"has something that is not known: `{ast.unparse(node)}`")

    def _listed(self, node: ast.expr, kind: pyarrow.DataType) -> pyarrow.Array:
        fixed = all(not isinstance(part, ast.Name) or part.id in CONSTANTS for part in ast.walk(node))
        if not isinstance(node, ast.List | ast.Tuple) or not fixed:
            raise self._refused(f"wants a list of fixed values [...] after `in`, not `{ast.unparse(node)}`")
        values = [self._value(item, pyarrow.table({})) for item in node.elts]
        return pyarrow.array([None if value is None else value.as_py() for value in values], kind)

    def _refused(self, what: str) -> ConfigError:
        return ConfigError(f"the condition {what}", where=self.text, hint=EXAMPLE)


def _joined(parts: list[Any], join: Compute) -> Any:
    joined = parts[0]
    for part in parts[1:]:
        joined = join(joined, part)
    return joined


def _real(value: Any) -> Any:
    """Columns of whole numbers divide like real ones."""
    return pyarrow.compute.cast(value, pyarrow.float64())
