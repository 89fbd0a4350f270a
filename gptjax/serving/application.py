"""The web application: its routes."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from gptjax.serving.answering import Serving
from gptjax.serving.chat_endpoint import create_chat_completion
from gptjax.serving.completions_endpoint import create_completion
from gptjax.serving.guard import Guard
from gptjax.serving.openapi import documentation, openapi
from gptjax.serving.responses_endpoint import create_response
from gptjax.serving.tokens_endpoint import detokenize, tokenize, tokenizer_info
from gptjax.serving.vector_endpoints import classify, create_embeddings

# The page loads nothing from elsewhere, and no other site may frame it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_application(serving: Serving) -> ASGIApp:
    """Returns the ASGI application of a server."""
    routes: list[Route | Mount] = [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", get_model),
        Route("/v1/completions", create_completion, methods=["POST"]),
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        Route("/v1/responses", create_response, methods=["POST"]),
        Route("/v1/embeddings", create_embeddings, methods=["POST"]),
        Route("/v1/classify", classify, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi_file),
        Route("/docs", docs),
        Route("/v1/{path:path}", no_such_path, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]
    page = serving.options.page
    if page is not None and (page / "index.html").is_file():
        routes.append(Mount("/", PageFiles(directory=page, html=True), name="page"))
    allowed = list(serving.options.allowed_origins)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=allowed,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After", "x-request-id"],
    )
    # Errors pass the routes and reach the guard, which answers them all in one form.
    app = Starlette(
        routes=routes,
        middleware=[*([cors] if allowed else []), Middleware(Guard, serving=serving)],
        exception_handlers={HTTPException: _raise},
    )
    app.state.serving = serving
    return app


async def _raise(_: Request, error: Exception) -> Response:
    raise error


async def no_such_path(request: Request) -> Response:
    """Answers 405 where the path has other methods, and 404 where it has none."""
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] == Match.PARTIAL:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(route.methods or ()))})
    raise HTTPException(404)


class PageFiles(StaticFiles):
    """The files of the chat page, with a policy that keeps browsers from loading anything else."""

    async def get_response(self, path: str, scope: object) -> Response:
        response = await super().get_response(path, scope)  # type: ignore[arg-type]
        response.headers["Content-Security-Policy"] = _PAGE_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": Serving.of(request).models.cards()})


async def get_model(request: Request) -> Response:
    return JSONResponse(Serving.of(request).models.find(request.path_params["name"]).card())


async def health(request: Request) -> Response:
    serving = Serving.of(request)
    if serving.draining or not serving.thread.healthy:
        return JSONResponse({"status": "draining" if serving.draining else "failing"}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    found = Serving.of(request).metrics
    return Response(found.text(), media_type=found.content_type)


async def openapi_file(request: Request) -> Response:
    return JSONResponse(openapi())


async def docs(request: Request) -> Response:
    return HTMLResponse(documentation(openapi()))
