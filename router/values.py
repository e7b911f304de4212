"""What each kind of value in `router.yaml` must look like: its check, its words, its schema."""

import ipaddress
import re
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PlainValidator,
    SecretStr,
    ValidationInfo,
    WithJsonSchema,
)

from router import yamlfile
from router.address import Address, Url, as_text

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_NOT_TO_SET = re.compile(
    r"(?i:connection|content-length|host|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade)"
)
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,79}$"
_GLOB = r"^!?[^!\s]\S*$"
_FLOW = r"^\S(.{0,198}\S)?$"
_ORIGIN = r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]+)$"


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    text = as_text(value)
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(
            "a network such as 10.0.0.0/8 or fd00::/8 is expected, none of its host bits set"
        ) from None


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = r"^([0-9]{1,12}) ?([KkMmGg]?[Ii]?[Bb])?$"


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(_SIZE, value)
    unit = (match[2] or "").lower() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError("a number of bytes or a size such as 512MiB, 8MB or 64KiB is expected")
    return int(match[1]) * _UNITS[unit]


def _header_name(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise ValueError("this is no name of an HTTP header")
    if _NOT_TO_SET.fullmatch(name):
        raise ValueError("this header belongs to the connection: it cannot be set")
    return name


def _header_value(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\t\x20-\x7e]*", value.get_secret_value()):
        raise ValueError(
            "a header is plain ASCII on one line (does the variable end in a newline?)"
        )
    return value


def _token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("a token is plain ASCII without spaces, and not empty")
    return value


def _bundle(path: str, info: ValidationInfo) -> str:
    """A CA bundle stands beside the configuration unless its path is absolute."""
    full = (info.context or Path()) / path
    try:
        if not full.is_file():
            raise ValueError("there is no such file")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(full)
    except ssl.SSLError:
        raise ValueError("this file holds no PEM certificate") from None
    except OSError as error:
        raise ValueError(f"this file cannot be read: {error.strerror}") from None
    return str(full)


def not_empty(value: object) -> object:
    """An empty list is refused before its entries are read: a bad entry does not make it empty."""
    if value == ():
        raise ValueError("a list of at least one is expected")
    return value


def long_form(key: str) -> Any:
    """The short form of an entry is the text of its one key that matters."""
    return lambda value: {key: value} if isinstance(value, str) else value


def _like(pattern: str, what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{what} is expected")
        return text

    return AfterValidator(check)


def _flow_name(name: str) -> str:
    """An address stands in the form in which those of clients are told."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def _slots(value: object) -> object:
    if value == "auto":
        return None
    value = yamlfile.typed(value)
    if value is None or isinstance(value, str):
        raise ValueError("a whole number or auto is expected")
    return value


def _candidates(value: object) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        if not value or not all(isinstance(one, str) for one in value):
            raise ValueError("a list of at least one model name is expected")
        return value
    return as_text(value)


def _spread(value: object) -> object:
    value = 1 if value == "one" else yamlfile.typed(value)
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("all, one, or a number of nodes is expected")
    return value


AddressText = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^:\s\[\]]+):[0-9]{1,5}$")]
UrlText = Annotated[
    str, Field(pattern=r"^([Hh][Tt][Tt][Pp][Ss]?://)?[^/?#@\s]+(/([^/?#\s][^?#\s]*)?)?$")
]
_SizeText = Annotated[str, Field(pattern=_SIZE)]
_Positive = Annotated[int, Field(ge=1)]
Listen = Annotated[Address, PlainValidator(Address.parse, json_schema_input_type=AddressText)]
NodeUrl = Annotated[Url, PlainValidator(Url.parse, json_schema_input_type=UrlText)]
Network = Annotated[
    ipaddress.IPv4Network | ipaddress.IPv6Network,
    PlainValidator(_network, json_schema_input_type=str),
]
_Bytes = Annotated[int, Field(ge=1, le=1 << 40)]
Size = Annotated[_Bytes, BeforeValidator(_size, json_schema_input_type=_Bytes | _SizeText)]
Slots = Annotated[
    _Positive | None, BeforeValidator(_slots, json_schema_input_type=_Positive | Literal["auto"])
]
_Typed = BeforeValidator(yamlfile.typed)
Flag = Annotated[bool, _Typed]
Count = Annotated[_Positive, _Typed]
Number = Annotated[int, Field(ge=0, le=1_000_000), _Typed]
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False), _Typed]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False), _Typed]
# In between, virtual time neither stands still nor runs away.
FlowWeight = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False), _Typed]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _Typed]
HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderValue = Annotated[SecretStr, AfterValidator(_header_value)]
Token = Annotated[SecretStr, AfterValidator(_token)]
CaBundle = Annotated[str, AfterValidator(_bundle)]
EntryName = Annotated[
    str,
    _like(_NAME, "a name of letters, digits, _ . : and -, at most 80 of them,"),
    WithJsonSchema({"type": "string", "pattern": _NAME}),
]
Glob = Annotated[
    str,
    _like(_GLOB, "a glob of model names, with ! in front to exclude,"),
    WithJsonSchema({"type": "string", "pattern": _GLOB}),
]
FlowName = Annotated[
    str,
    _like(_FLOW, "what the header says, or an address, of at most 200 characters,"),
    AfterValidator(_flow_name),
    WithJsonSchema({"type": "string", "pattern": _FLOW}),
]
Globs = Annotated[
    tuple[Glob, ...], BeforeValidator(not_empty), Field(json_schema_extra={"minItems": 1})
]
_Models = Annotated[tuple[str, ...], Field(min_length=1)]
Candidates = Annotated[
    str | tuple[str, ...], PlainValidator(_candidates, json_schema_input_type=str | _Models)
]
Spread = Annotated[
    int | Literal["all"],
    BeforeValidator(_spread, json_schema_input_type=_Positive | Literal["all", "one"]),
]
Origin = Annotated[
    str,
    _like(_ORIGIN, "* or scheme://host[:port]"),
    WithJsonSchema({"type": "string", "pattern": _ORIGIN}),
]
# What pydantic's schema does not say by itself.
AT_LEAST_ONE: dict[str, JsonValue] = {"minItems": 1}
HEADER_KEYS: dict[str, JsonValue] = {"propertyNames": {"pattern": f"^{_TOKEN.pattern}$"}}
