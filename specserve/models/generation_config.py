"""Reads generation_config.json: end tokens, and the sampling parameters that the model recommends.

The recommended ones are the defaults of requests that do not give these parameters. No torch.
"""

from pathlib import Path
from typing import Final

import msgspec

from specserve.config import ConfigError
from specserve.files import is_there
from specserve.models.fields import MAX_INTEGER, Fields, read_json
from specserve.types import MIN_TEMPERATURE, RequestError, SamplingParams

FILE_NAME: Final = "generation_config.json"
RECOMMENDED: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_config(directory: Path) -> Fields:
    """The fields of the directory's generation_config.json; none if there is no such file.

    Raises `ModelError` if the file is not a JSON object.
    """
    path = directory / FILE_NAME
    return Fields(read_json(path) if is_there(path) else {}, str(path))


def read_default_sampling(
    model: Path, setting: str, vocab_size: int = MAX_INTEGER
) -> SamplingParams:
    """The sampling parameters of a request that gives none.

    `setting` is "auto" for the file in the directory `model`, "none" for no file, or a directory
    with another file. `do_sample: false` means temperature 0, and so does a temperature that is
    too small to divide by. `top_k` 0, -1 or above `vocab_size` keeps all tokens. Raises
    `ModelError` naming file, field and value if a request could not have this value, and
    `ConfigError` if the other directory has no such file.
    """
    if setting == "none":
        return SamplingParams()
    directory = model if setting == "auto" else Path(setting).expanduser()
    if setting != "auto" and not is_there(directory / FILE_NAME):
        raise ConfigError(
            f"generation_config: there is no {directory / FILE_NAME}; give auto (the model's own "
            f"file), none, or a directory that has one"
        )
    fields = read_generation_config(directory)
    given = {name: fields.get(name) for name in RECOMMENDED if fields.has(name)}
    temperature, top_k = given.get("temperature"), given.get("top_k")
    if type(temperature) is float and 0.0 < temperature < MIN_TEMPERATURE:
        given["temperature"] = 0.0
    if type(top_k) is int and (top_k == -1 or top_k > vocab_size):
        given["top_k"] = 0
    defaults = SamplingParams(**given)
    try:
        defaults.validate(vocab_size)
    except RequestError as error:
        fields.fail(
            error.param,
            f"{error.message}; correct it, or use --generation-config none to ignore such values",
        )
    if not fields.flag("do_sample", True):
        defaults = msgspec.structs.replace(defaults, temperature=0.0)
    return defaults


def describe_sampling(defaults: SamplingParams) -> str:
    """The temperature, and the other recommended parameters that have an effect, as text."""
    plain, values = SamplingParams(), {name: getattr(defaults, name) for name in RECOMMENDED}
    return ", ".join(
        f"{name} {value:g}"
        for name, value in values.items()
        if name == "temperature" or value != getattr(plain, name)
    )
