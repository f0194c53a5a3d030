"""GET /v1/models and /v1/models/{id}"""

from aiohttp import web
from msgspec import convert

from specserve.server.protocol.others import DefaultSampling, Model, ModelList
from specserve.server.routes.reply import reply
from specserve.server.service import SERVICE, Service


async def list_models(request: web.Request) -> web.Response:
    return reply(ModelList((_model(request.app[SERVICE]),)))


async def get_model(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.check_model(request.match_info["model"])
    return reply(_model(service))


def _model(service: Service) -> Model:
    info = service.engine_info()
    sampling = convert(info.default_sampling, DefaultSampling, from_attributes=True)
    return Model(
        id=service.model_name,
        created=service.created,
        root=service.model_name,
        max_model_len=info.limits.max_model_len,
        default_sampling_params=sampling,
    )
