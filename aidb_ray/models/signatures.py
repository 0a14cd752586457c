"""`Signature`: what a tool accepts, read from a function or a model, and checked as JSON."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, NotRequired, Union, cast

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_jsonable_python
from typing_extensions import TypedDict

from aidb_ray.errors import ConfigError

# Annotations known only at run time are beyond what the type checker allows `TypedDict`.
_make_typed_dict: Any = TypedDict

_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):")
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument that the model may give: `type` is resolved, `default` is for show only."""

    name: str
    type: Any
    description: str
    is_required: bool
    default: Any


@dataclass(frozen=True)
class Signature:
    """The arguments of one tool. It pickles; what is compiled from it is made again on demand.

    Attributes:
        model: The whole input as a model, None if `parameters` are its fields.
        input_parameter: Parameter that receives the whole input; `""` spreads it by name.
        context_parameter: Parameter that receives the tool context, `""` if none does.
    """

    tool_name: str
    parameters: tuple[Parameter, ...] = ()
    model: type[BaseModel] | None = None
    input_parameter: str = ""
    context_parameter: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_adapter"}

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the arguments, an object.

        Raises:
            ConfigError: a type has no JSON schema.
        """
        try:
            schema = self._adapter.json_schema(schema_generator=_UntitledFields)
        except PydanticUserError as error:
            raise _invalid(self.tool_name, f"cannot be described to a model: {error}") from error
        schema.pop("title", None)
        schema.setdefault("properties", {})
        if schema.get("type") != "object":
            raise _invalid(self.tool_name, "has an input that is not an object.")
        return schema

    def parse(self, args_json: str | bytes) -> dict[str, Any]:
        """Return the keyword arguments that `args_json` stands for.

        Nothing is converted that JSON can say itself: `"5"` is no integer. Names that a
        function does not have are refused, for a model that invents one means something by it.

        Raises:
            ValidationError: the text is not JSON or does not fit.
        """
        value = self._adapter.validator.validate_json(args_json, strict=True)
        if self.input_parameter:
            return {self.input_parameter: value}
        if self.model is None:
            return value
        return {name: getattr(value, name) for name in self.model.model_fields}

    def bind(
        self,
        function: Callable[..., Any],
        context_type: type,
        local_names: Mapping[str, Any] | None = None,
    ) -> Signature:
        """Return the same input, handed to `function`.

        A function whose only parameter is annotated with the model, or named unlike any field,
        gets the whole input; any other gets the fields by name.

        Raises:
            ConfigError: `function` does not take exactly these arguments.
        """
        context, parameters, takes_any = _read_parameters(
            function, self.tool_name, context_type, local_names
        )
        if self.model is None:
            fields = {parameter.name: parameter.is_required for parameter in self.parameters}
        else:
            # A validated model has a value for every field.
            fields = dict.fromkeys(self.model.model_fields, True)
        if len(parameters) == 1 and not takes_any:
            only = parameters[0]
            of_model = self.model is not None and _contains(only.type, self.model)
            if of_model or only.name not in fields:
                return replace(self, input_parameter=only.name, context_parameter=context)
        names = {parameter.name for parameter in parameters}
        unmet = [p.name for p in parameters if p.is_required and not fields.get(p.name)]
        unknown = [] if takes_any else [name for name in fields if name not in names]
        if unmet or unknown:
            raise _invalid(
                self.tool_name,
                f"cannot be run by this function: not always given are {unmet}, not taken are "
                f"{unknown}. Take the arguments by name, or all of them as one parameter.",
            )
        return replace(self, input_parameter="", context_parameter=context)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        try:
            if self.model is not None:
                return TypeAdapter(self.model)
            # A typed dict, not a model: it takes names such as `schema` or `model_config`.
            fields = {parameter.name: _field_of(parameter) for parameter in self.parameters}
            arguments: Any = _make_typed_dict("Arguments", fields)
            arguments.__pydantic_config__ = ConfigDict(extra="forbid")
            return TypeAdapter(arguments)
        except PydanticUserError as error:
            raise _invalid(
                self.tool_name, f"has a parameter that JSON cannot carry: {error}"
            ) from error


class _UntitledFields(GenerateJsonSchema):
    """Leaves out titles, which repeat the names and cost tokens in every request."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def read_signature(
    function: Callable[..., Any],
    *,
    tool_name: str,
    context_type: type,
    local_names: Mapping[str, Any] | None = None,
) -> Signature:
    """Return what `function` takes, as far as a model may give it.

    Raises:
        ConfigError: a parameter has no place in JSON, or an annotation cannot be resolved.
    """
    context, parameters, takes_any = _read_parameters(
        function, tool_name, context_type, local_names
    )
    if takes_any:
        raise _invalid(tool_name, "takes any name; a model must be told which ones there are.")
    return Signature(tool_name, tuple(parameters), context_parameter=context)


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the text before the first Google section, and the arguments' descriptions."""
    text: list[str] = []
    descriptions: dict[str, str] = {}
    section = current = ""
    indent = 0
    for line in docstring.splitlines():
        if found := _SECTION.fullmatch(line.rstrip()):
            section, current, indent = found[1], "", 0
        elif not section:
            text.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            argument = _ARGUMENT.fullmatch(line.strip()) if depth == indent else None
            if argument:
                current = argument[1]
                descriptions[current] = argument[2]
            elif current:
                descriptions[current] = f"{descriptions[current]} {line.strip()}".strip()
    return "\n".join(text).strip(), descriptions


