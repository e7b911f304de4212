"""What the clients ask for: questions, a tool, a schema and an image."""

import base64
from typing import Any

ASKED: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
]
# The simulated node calls a tool that the user asks it to use.
TOOLED: Any = [{"role": "user", "content": "Please use the tool weather for Mainz."}]
PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
FUNCTION: Any = {"name": "weather", "description": "The weather", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
SCHEMA: Any = {
    "type": "object",
    "properties": {"colour": {"type": "string"}, "certain": {"type": "boolean"}},
    "required": ["colour", "certain"],
    "additionalProperties": False,
}
IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
PNG = base64.b64encode(IMAGE).decode()
LOOKED: Any = [{"role": "user", "content": "What is this?", "images": [IMAGE]}]
