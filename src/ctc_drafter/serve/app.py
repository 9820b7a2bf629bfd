"""The web application around a service."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from ctc_drafter.serve import errors
from ctc_drafter.serve.gate import Gate
from ctc_drafter.serve.metrics import Metrics
from ctc_drafter.serve.openai_api import openai_router
from ctc_drafter.serve.replies import Health
from ctc_drafter.serve.service import Service
from ctc_drafter.serve.trace import trace_router

PAGE = Path(__file__).parent / "page"
SLACK = 30.0  # seconds to read and write a request beyond those of its answer


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """OpenAI's API, our own stream, health, metrics and the page. The engine is started and stopped by the caller.

    api_key: clients must send it under /v1/; None lets everybody in.
    """
    app = FastAPI(
        title="CTC-drafter",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    metrics, limits = Metrics(service.engine), service.limits
    seconds = limits.timeout + SLACK
    app.add_middleware(Gate, api_key=api_key, max_body=limits.max_body, seconds=seconds, metrics=metrics)
    errors.install(app)
    app.include_router(openai_router(service))
    app.include_router(trace_router(service))

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether requests are taken."""
        load = service.engine.load()
        response.status_code = 200 if load.open else 503
        return Health(status="ok" if load.open else "stopping", running=load.running, waiting=load.waiting)

    @app.get("/metrics", response_class=Response)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app
