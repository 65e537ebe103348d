"""Jinja's immutable sandbox, in which the steps of a template spend units of a budget.

The sandbox keeps a template away from Python's internals, but not from work without end. Here

- each pass of a loop, and each call of a macro, spends the nodes that it evaluates;
- the operators `* ** %`, calls, filters and comparing tests spend the sizes of their results;
- a value that is set, collected in a list or put together from outputs is measured.

An expression between them joins a few measured values, so it cannot grow by itself. limited_tree.py
puts filters with private names in place of the parts of the language. The steps themselves are
those of Jinja. template_budget.py says how much is allowed.

The sandbox looks up attributes slowly. Two shortcuts pay for the counting: the keys of a dict are
found without an exception, and the safety of an attribute is decided once for each type.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from minitune.data.templates.template_budget import (
    BUDGET,
    SMALL,
    TemplateLimitError,
    binary_size,
    checked,
    factor_of,
    format_size,
    indent_size,
    join_size,
    percent_size,
    replace_size,
    size_of,
)

COMPARING_TESTS = "== eq equalto != ne < lt lessthan <= le > gt greaterthan >= ge in lower upper"
# Filters that return a part of their value, or look at its length.
INSTANT_FILTERS = {"attr", "count", "d", "default", "first", "last", "length", "random"}
# Filters that yield items while others ask for them.
LAZY_FILTERS = {"items", "map", "reject", "rejectattr", "select", "selectattr"}
LAZY_UNITS = 8
LISTED_FILTERS = {"batch", "slice"}  # they yield new lists, which are measured at once
# Filters that ask for all items, and whose arguments do not lengthen the result.
LIST_FILTERS = {"dictsort", "groupby", "list", "max", "min", "reverse", "sort", "sum", "unique"}
CONSUMING_FILTERS = LIST_FILTERS | LISTED_FILTERS | {"join"}
PLAIN_FILTERS = LIST_FILTERS | {"truncate"}
# Filters whose time may grow faster than the size of the value, and the work for a character.
SLOW_FILTERS = {"pprint", "striptags", "sum", "title", "urlize", "wordwrap", "xmlattr"}
SLOW_UNITS, SLOW_SIZE = 32, 1000
INSTANT_METHODS = {"get", "items", "keys", "values"}  # of a dict
# Methods of a text whose results are not longer.
METHODS = (
    "count endswith find index lstrip partition removeprefix removesuffix rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip lower upper"
)
PLAIN_METHODS = frozenset(METHODS.split())
CALL_UNITS = 50
LIST_UNITS = 16  # a text in a list takes the memory of so many characters
DICT_ATTRIBUTES = frozenset(dir(dict))


class OpaqueNamespace(Namespace):
    """A namespace that does not show its attributes: it may hold itself."""

    def __repr__(self) -> str:
        """Return a text without attributes."""
        return "<namespace>"


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that spends the units of `BUDGET`.

    weights: nodes of each macro of the template, by name; None is the whole template's.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(finalize=_shown, **options)
        self.weights: dict[str | None, int] = {None: 1}
        self._is_safe: dict[tuple[type, str], bool] = {}
        self.globals["namespace"] = OpaqueNamespace
        self.globals["range"] = _limited_range
        del self.globals["lipsum"]  # random text

    def limit_filters(self) -> None:
        """Let all filters and comparing tests spend units. Call this when all are registered."""
        self.filters = {
            name: call if name in INSTANT_FILTERS else _limited_filter(name, call)
            for name, call in self.filters.items()
        } | {
            function.__name__: function
            for function in (limited_iterated, limited_measured, limited_added, limited_joined)
        }
        for name in COMPARING_TESTS.split():
            self.tests[name] = _limited_test(self.tests[name])

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute, or the value of a key."""
        if type(obj) is dict and attribute not in DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return True if a template may read an attribute."""
        key = (type(obj), attr)
        if key not in self._is_safe:
            self._is_safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._is_safe[key]

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the pieces of an output."""
        parts = list(parts)
        size = sum(map(len, parts))
        if size > SMALL:
            BUDGET.get().allow(size)
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply a binary operator."""
        size = binary_size(operator, left, right)
        if size > SMALL:
            BUDGET.get().allow(size)
        return checked(self.binop_table[operator](left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a function that formats a text, if `value` is such a method of a text."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def limited(*values: Any, **named: Any) -> str:
            BUDGET.get().allow(format_size(value.__self__, values, named))
            return formatted(*values, **named)

        return limited

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, method or macro."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes):
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
            if name not in PLAIN_METHODS or len(owner) > SMALL:
                BUDGET.get().allow(_method_size(owner, name, args, kwargs))
        elif isinstance(__obj, LoopContext) and args:
            args = (limited_iterated(__context, args[0], __self.weights[None]), *args[1:])
        elif not (isinstance(owner, dict) and name in INSTANT_METHODS):
            budget = BUDGET.get()
            if isinstance(__obj, Macro | BlockReference):
                budget.spend_nodes(__self.weights.get(name) or __self.weights[None])
            if name in ("to_bytes", "from_bytes"):
                raise TemplateLimitError("it turns an integer into bytes or back")
            budget.allow(CALL_UNITS + size_of(owner) + sum(map(size_of, (*args, *kwargs.values()))))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, list) and len(result) > SMALL:
            BUDGET.get().allow(LIST_UNITS * len(result))
        return result


def _limited_range(*numbers: int) -> range:
    """Return a range of Python that is not too long."""
    try:
        return safe_range(*numbers)
    except OverflowError:
        raise TemplateLimitError(f"it loops over more than {MAX_RANGE:,} numbers") from None


def _method_size(text: str | bytes, name: str, args: tuple, kwargs: dict) -> int:
    """Return an upper bound of the size of the result of a method of a text."""
    if name in PLAIN_METHODS:
        return len(text)
    if name == "join" and args:
        return join_size(text, args[0])
    if name == "replace" and len(args) >= 2:
        return replace_size(text, *args)
    return (1 + len(text)) * factor_of(args, kwargs)


# ---- filters and tests


def _limited_filter(name: str, function: Callable) -> Callable:
    """Return a filter that spends units before it runs."""
    asked = getattr(function, "jinja_pass_arg", None)
    asked = None if asked is None else asked.name  # of the first argument
    is_plain = name not in SLOW_FILTERS

    @pass_context
    def limited(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        is_small = is_plain and type(value) is str and len(value) <= SMALL
        if not is_small or args or kwargs:
            if name in CONSUMING_FILTERS and hasattr(value, "__next__"):
                value = list(value)
            BUDGET.get().allow(_filter_size(name, value, args, kwargs))
        if asked is None:
            result = function(value, *args, **kwargs)
        elif asked == "context":
            result = function(context, value, *args, **kwargs)
        elif asked == "eval_context":
            result = function(context.eval_ctx, value, *args, **kwargs)
        else:
            result = function(context.environment, value, *args, **kwargs)
        return checked(list(result) if name in LISTED_FILTERS else result)

    return limited


def _filter_size(name: str, value: Any, args: tuple, kwargs: dict) -> int:
    """Return an upper bound of the size of a filter's result, or the work that it takes."""
    if name in LAZY_FILTERS:
        return 1 + LAZY_UNITS * (len(value) if hasattr(value, "__len__") else 0)
    if name == "join" and hasattr(value, "__len__"):
        return join_size(kwargs.get("d", args[0] if args else ""), value)
    if name == "replace" and len(args) >= 2:
        return replace_size(value, *args)
    if name == "indent":
        return indent_size(value, *args, **kwargs)
    if name == "format":
        return percent_size(str(value), kwargs or args)
    size = size_of(value)
    if name in SLOW_FILTERS:
        size *= SLOW_UNITS + size // SLOW_SIZE
    return size if name in PLAIN_FILTERS else size * factor_of(args, kwargs)


