"""GET /v1/models: the one model that is served."""

from typing import Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from services.gateway.served_model import ServedModel


class ModelDescription(BaseModel):
    """One model, as OpenAI describes it, with vLLM's limit."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "prfaas"
    max_model_len: int


class ModelList(BaseModel):
    """All models."""

    model_config = ConfigDict(frozen=True)

    object: Literal["list"] = "list"
    data: list[ModelDescription]


class ModelsEndpoint:
    """Names the served model."""

    def __init__(self, model: ServedModel) -> None:
        description = ModelDescription(
            id=model.name, created=model.created, max_model_len=model.max_length
        )
        self._body = ModelList(data=[description]).model_dump_json()

    async def list_models(self, _: web.Request) -> web.Response:
        """Answer the list."""
        return web.Response(text=self._body, content_type="application/json")
