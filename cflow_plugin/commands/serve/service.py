"""What Ray Serve runs: one deployment a model, and one that takes requests and passes them on."""

__all__ = ["Settings", "make_service"]

import asyncio
import hmac
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from cflow_plugin.commands.score.parts import Row
from cflow_plugin.commands.score.scorer import Scorer, Settings
from cflow_plugin.commands.serve.protocol import RequestError, answer, image_of, metadata, result_of
from cflow_plugin.deploy.runtime import bits_of, read_file

_BODY = 64 * 2**20  # bytes of a request
_PATIENCE = 30.0  # seconds for its body
_BATCH = 16
_GATHERING = 0.001  # seconds that a request waits for others

app = FastAPI(title="cflow_plugin", docs_url=None, redoc_url=None, openapi_url=None)


@app.exception_handler(HTTPException)
async def _failed(request: Request, error: HTTPException) -> JSONResponse:
    del request
    return JSONResponse({"error": error.detail}, error.status_code)


# In front of the deployments: Ray notes what they refer to where they are defined.
async def _body(request: Request) -> bytes:
    """The request's content, if it is not too large and does not come too slowly."""

    async def read() -> bytes:
        found = bytearray()
        async for piece in request.stream():
            found += piece
            if len(found) > _BODY:
                raise HTTPException(413, f"At most {_BODY // 2**20} MiB.")
        return bytes(found)

    try:
        return await asyncio.wait_for(read(), _PATIENCE)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, "The request came too slowly.") from error


@serve.deployment(max_ongoing_requests=2 * _BATCH)
class Model:
    """An exported model, whose replicas score what has arrived meanwhile together."""

    def __init__(self, settings: Settings) -> None:
        self._scorer = Scorer(settings)
        self._thread = ThreadPoolExecutor(1)  # the only one that calls it

    @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_GATHERING)
    async def __call__(self, images: list[bytes | np.ndarray]) -> list[Row]:
        """Score images of requests that are here at the same time."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._scorer, images)


@serve.deployment(max_ongoing_requests=100)
@serve.ingress(app)
class Service:
    """Takes requests and passes them on.

    Args:
        models: By their names.
        bits: Bits of a value in their images.
        token: What a client has to bring along, as ``Authorization: Bearer …``, or ``None``.
    """

    def __init__(self, models: Mapping[str, DeploymentHandle], bits: Mapping[str, int], token: str | None) -> None:
        self._models, self._bits, self._token = models, bits, token

    def _check(self, request: Request, name: str | None = None) -> None:
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "Send the token: Authorization: Bearer …")
        if name is not None and name not in self._models:
            raise HTTPException(404, f"There is no such model; there are {', '.join(self._models)}.")

    async def _score(self, name: str, image: bytes | np.ndarray) -> Row:
        row = await self._models[name].remote(image)
        if row.error is not None:
            raise HTTPException(422, f"The image {row.error}.")
        return row

    @app.post("/score/{name}")
    async def score(self, name: str, request: Request) -> dict[str, Any]:
        """An image file in, its score and decision out."""
        self._check(request, name)
        return result_of(name, await self._score(name, await _body(request)))

    @app.get("/models")
    async def models(self, request: Request) -> list[str]:
        """The models' names."""
        self._check(request)
        return list(self._models)

    # The Open Inference Protocol

    @app.get("/v2")
    async def server(self) -> dict[str, Any]:
        """What answers."""
        return {"name": "cflow_plugin", "version": "2", "extensions": []}

    @app.get("/v2/health/{state}")
    async def health(self, state: str) -> dict[str, bool]:
        """Whether it does; models are loaded before requests are taken."""
        if state not in ("live", "ready"):
            raise HTTPException(404, "Ask for live or ready.")
        return {state: True}

    @app.get("/v2/models/{name}")
    async def metadata(self, name: str, request: Request) -> dict[str, Any]:
        """What a model takes and gives."""
        self._check(request, name)
        return metadata(name, self._bits[name])

    @app.get("/v2/models/{name}/ready")
    async def ready(self, name: str, request: Request) -> dict[str, Any]:
        """Whether a model is loaded."""
        self._check(request, name)
        return {"name": name, "ready": True}

    @app.post("/v2/models/{name}/infer")
    async def infer(self, name: str, request: Request) -> dict[str, Any]:
        """Pixels or an image file as a tensor in, tensors out."""
        self._check(request, name)
        body = await _body(request)
        try:
            image, number = await asyncio.to_thread(image_of, body)
        except RequestError as error:
            raise HTTPException(400, str(error)) from error
        return answer(name, number, await self._score(name, image))


def make_service(models: Mapping[str, Settings], replicas: int, token: str | None) -> serve.Application:
    """All models behind one address.

    Args:
        models: How each is run, by name.
        replicas: Replicas of each.
        token: See :class:`Service`.
    """
    options = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0}}  # they share the machine's
    deployments = {
        name: Model.options(name=name, **options).bind(settings)  # pyright: ignore[reportAttributeAccessIssue]
        for name, settings in models.items()
    }
    bits = {name: bits_of(read_file(settings.model)[0]) for name, settings in models.items()}
    placed = Service.options(ray_actor_options={"num_cpus": 0})  # pyright: ignore[reportFunctionMemberAccess]
    return placed.bind(deployments, bits, token)
