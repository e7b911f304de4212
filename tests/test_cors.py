"""Which pages in a browser may call, and what their browsers are told."""

from collections.abc import Mapping, Sequence

import pytest

from router.config import parse
from router.cors import MAX_AGE_S, Cors

HOST = "gpu.lab:11435"
OLLAMA = parse(b"nodes: [http://n:1]", "router.yaml", {}).cors.origins


def named(origin: str) -> Mapping[str, str]:
    return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}


@pytest.mark.parametrize(
    ("origins", "origin", "told"),
    [
        (OLLAMA, None, {}),
        (OLLAMA, "", {}),
        (OLLAMA, f"http://{HOST}", {}),
        (OLLAMA, f"https://{HOST.upper()}", {}),
        (OLLAMA, "http://localhost", named("http://localhost")),
        (OLLAMA, "http://localhost:3000", named("http://localhost:3000")),
        (OLLAMA, "HTTPS://LocalHost:3000", named("HTTPS://LocalHost:3000")),
        (OLLAMA, "http://127.0.0.1:8080", named("http://127.0.0.1:8080")),
        (OLLAMA, "https://0.0.0.0", named("https://0.0.0.0")),
        (OLLAMA, "app://obsidian.md", named("app://obsidian.md")),
        (OLLAMA, "vscode-webview://abc", named("vscode-webview://abc")),
        (OLLAMA, "http://localhost.evil.org", None),
        (OLLAMA, "http://evil.org", None),
        (OLLAMA, "http://evil.org/http://localhost", None),
        (OLLAMA, "null", None),
        (["https://*.lab"], "https://chat.lab", named("https://chat.lab")),
        (["https://*.lab"], "https://chatXlab", None),
        (["https://*.lab"], "http://localhost", None),
        (["*"], "http://evil.org", {"Access-Control-Allow-Origin": "*"}),
        (["*"], f"http://{HOST}", {}),
        ([], "http://localhost", None),
        ([], None, {}),
    ],
)
def test_an_origin_is_allowed_as_configured(
    origins: Sequence[str], origin: str | None, told: Mapping[str, str] | None
) -> None:
    assert Cors(origins).check(origin, HOST) == told


def test_a_preflight_is_told_ollamas_list() -> None:
    told = Cors(OLLAMA).preflight()
    assert told["Access-Control-Max-Age"] == str(MAX_AGE_S) == "43200"
    allowed = told["Access-Control-Allow-Headers"].lower().split(",")
    assert {"authorization", "content-type", "openai-beta", "x-stainless-timeout"} <= {*allowed}
    assert "x-api-key" not in allowed
    assert {"GET", "POST", "DELETE"} <= {*told["Access-Control-Allow-Methods"].split(",")}
