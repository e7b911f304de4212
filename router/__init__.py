"""ollamux: one Ollama address in front of every Ollama node you own."""

__version__ = "0.1.0.dev0"
