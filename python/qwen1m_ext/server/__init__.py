"""The OpenAI-compatible HTTP server, `qwen1m serve`. Needs the extra `serve`.

A request's way: `gate` (key, size, draining), `schemas` (what a body may say), `prompts` (text to
token ids and parameters), `generation` (into the engine, events out), then `chat_api` or
`completions_api` (events to OpenAI's objects) and `streaming` (server-sent events).
"""