def _field_of(parameter: Parameter) -> Any:
    extra: dict[str, Any] = {}
    if not parameter.is_required:
        # A default without JSON form is the function's own business; the model need not know
        # it to leave the argument out.
        with suppress(PydanticSerializationError, ValueError):
            extra["default"] = to_jsonable_python(parameter.default, inf_nan_mode="strings")
    described = Field(description=parameter.description or None, json_schema_extra=extra or None)
    annotated = Annotated[parameter.type, described]
    return annotated if parameter.is_required else NotRequired[annotated]


def _read_parameters(
    function: Callable[..., Any],
    tool_name: str,
    context_type: type,
    local_names: Mapping[str, Any] | None,
) -> tuple[str, list[Parameter], bool]:
    """Return the context's parameter, the others, and whether `**` takes more of them."""
    hints = _resolve_hints(function, tool_name, local_names or {})
    descriptions = parse_docstring(inspect.getdoc(function) or "")[1]
    context, parameters, takes_any = "", list[Parameter](), False
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, Any)
        is_required = parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise _invalid(tool_name, f"takes {str(parameter)!r} by position, not by name.")
        elif _contains(hint, context_type):
            context = name
        else:
            default = None if is_required else parameter.default
            parameters.append(
                Parameter(name, hint, descriptions.get(name, ""), is_required, default)
            )
    return context, parameters, takes_any


def _resolve_hints(
    function: Callable[..., Any], tool_name: str, local_names: Mapping[str, Any]
) -> dict[str, Any]:
    while isinstance(function, partial):
        function = cast("partial[Any]", function).func
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target, localns=dict(local_names), include_extras=True)
    except NameError as error:
        raise _invalid(
            tool_name,
            f"has an annotation that cannot be resolved: {error}. Define the type in the "
            f"function's module, or pass input_schema.",
        ) from error


def _contains(hint: Any, cls: type) -> bool:
    """Whether `hint` is `cls` or a subclass, as it is, annotated or optional."""
    if typing.get_origin(hint) in (Annotated, Union, types.UnionType):
        return any(_contains(part, cls) for part in typing.get_args(hint))
    return isinstance(hint, type) and issubclass(hint, cls)


def _invalid(tool_name: str, why: str) -> ConfigError:
    return ConfigError(f"Tool {tool_name!r} {why}", code="invalid_tool")
