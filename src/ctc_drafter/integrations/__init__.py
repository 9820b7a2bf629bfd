"""Plugins for other inference engines (vLLM, SGLang), imported only when used."""