def _limited_test(test: Callable) -> Callable:
    """Return a test that spends the size of its value before it runs."""

    def limited(value: Any, *others: Any) -> bool:
        if type(value) is not str or len(value) > SMALL:
            BUDGET.get().spend(size_of(value))
        return test(value, *others)

    return limited


# ---- the filters that stand for parts of the language


def _shown(value: Any) -> Any:
    """Return a value of an output. A text is measured when it is joined."""
    if type(value) is not str and isinstance(value, list | tuple | dict):
        BUDGET.get().allow(size_of(value))
    return value


@pass_context
def limited_iterated(context: Context, items: Any, weight: int) -> Iterator:
    """Yield the items of a loop that has `weight` nodes."""
    budget = BUDGET.get()
    for item in items:
        budget.spend_nodes(weight)
        yield item


@pass_context
def limited_measured(context: Context, value: Any) -> Any:
    """Return a value that the template keeps."""
    return checked(value)


@pass_context
def limited_added(context: Context, left: Any, right: Any) -> Any:
    """Return `left + right`."""
    BUDGET.get().allow(size_of(left) + size_of(right))
    return left + right


@pass_context
def limited_joined(context: Context, *parts: Any) -> str:
    """Return the texts of `a ~ b ~ ...` together."""
    BUDGET.get().allow(size_of(parts))
    return "".join(map(str, parts))
