"""`router.yaml` as a frozen value, or every mistake in it at once with its line and column."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from router import crosscheck, yamlfile
from router.errors import ConfigError
from router.settings import MODELS, Config
from router.yamlfile import Document


def load(path: Path | None, env: Mapping[str, str]) -> Config:
    """Read a file; without one, the environment alone. Raises ConfigError."""
    if path is None:
        return from_environment(env)
    try:
        with path.open("rb") as file:
            text = file.read(yamlfile.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except ValueError:
        raise ConfigError([f"{str(path)!r}: this is no path"]) from None
    return parse(text, str(path), env)


def parse(text: bytes, name: str, env: Mapping[str, str]) -> Config:
    """Read the text of the file `name`, whose folder relative paths start from."""
    document = yamlfile.read(text, name, env)
    config: Config | None = None
    if document.value is not None:
        config, errors = _validated(document.value, Path(name).parent)
        for error in errors:
            _blame(document, error)
        crosscheck.check(document, document.value)
    if config is None or document.mistakes:
        raise ConfigError(document.report())
    return config


def from_environment(env: Mapping[str, str]) -> Config:
    """One node, where Ollama's clients would look for it. Raises ConfigError."""
    variable = next((v for v in ("OLLAMA_API_BASE", "OLLAMA_HOST") if _unquoted(env, v)), "")
    text = _client_url(_unquoted(env, variable))
    value: dict[str, object] = {"nodes": (text,)}
    if _unquoted(env, "OLLAMA_TIMEOUT"):
        value["timeouts"] = {"first_byte_s": yamlfile.Filled(_unquoted(env, "OLLAMA_TIMEOUT"))}
    config, errors = _validated(value, Path())
    mistakes = [
        f"{'OLLAMA_TIMEOUT' if error['loc'][0] == 'timeouts' else variable}: "
        + yamlfile.worded(error)
        for error in errors
    ]
    if wrong := crosscheck.own_address(text):
        mistakes.append(f"{variable}: {wrong}")
    if config is None or mistakes:
        raise ConfigError(mistakes)
    return config


def _unquoted(env: Mapping[str, str], variable: str) -> str:
    return env.get(variable, "").strip().strip("\"'")


def _client_url(text: str) -> str:
    """A server's OLLAMA_HOST, as a client reads it: what listens everywhere is asked locally."""
    scheme, mark, rest = text.rpartition("://")
    host, slash, prefix = rest.partition("/")
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    if host.startswith("[::]"):
        host = "[::1]" + host[4:]
    name, colon, port = host.partition(":")
    if name in ("", "0.0.0.0"):
        host = f"127.0.0.1{colon}{port}"
    return f"{scheme}{mark}{host}{slash}{prefix}"


def _validated(value: dict[str, object], folder: Path) -> tuple[Config | None, list[ErrorDetails]]:
    try:
        return Config.model_validate(value, context=folder), []
    except ValidationError as error:
        return None, error.errors(include_url=False, include_input=False)


def _blame(document: Document, error: ErrorDetails) -> None:
    """Note one of pydantic's mistakes, in words of ours, where it stands in the file."""
    path: yamlfile.Path = tuple(part for part in error["loc"] if part != "[key]")
    if document.known_broken(path):
        return
    text = yamlfile.worded(error)
    if error["type"] == "extra_forbidden":
        document.refuse_key(path, text + _accepted(path))
    elif error["type"] == "missing" or path != error["loc"]:
        document.refuse_key(path, text)
    else:
        secret = "headers" in path or "token" in path
        document.refuse(path, text + ("" if secret else document.found(document.nearest(path))))


def _accepted(path: yamlfile.Path) -> str:
    section = next((part for part in reversed(path[:-1]) if isinstance(part, str)), "")
    if path[:2] in (("timeouts", "models"), ("routing", "flows")):  # what follows is a name
        section = str(path[1])
    keys = [field.alias or key for key, field in MODELS[section].model_fields.items()]
    close = get_close_matches(str(path[-1]), keys, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"{meant}; accepted: {', '.join(keys)}"
