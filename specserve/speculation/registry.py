"""Drafter names and where their code lives; nothing is imported until it is asked for.

Other distributions add drafters through the entry-point group `specserve.drafters`, each as
`name = "module:Class"`. A name of `BUILTIN` always means the built-in drafter.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

import msgspec
from safetensors import SafetensorError, safe_open

from specserve.files import FileError, check_file, quoted
from specserve.hub.resolve import base_name
from specserve.models.fields import ModelError, read_json
from specserve.speculation.drafter import Drafter, DraftError, DraftOptions
from specserve.speculation.failures import loading
from specserve.speculation.interface_check import check_class

BUILTIN = {
    "none": "specserve.speculation.drafter:NoModelDrafter",
    "ngram": "specserve_drafts.ngram:NgramDrafter",
    "suffix": "specserve_drafts.suffix.drafter:SuffixDrafter",
    "recycle": "specserve_drafts.recycle.drafter:RecycleDrafter",
    "draft_lm": "specserve_drafts.draft_lm:DraftLM",
    "eagle": "specserve_drafts.eagle.drafter:EagleDrafter",
    "medusa": "specserve_drafts.medusa.drafter:MedusaDrafter",
}
# What "auto" stands for; a function finds the pretrained draft for a target, if there is one.
AUTO = {"recycle": None, "eagle": "specserve_drafts.compatibility:pretrained_head"}
ENTRY_POINT_GROUP = "specserve.drafters"


def drafter_names() -> list[str]:
    """Every registered name, built in or installed."""
    return sorted({*BUILTIN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def expanded(specs: Sequence[str], target: Path) -> list[str]:
    """The same, each once, with the drafters that "auto" stands for in its place."""
    automatic = [
        name for name, finder in AUTO.items() if not finder or resolve_name(finder)(target)
    ]
    names = [name for spec in specs for name in (automatic if spec == "auto" else (spec,))]
    return list(dict.fromkeys(names))


def load_drafter(name: str) -> type[Drafter]:
    """The class registered under `name`. Raises DraftError if there is none that can be made."""
    if name in BUILTIN:
        return check_class(name, resolve_name(BUILTIN[name]))
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return check_class(name, point.load())
    known = ["auto", *drafter_names()]
    hint = _hint(name, known, "")
    raise DraftError(
        f"draft: {name!r} is neither a drafter ({', '.join(known)}) "
        f"nor a checkpoint directory{hint and '; '}{hint}"
    )


def _hint(name: str, known: Collection[str], otherwise: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def public_names(specs: Sequence[str]) -> list[str]:
    """What clients call each drafter: a checkpoint by the last part of its path."""
    names: list[str] = []
    for spec in specs:
        name = base_name(spec)
        taken = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{taken + 1}" if taken else name)
    return names


def find_drafter(spec: str, resolve: Callable[[str], Path]) -> tuple[str, Path | None]:
    """The registered name that `spec` stands for, and the directory that `resolve` finds if it is a
    checkpoint. Raises DraftError."""
    if spec in BUILTIN or spec in drafter_names():  # looking for installed ones takes longer
        return spec, None
    try:
        path = resolve(spec)
    except ValueError as error:
        load_drafter(spec)  # says what would have been possible, if it is not a path
        raise DraftError(f"draft: {error}") from error
    return checkpoint_method(path), path


def check_options(options: Mapping[str, Any], running: Collection[str]) -> None:
    """Raise DraftError if `options` names a drafter that is not `running`: it would be ignored."""
    for name in options:
        if name in running:
            continue
        reason = "does not run here" if name in drafter_names() else "is no drafter"
        raise DraftError(
            f"draft.options.{name[:80]}: {name[:80]!r} {reason}, where these run: "
            f"{', '.join(sorted(running))}; {_hint(name, running, 'remove its options')}"
        )


def create_drafters(
    specs: Sequence[str],
    options: dict[str, dict[str, Any]],
    target: Path,
    resolve: Callable[[str], Path],
) -> dict[str, Drafter]:
    """The drafters of a configuration, by public name. Raises DraftError."""
    specs = expanded(specs, target)
    check_options(options, {find_drafter(spec, resolve)[0] for spec in specs})
    return {
        name: create_drafter(spec, options, target, resolve)
        for name, spec in zip(public_names(specs), specs, strict=True)
    }


def create_drafter(
    spec: str,
    options: dict[str, dict[str, Any]],
    target: Path,
    resolve: Callable[[str], Path],
) -> Drafter:
    """The drafter of that name or checkpoint; `options` are by drafter. Raises DraftError."""
    name, path = find_drafter(spec, resolve)
    with loading(name):
        drafter = load_drafter(name)
        return drafter(_read_options(name, options.get(name, {}), drafter.Options), path, target)


def _read_options(name: str, given: dict[str, Any], kind: type[DraftOptions]) -> DraftOptions:
    """The options of the drafter `name`. Raises DraftError, naming the option and its value."""
    known = kind.__struct_fields__
    for key in given:
        if key not in known:
            hint = _hint(key, known, f"known: {', '.join(known) or 'none'}")
            raise DraftError(f"draft.options.{name}.{key[:80]}: unknown option; {hint}")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise DraftError(f"draft.options.{name}.{invalid_field(error, given, kind)}") from error


def invalid_field(
    error: msgspec.ValidationError, given: Mapping[str, Any], kind: type[msgspec.Struct]
) -> str:
    """The field of `kind` at fault, its value, and what is expected instead."""
    expected, _, place = str(error).replace("`", "").partition(" - at $.")
    if not place:  # from `__post_init__`
        return expected
    expected = expected[:1].lower() + expected[1:]
    if place not in given:  # a part of an option
        return f"{place}: {expected}"
    if "=" in expected and (limits := _range(kind, place)) is not None:
        low, high = limits
        return f"{place}: {given[place]!r} is out of range; expected {low} to {high}"
    return f"{place}: {quoted(given[place])}; {expected}"


def _range(kind: type[msgspec.Struct], option: str) -> tuple[float, float] | None:
    """The least and the largest value of an option, if its annotation has both."""
    hint = get_type_hints(kind, include_extras=True)[option]
    for part in (hint, *get_args(hint)):  # an option may be `Annotated[...] | None`
        for meta in get_args(part):
            if isinstance(meta, msgspec.Meta) and meta.ge is not None and meta.le is not None:
                return meta.ge, meta.le
    return None


def checkpoint_method(path: Path) -> str:
    """Which drafter a checkpoint directory is for, from its config.json and its tensors' names."""
    try:
        config = read_json(path / "config.json")
    except ModelError as error:
        raise DraftError(f"draft: {error}") from error
    if isinstance(method := config.get("specserve_method"), str):
        return method
    architectures = config.get("architectures") or ["(none)"]
    if not isinstance(architectures, list):
        architectures = [architectures]
    if "medusa_num_heads" in config or config.get("model_type") == "medusa":
        return "medusa"
    if _is_eagle(path, config, str(architectures[0])):
        return "eagle"
    if str(architectures[0]).endswith("ForCausalLM"):
        return "draft_lm"
    raise DraftError(
        f"draft: {path}/config.json has architectures {quoted(architectures)}; "
        "expected a causal language model (…ForCausalLM), an EAGLE or Medusa head or a draft "
        "made by specserve tune"
    )


def _is_eagle(path: Path, config: dict[str, Any], architecture: str) -> bool:
    """Files of EAGLE-3 say what they are, or have a vocabulary of their own. Those of EAGLE-1 and 2
    may claim to be a language model of any family, but none of these has their fc."""
    if "speculators_model_type" in config or "draft_vocab_size" in config:
        return True
    if "eagle" in f"{architecture} {config.get('model_type')}".lower():
        return True
    names = _tensor_names(path)
    if names is None:  # the reader of heads says what to do about the files
        alone = config.get("num_hidden_layers") == 1 and not (path / "tokenizer.json").exists()
        return architecture.endswith("ForCausalLM") and alone
    return not names.isdisjoint({"fc.weight", "model.fc.weight"})


def _tensor_names(path: Path) -> set[str] | None:
    """Of all safetensors files in a directory; None without one that can be read."""
    names: set[str] | None = None
    for file in path.glob("*.safetensors"):
        with suppress(OSError, FileError, SafetensorError):
            check_file(file)
            with safe_open(file, framework="numpy") as tensors:
                names = (names or set()) | set(tensors.keys())
    return names
