"""Parser and evaluation of Select expressions.

A predicate over one attribute is compared with each value of the attribute separately. For example, `k = 'a' and k =
'b'` matches no item, and `k = 'a' intersection k = 'b'` matches an item that has both values. All comparisons are of
bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

MAX_COMPARISONS = 20
MAX_ATTRIBUTES = 20
MAX_LIMIT = 2500
DEFAULT_LIMIT = 100
NAME = "itemName()"
_RESERVED = frozenset(
    [
        "or",
        "and",
        "not",
        "from",
        "where",
        "select",
        "like",
        "null",
        "is",
        "order",
        "by",
        "asc",
        "desc",
        "in",
        "between",
        "intersection",
        "limit",
        "every",
    ]
)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^']|'')*'|"(?:[^"]|"")*")|(?P<quoted>`(?:[^`]|``)+`)"""
    r"""|(?P<word>[A-Za-z_$][A-Za-z0-9_$]*)|(?P<number>[0-9]+)|(?P<sign>!=|>=|<=|[=<>(),*]))"""
)

Item = Mapping[str, frozenset[str]]
Values = frozenset[str]


class SelectError(Exception):
    """An error in a Select expression. `code` is SimpleDB's error code."""

    def __init__(self, message: str, code: str = "InvalidQueryExpression") -> None:
        super().__init__(message)
        self.code = code


# --- Parts of a where-clause ----------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A comparison of one attribute with one operator. The attribute NAME stands for the item's name."""

    attribute: str
    every: bool
    operator: str
    values: tuple[str, ...]

    def holds(self, value: str) -> bool:
        """Return whether one value satisfies the comparison. The operator `is null` is not supported here."""
        key = value.encode()
        given = [v.encode() for v in self.values]
        simple: dict[str, Callable[[], bool]] = {
            "=": lambda: key == given[0],
            "!=": lambda: key != given[0],
            ">": lambda: key > given[0],
            ">=": lambda: key >= given[0],
            "<": lambda: key < given[0],
            "<=": lambda: key <= given[0],
            "between": lambda: given[0] <= key <= given[1],
            "in": lambda: key in given,
            "like": lambda: _like(value, self.values[0]),
            "not like": lambda: not _like(value, self.values[0]),
            "is not null": lambda: True,
            "is null": lambda: False,
        }
        return simple[self.operator]()


@dataclass(frozen=True)
class Joined:
    """Two conditions joined by `operator`: and, or, or intersection. The operator not applies to `left` alone."""

    operator: str
    left: Node
    right: Node | None = None


Node = Comparison | Joined


def comparisons(node: Node | None) -> Iterator[Comparison]:
    """Return all comparisons of a condition, from left to right."""
    if isinstance(node, Comparison):
        yield node
    elif node:
        yield from comparisons(node.left)
        yield from comparisons(node.right)


def _like(value: str, pattern: str) -> bool:
    starts, ends = pattern.startswith("%"), _ends_wild(pattern)
    text = pattern[starts : len(pattern) - (ends and len(pattern) > starts)]
    text = text.replace("\\%", "%").replace("\\\\", "\\")
    if starts and ends:
        return text in value
    if starts:
        return value.endswith(text)
    return value.startswith(text) if ends else value == text


def _ends_wild(pattern: str) -> bool:
    return pattern.endswith("%") and not pattern.endswith("\\%")


def _is_one_predicate(node: Node) -> bool:
    """Return whether a condition is about one attribute only, so that one value must satisfy all of it."""
    found = list(comparisons(node))
    return (
        len({c.attribute for c in found}) == 1
        and not any(c.every or c.operator == "is null" for c in found)
        and not _has(node, "intersection")
    )


def _has(node: Node | None, operator: str) -> bool:
    if not isinstance(node, Joined):
        return False
    return node.operator == operator or _has(node.left, operator) or _has(node.right, operator)


def matches(node: Node | None, name: str, item: Item) -> bool:
    """Return whether the condition holds for the item of that name."""
    if node is None:
        return True
    if isinstance(node, Comparison):
        return _compares(node, _values(node.attribute, name, item))
    if node.operator == "not":
        return not matches(node.left, name, item)
    assert node.right is not None
    if _is_one_predicate(node):
        attribute = next(comparisons(node)).attribute
        return any(_fits(node, value) for value in _values(attribute, name, item))
    if node.operator == "or":
        return matches(node.left, name, item) or matches(node.right, name, item)
    return matches(node.left, name, item) and matches(node.right, name, item)


def _values(attribute: str, name: str, item: Item) -> Values:
    return frozenset((name,)) if attribute == NAME else item.get(attribute, frozenset())


def _compares(one: Comparison, values: Values) -> bool:
    if one.operator == "is null":
        return not values
    if one.every:
        return bool(values) and all(one.holds(value) for value in values)
    return any(one.holds(value) for value in values)


def _fits(node: Node | None, value: str) -> bool:
    if isinstance(node, Comparison):
        return node.holds(value)
    assert node is not None
    if node.operator == "not":
        return not _fits(node.left, value)
    both = _fits(node.left, value), _fits(node.right, value)
    return any(both) if node.operator == "or" else all(both)


