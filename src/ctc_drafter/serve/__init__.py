"""OpenAI-compatible server, and a page that visualises decoding."""
