"""The SimpleDB of the tests, compared with the examples of the Developer Guide.

The data set and the queries are from the guide's chapter "Using Select to Create Amazon SimpleDB Queries".
"""

from __future__ import annotations

import pytest

from tests.support.simpledb.expressions import SelectError, matches, parse

pytestmark = pytest.mark.slow

SIRENS, CANCER, STUFF = "0385333498", "0802131786", "1579124585"
BETWEEN, THREE_HUNDRED, HEAVEN = "B000T9886K", "B00005JPLW", "B000SF3NGK"


def _item(title: str, author: str, year: str, **more: str) -> dict[str, frozenset[str]]:
    item = {"Title": title, "Author": author, "Year": year, **more}
    return {name: frozenset(text.split("|")) for name, text in item.items()}


SAMPLE = {
    SIRENS: _item(
        "The Sirens of Titan",
        "Kurt Vonnegut",
        "1959",
        Pages="00336",
        Keyword="Book|Paperback",
        Rating="*****|5 stars|Excellent",
    ),
    CANCER: _item("Tropic of Cancer", "Henry Miller", "1934", Pages="00318", Keyword="Book", Rating="****"),
    STUFF: _item(
        "The Right Stuff", "Tom Wolfe", "1979", Pages="00304", Keyword="Book|Hardcover|American", Rating="****|4 stars"
    ),
    BETWEEN: _item("In Between", "Paul Van Dyk", "2007", Keyword="CD|Trance", Rating="4 stars"),
    THREE_HUNDRED: _item("300", "Zack Snyder", "2007", Keyword="DVD|Action|Frank Miller", Rating="***|3 stars|Not bad"),
    HEAVEN: _item("Heaven's Gonna Burn Your Eyes", "Thievery Corporation", "2002", Rating="*****"),
}


def found(where: str) -> set[str]:
    query = parse(f"select * from mydomain where {where}")
    return {name for name, item in SAMPLE.items() if matches(query.where, name, item)}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        # Simple Queries
        ("Title = 'The Right Stuff'", {STUFF}),
        ("Year > '1985'", {BETWEEN, THREE_HUNDRED, HEAVEN}),
        ("Rating like '****%'", {SIRENS, STUFF, CANCER, HEAVEN}),
        ("Pages < '00320'", {STUFF, CANCER}),
        # Range Queries
        ("Year > '1975' and Year < '2008'", {STUFF, BETWEEN, THREE_HUNDRED, HEAVEN}),
        ("Year between '1975' and '2008'", {STUFF, BETWEEN, THREE_HUNDRED, HEAVEN}),
        ("Rating = '***' or Rating = '*****'", {SIRENS, THREE_HUNDRED, HEAVEN}),
        (
            "(Year > '1950' and Year < '1960') or Year like '193%' or Year = '2007'",
            {SIRENS, CANCER, BETWEEN, THREE_HUNDRED},
        ),
        # Queries on Attributes with Multiple Values: one value must fit the whole predicate
        ("Rating = '4 stars' or Rating = '****'", {CANCER, STUFF, BETWEEN}),
        ("Keyword = 'Book' and Keyword = 'Hardcover'", set()),
        ("every(Keyword) in ('Book', 'Paperback')", {SIRENS, CANCER}),
        # Multiple Attribute Queries
        ("Rating = '****'", {CANCER, STUFF}),
        ("every(Rating) = '****'", {CANCER}),
        ("Keyword = 'Book' intersection Keyword = 'Hardcover'", {STUFF}),
        # Comparison Operators
        ("Year != '2007'", {SIRENS, CANCER, STUFF, HEAVEN}),
        ("itemName() = '0802131786'", {CANCER}),
        ("itemName() in ('0802131786', 'B000SF3NGK', 'nothing')", {CANCER, HEAVEN}),
        ("itemName() like 'B000%' and Year = '2007'", {BETWEEN, THREE_HUNDRED}),
        ("Author like '%Miller'", {CANCER}),
        ("Author like '%on%'", {SIRENS, HEAVEN}),
        ("Author not like 'T%'", {SIRENS, CANCER, BETWEEN, THREE_HUNDRED}),
        ("Pages is null", {BETWEEN, THREE_HUNDRED, HEAVEN}),
        ("Pages is not null", {SIRENS, CANCER, STUFF}),
        ("not Year > '1985'", {SIRENS, CANCER, STUFF}),
        ("Keyword is null or Keyword = 'CD'", {BETWEEN, HEAVEN}),
        ("Year = '2007' and (Pages is null or Pages > '1')", {BETWEEN, THREE_HUNDRED}),
        # Select Quoting Rules
        ("Title = 'Heaven''s Gonna Burn Your Eyes'", {HEAVEN}),
        ('`Title` = "Heaven\'s Gonna Burn Your Eyes"', {HEAVEN}),
        ("`Ti``tle` = 'x'", set()),
    ],
)
def test_where_clause_follows_the_guide(where: str, expected: set[str]) -> None:
    assert found(where) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "select",
        "select * from",
        "select * from mydomain where",
        "select * from mydomain where Year",
        "select * from mydomain where Year = 2007",
        "select * from mydomain where Year == '2007'",
        "select * from mydomain where Year = 'x",
        "select * from mydomain where Year = 'it's'",
        "select * from my-domain",
        "select * from 1domain",
        "select * from mydomain where order = 'x'",
        "select * from mydomain where Year like '20%07'",
        "select * from mydomain where Year in '2007'",
        "select * from mydomain where Year in ()",
        "select * from mydomain where (Year = '2007'",
        "select * from mydomain where Year is '2007'",
        "select * from mydomain where every Year = '2007'",
        "select * from mydomain where itemName = '2007'",
        "select *, Title from mydomain",
        "select * from mydomain limit",
        "select * from mydomain where Year > '1' trailing",
        "update mydomain",
    ],
)
def test_invalid_expression_is_refused(text: str) -> None:
    with pytest.raises(SelectError) as caught:
        parse(text)
    assert caught.value.code == "InvalidQueryExpression"


def test_sort_attribute_must_be_in_the_condition() -> None:
    """The guide says: "Because returned results must contain the attribute on which you are sorting"."""
    for text in (
        "select * from mydomain order by Year",
        "select * from mydomain where author is null order by title",
        "select * from mydomain where title is null order by title",
        "select * from mydomain where title = 'x' order by itemName()",
    ):
        with pytest.raises(SelectError) as caught:
            parse(text)
        assert caught.value.code == "InvalidSortExpression"
    for text in (
        "select * from mydomain where Year < '1980' order by Year asc",
        "select * from mydomain where Year = '2007' intersection Author is not null order by Author desc",
        "select * from mydomain where author is null and title is not null order by title",
        "select * from mydomain where itemName() > 'B' order by itemName() limit 2500",
    ):
        parse(text)


def test_more_comparisons_or_items_than_the_limits_are_refused() -> None:
    tests = " or ".join(f"a = '{n}'" for n in range(20))
    parse(f"select * from mydomain where {tests}")
    names = ", ".join(f"'{n}'" for n in range(20))
    parse(f"select * from mydomain where itemName() in ({names})")
    for where in (f"{tests} or a = 'x'", f"itemName() in ({names}, 'x')"):
        with pytest.raises(SelectError) as caught:
            parse(f"select * from mydomain where {where}")
        assert caught.value.code == "InvalidNumberValueTests"
    for limit in (0, 2501):
        with pytest.raises(SelectError) as caught:
            parse(f"select * from mydomain limit {limit}")
        assert caught.value.code == "InvalidParameterValue"