# --- The whole expression -------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A parsed Select expression. `output` is None for all attributes, and () for the names alone. `counts` is true for
    count(*)."""

    domain: str
    output: tuple[str, ...] | None
    counts: bool
    where: Node | None
    order: str | None
    descending: bool
    limit: int | None

    @property
    def fingerprint(self) -> str:
        """Return the parts of a query that must equal those of the query that returned a NextToken."""
        return repr((self.domain, self.where, self.order, self.descending))


def parse(text: str) -> Query:
    """Parse a Select expression. Raise SelectError with the service's code if the service would reject the
    expression."""
    return _Parser(text).query()


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if not found:
                raise SelectError("The specified query expression syntax is not valid.")
            assert found.lastgroup
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        self._at = 0

    def query(self) -> Query:
        self._word("select")
        counts, output = self._output()
        self._word("from")
        domain = self._name()
        where = self._or() if self._is("where") else None
        order, descending = self._order(where)
        limit = None
        if self._is("limit"):
            limit = int(self._take("number"))
            if not 1 <= limit <= MAX_LIMIT and not counts:
                raise SelectError(f"The limit is 1 to {MAX_LIMIT}.", "InvalidParameterValue")
        if self._at < len(self._tokens):
            raise SelectError("The specified query expression syntax is not valid.")
        self._check(where)
        return Query(domain, output, counts, where, order, descending, limit)

    def _check(self, where: Node | None) -> None:
        found = list(comparisons(where))
        tests = sum(len(c.values) if c.operator == "in" else 1 for c in found)
        if tests > MAX_COMPARISONS:
            raise SelectError("Too many value tests per predicate.", "InvalidNumberValueTests")
        if len({c.attribute for c in found}) > MAX_ATTRIBUTES:
            raise SelectError("Too many predicates.", "InvalidNumberPredicates")

    def _output(self) -> tuple[bool, tuple[str, ...] | None]:
        if self._is("*"):
            return False, None
        if self._peek("count") and self._tokens[self._at + 1 : self._at + 2] == [("sign", "(")]:
            self._at += 2
            self._word("*")
            self._word(")")
            return True, ()
        if self._is_item_name():
            return False, ()
        names = [self._name()]
        while self._is(","):
            names.append(self._name())
        return False, tuple(names)

    def _order(self, where: Node | None) -> tuple[str | None, bool]:
        if not self._is("order"):
            return None, False
        self._word("by")
        order = NAME if self._is_item_name() else self._name()
        descending = self._is("desc")
        if not descending:
            self._is("asc")
        about = [c for c in comparisons(where) if c.attribute == order]
        if not about or any(c.operator == "is null" for c in about):
            raise SelectError(
                "The sort attribute must be present in at least one of the predicates, and the "
                "predicate cannot contain the is null operator.",
                "InvalidSortExpression",
            )
        return order, descending

    def _or(self) -> Node:
        left = self._and()
        while self._is("or"):
            left = Joined("or", left, self._and())
        return left

    def _and(self) -> Node:
        left = self._intersection()
        while self._is("and"):
            left = Joined("and", left, self._intersection())
        return left

    def _intersection(self) -> Node:
        left = self._not()
        while self._is("intersection"):
            left = Joined("intersection", left, self._not())
        return left

    def _not(self) -> Node:
        if self._is("not"):
            return Joined("not", self._not())
        if self._is("("):
            inner = self._or()
            self._word(")")
            return inner
        return self._comparison()

    def _comparison(self) -> Comparison:
        every = self._is("every")
        if every:
            self._word("(")
        attribute = NAME if not every and self._is_item_name() else self._name()
        if every:
            self._word(")")
        return Comparison(attribute, every, *self._condition())

    def _condition(self) -> tuple[str, tuple[str, ...]]:
        for sign in ("=", "!=", ">=", "<=", ">", "<"):
            if self._is(sign):
                return sign, (self._value(),)
        if self._is("is"):
            is_not = self._is("not")
            self._word("null")
            return ("is not null" if is_not else "is null"), ()
        if self._is("between"):
            first = self._value()
            self._word("and")
            return "between", (first, self._value())
        if self._is("in"):
            self._word("(")
            values = [self._value()]
            while self._is(","):
                values.append(self._value())
            self._word(")")
            return "in", tuple(values)
        negated = self._is("not")
        self._word("like")
        pattern = self._value()
        inner = pattern[1:-1] if _ends_wild(pattern) else pattern[1:]
        if re.search(r"(?<!\\)%", inner):
            raise SelectError("The wildcard may be at the start and at the end only.")
        return ("not like" if negated else "like"), (pattern,)

    # --- Tokens -----------------------------------------------------------------------------------

    def _peek(self, text: str) -> bool:
        if self._at >= len(self._tokens):
            return False
        kind, found = self._tokens[self._at]
        return kind in ("word", "sign") and found.lower() == text

    def _is(self, text: str) -> bool:
        """Skip the next token and return True if it equals `text`."""
        found = self._peek(text)
        self._at += found
        return found

    def _word(self, text: str) -> None:
        if not self._is(text):
            raise SelectError("The specified query expression syntax is not valid.")

    def _take(self, kind: str) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at][0] == kind:
            self._at += 1
            return self._tokens[self._at - 1][1]
        raise SelectError("The specified query expression syntax is not valid.")

    def _is_item_name(self) -> bool:
        if not self._peek("itemname"):
            return False
        self._at += 1
        self._word("(")
        self._word(")")
        return True

    def _name(self) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at][0] == "quoted":
            return self._take("quoted")[1:-1].replace("``", "`")
        name = self._take("word")
        if name.lower() in _RESERVED:
            raise SelectError(f"{name} is a reserved keyword.")
        return name

    def _value(self) -> str:
        quoted = self._take("string")
        quote = quoted[0]
        return quoted[1:-1].replace(quote * 2, quote)
