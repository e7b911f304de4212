"""What a relay costs: CPU per request and per streamed chunk, latency, memory."""
