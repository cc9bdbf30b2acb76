"""A section of options: a pydantic dataclass with constraints and metadata beside its fields, and one-line errors."""

import re
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from rm.config.errors import InputError
from rm.config.redact import HIDDEN, read_literal, redact

RULES = {
    "needs": "",  # another option, without which this one has no effect
    "excludes": "",  # another option, which cannot be given together with this one
    "fix": "",  # the error message, instead of that of pydantic
    "may_change_on_resume": False,
    "compared_by_content": False,  # names a file, model or data set, which may be elsewhere when a run is resumed
    "secret": False,
}
LIMITS = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a section: default (`...`: must be given), line of the help page, `RULES`, constraints of `Field`."""
    rules = {name: more.pop(name, rule) for name, rule in RULES.items()}
    return Field(default, description=help, json_schema_extra=rules, **more)


@dataclass(config=LIMITS, kw_only=True, frozen=True)
class Section:
    """The base of all sections: makes every subclass a dataclass whose constructor raises `InputError`.

    Frozen, since pydantic does not validate assignments: `dataclasses.replace` makes a validated copy. Values may be
    text in the forms of the command line. The method `check` of a section rejects combinations of its options.
    """

    def __init_subclass__(cls) -> None:
        validate = dataclass(cls, config=LIMITS, kw_only=True, frozen=True).__init__

        def __init__(self: Section, **values: Any) -> None:
            try:
                validate(self, **values)
            except ValidationError as error:
                raise InputError(_one_line(fields_of(cls), values, error.errors()[0])) from None

        cls.__init__ = __init__

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """A value of YAML or of the command line in a form that pydantic reads."""
        field = fields_of(cls)[info.field_name]
        allowed, may_be_text = kinds(field), str in kinds(field)
        if HIDDEN in str(value):
            raise ValueError("a secret was hidden here when the config was written; give it again")
        if isinstance(value, str):
            if value.lower() in ("none", "null") and (NoneType in allowed or not may_be_text):
                value = None
            elif dict in allowed and not may_be_text and "=" in value and value[0] != "{":  # as optim_args in TRL
                pairs = [pair.partition("=") for pair in re.split(r",(?![^(\[]*[)\]])", value)]
                value = {name.strip(): read_literal(text.strip()) for name, _, text in pairs}
            elif not may_be_text or value[:1] in ("[", "{", "(") and {list, dict} & allowed.keys():
                value = read_literal(value)
        if value in (None, "") and list in allowed and NoneType not in allowed:
            return []
        if isinstance(value, str) and list in allowed and not may_be_text:
            return [part.strip() for part in value.split(",")]
        if value is False and "no" in choices(field):  # YAML reads a bare `no` as false
            return "no"
        if isinstance(value, bool) and bool not in allowed:  # pydantic would take it for 0 or 1
            raise ValueError("must not be true or false")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = fields_of(type(self))
        given = [name for name, field in fields.items() if getattr(self, name) != field.default]
        for name in given:
            needs, excludes = map(fields[name].json_schema_extra.get, ("needs", "excludes"))
            self.need(not needs or getattr(self, needs, True), name, f"has no effect without {needs}")
            self.need(excludes not in given, name, f"{excludes} is given too; give one of them")
        for part in reversed(type(self).__mro__):  # pydantic would run only one of several validators with this name
            if "check" in vars(part):
                part.check(self)
        return self

    def need(self, ok: Any, name: str, fix: str) -> None:
        """Raise the error of a validator, `name=value: fix`, unless `ok`."""
        if not ok:
            raise ValueError(f"{name}={redact(getattr(self, name), name)!r}: {fix}")


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The options of a section by name: annotation, default, description, and `RULES` as json_schema_extra."""
    return section.__pydantic_fields__


def kinds(field: FieldInfo) -> dict[Any, Any]:
    """The types that a field allows, with their parameters: of `list[str] | None` list (list[str]) and NoneType."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    return {get_origin(kind) or kind: kind for kind in (get_args(field.annotation) if is_union else [field.annotation])}


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of the `Literal` that a field allows."""
    return get_args(kinds(field).get(Literal))


def _one_line(fields: dict[str, FieldInfo], values: dict[str, Any], error: dict[str, Any]) -> str:
    """One line, `name=value: fix`, for an error of pydantic."""
    raised = error.get("ctx", {}).get("error")
    if not error["loc"]:
        return str(raised)  # by `need`
    name = error["loc"][0]
    if name not in values:
        return f"--{name} is needed: {fields[name].description}"
    if name not in fields:
        return f"{name}: there is no such option"
    value, allowed = values[name], kinds(fields[name])
    value = read_literal(value) if isinstance(value, str) and str not in allowed else value
    fix = error["msg"].split(", unable")[0].replace("Input should", "must")
    fix = str(raised or fields[name].json_schema_extra["fix"] or fix + ", or none" * (NoneType in allowed))
    return f"{name}={redact(value, name)!r}: {fix}"
