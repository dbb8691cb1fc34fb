"""What of `[data]` does not fit together."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.config import RunConfig

_BOUNDS = ("min", "max", "not")


def check_sources(config: "RunConfig") -> None:
    """Rows that are trained on are not held out, and a source is named once."""
    data = config.data
    if data.held_out is not None:
        for name in ("eval_path", "eval_split"):
            if (value := getattr(data, name)) is not None:
                raise ValueError(
                    f"data.held_out = {data.held_out:g} and data.{name} = {value} both give held-out rows; leave one of them out"
                )
        if data.held_out > 1 and not data.held_out.is_integer():
            raise ValueError(
                f"data.held_out = {data.held_out:g} is neither a number of rows nor a part of them; give a whole number, or "
                "one below 1"
            )
    if data.eval_path is None and data.eval_split is not None and data.eval_split == (data.split or "train"):
        raise ValueError(
            f"data.eval_split = {data.eval_split} is the split that is trained on; choose another one, or hold rows of it out "
            "with data.held_out"
        )
    if data.path in data.more_paths:
        raise ValueError(f"data.more_paths names {data.path}, which is data.path; name it once")


def check_filters(config: "RunConfig") -> None:
    """Conditions have one of the three forms."""
    for column, condition in config.data.filters.items():
        if isinstance(condition, dict):
            _check_table(column, condition)
        else:
            _check_values(f"data.filters.{column}", condition)


def _check_table(column: str, condition: dict[str, Any]) -> None:
    option = f"data.filters.{column}"
    if not condition or not set(condition) <= {*_BOUNDS}:
        raise ValueError(f"{option} = {condition} must be a table of {', '.join(_BOUNDS)}, a value or a list of values")
    for name in ("min", "max"):
        bound = condition.get(name, 0)
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise ValueError(f"{option}.{name} = {bound!r} must be a number")
    if condition.get("min", 0) > condition.get("max", condition.get("min", 0)):
        raise ValueError(f"{option}.min = {condition['min']} is above its max = {condition['max']}; no row is between")
    _check_values(f"{option}.not", condition.get("not", 0))


def _check_values(option: str, values: Any) -> None:
    if values == []:
        raise ValueError(f"{option} = [] lets no row pass; name values or leave the filter out")
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, dict | list):
            raise ValueError(f"{option}: {value!r} is no single value; give text, a number, true, false or null")
