"""HTTP server: OpenAI's API, and a page that shows decoding step by step."""
