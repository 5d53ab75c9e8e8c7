"""Endpoints that look: models, tokens, health, metrics, running requests, the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .. import __version__
from ..errors import RequestError
from .errors import ApiError, json_response
from .prompts import chat_prompt
from .schemas import DetokenizeBody, TokenizeBody
from .service import Service

PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
}


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    started = int(time.time())

    def model_card() -> dict[str, Any]:
        engine = service.engine
        dual_chunk = engine.dual_chunk
        attention = {"type": "plain"} if dual_chunk.is_plain else {
            "type": "dual_chunk",
            "chunk_size": dual_chunk.chunk_size,
            "local_size": dual_chunk.local_size,
            "original_max_position_embeddings": dual_chunk.original_max_position_embeddings,
        }  # fmt: skip
        attention["prefill"] = engine.prefill
        return {
            "id": service.settings.served_name,
            "object": "model",
            "created": started,
            "owned_by": "qwen1m_ext",
            "max_model_len": engine.max_model_len,
            "attention": attention,
            "dtype": engine.dtype,
        }

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @routes.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [model_card()]})

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """One model."""
        service.check_model(model)
        return json_response(model_card())

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text or of a conversation."""
        service.check_model(body.model)
        tokenizer = service.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: expected either prompt or messages")

        def run() -> dict[str, Any]:
            if body.messages is not None:
                made = chat_prompt(tokenizer, body.messages, body.tools, body.add_generation_prompt)
                ids = made.token_ids
            else:
                ids = tokenizer.encode(body.prompt or "")
            result = {
                "count": len(ids),
                "max_model_len": service.engine.max_model_len,
                "tokens": ids,
            }
            if body.return_token_strs:
                result["token_strs"] = [tokenizer.decode([token], False) for token in ids]
            return result

        return json_response(await service.work(run))

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        """Text of token ids."""
        service.check_model(body.model)
        tokenizer, vocab = service.tokenizer, service.engine.config.vocab_size
        bad = [token for token in body.tokens if not 0 <= token < vocab][:1]
        if bad:
            raise RequestError(f"tokens: expected ids in [0, {vocab}), got {bad[0]}")
        text = await service.work(lambda: tokenizer.decode(body.tokens, body.skip_special_tokens))
        return json_response({"prompt": text})

    @routes.get("/health")
    async def health() -> Response:
        """200 while there is an engine or will be one: loading, ok, restarting or draining."""
        if service.failure is not None:
            raise ApiError(503, f"there is no engine: {service.failure}", code="engine_failed")
        return json_response({"status": service.state})

    @routes.get("/ready")
    async def ready() -> Response:
        """200 when requests are taken; 503 while loading, restarting and draining."""
        if service.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=30)
        service.engine  # noqa: B018 - raises while there is none
        return json_response({"status": "ready"})

    @routes.get("/version")
    async def version() -> Response:
        """Version of the package."""
        return json_response({"version": __version__})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/requests")
    async def requests() -> Response:
        """Running requests."""
        return json_response({"object": "list", "data": service.registry.running()})

    @routes.get("/v1/requests/{request_id}")
    async def request_status(request_id: str) -> Response:
        """State and progress of one request; finished ones are remembered for a while."""
        return json_response(service.registry.status(request_id))

    @routes.delete("/v1/requests/{request_id}")
    async def request_cancel(request_id: str) -> Response:
        """Cancel a request; what it has computed stays in the prefix cache."""
        return json_response(service.registry.cancel(request_id))

    @routes.delete("/v1/requests/{request_id}/pin")
    async def unpin(request_id: str) -> Response:
        """Let the pages go that a request with `pin` has kept."""
        if not service.engine.unpin(request_id):
            raise ApiError(404, f"pin: there is none of request {request_id!r}")
        return json_response({"id": request_id, "unpinned": True})

    return routes
