"""Checks, when a drafter is loaded, that it has what the engine will call.

Without them a method that is missing or takes other arguments would only be noticed when it is
called, and a request would go on without drafts.
"""

from collections.abc import Callable
from inspect import Parameter, Signature, isclass, isfunction, signature
from typing import Any, Final, cast

from specserve.cache.storage import KVSpec
from specserve.files import quoted
from specserve.speculation.drafter import Drafter, DraftError, DraftOptions, NoModelDrafter
from specserve_kernels.decoder import MAX_TOP

_METHODS: Final = [
    name for name, value in vars(Drafter).items() if isfunction(value) and not name.startswith("_")
]


def check_class(name: str, found: Any) -> type[Drafter]:
    """`found` itself. Raises DraftError if it is no class that can be made a drafter."""
    if not isclass(found):
        raise DraftError(
            f"draft: {name!r}: {quoted(found)} is no class; expected one with the methods of "
            f"{Drafter.__module__}.Drafter"
        )
    options = getattr(found, "Options", None)
    if not isclass(options) or not issubclass(options, DraftOptions):
        raise _error(
            name, found, f"Options: {quoted(options)}; expected a subclass of DraftOptions"
        )
    _check_call(name, found, "__init__", Drafter.__init__, found)
    return cast(type[Drafter], found)


def check_drafter(name: str, drafter: Drafter, num_layers: int) -> None:
    """Raise DraftError, naming the class, the method or attribute at fault, and what is expected.

    `num_layers` is that of the target.
    """
    kind = type(drafter)
    for method in _METHODS:
        expected = getattr(Drafter, method)
        found = getattr(drafter, method, None)
        if not callable(found) or getattr(kind, method, None) is expected:
            raise _error(name, kind, f"has no method {method}; expected {_shown(method, expected)}")
        _check_call(name, kind, method, expected, found)
    if isinstance(drafter, NoModelDrafter) and kind is not NoModelDrafter:
        method, expected = "propose_tree", NoModelDrafter.propose_tree
        if kind.propose is NoModelDrafter.propose and type(drafter).propose_tree is expected:
            wanted = f"{_shown(method, expected)}, or the method propose"
            raise _error(name, kind, f"proposes nothing; expected {wanted}")
        _check_call(name, kind, method, expected, drafter.propose_tree)
    layers, topk = getattr(drafter, "aux_layers", None), getattr(drafter, "needs_topk", None)
    if not isinstance(layers, tuple) or not all(_within(layer, num_layers) for layer in layers):
        wanted = f"expected a tuple of layers, 0 to {num_layers}"
        raise _error(name, kind, f"aux_layers: {quoted(layers)}; {wanted}")
    if not _within(topk, MAX_TOP):
        wanted = f"expected a number of tokens, 0 to {MAX_TOP}"
        raise _error(name, kind, f"needs_topk: {quoted(topk)}; {wanted}")


def check_kv_spec(name: str, drafter: Drafter, spec: Any) -> KVSpec | None:
    """`spec`, which `kv_spec` returned. Raises DraftError if it is of another type."""
    if spec is not None and not isinstance(spec, KVSpec):
        wrong = f"kv_spec returned {quoted(spec)}; expected a KVSpec or None"
        raise _error(name, type(drafter), wrong)
    return spec


def _check_call(
    name: str, kind: type, method: str, expected: Callable[..., Any], found: Callable[..., Any]
) -> None:
    """Raise DraftError if `found` cannot be called as `expected` is, by position."""
    try:
        parameters = signature(found)
    except ValueError:  # compiled, and does not say
        return
    try:
        parameters.bind(*list(signature(expected).parameters)[1:])
    except TypeError:
        taken = _shown(method, Signature([_SELF, *parameters.parameters.values()]))
        raise _error(name, kind, f"has {taken}; expected {_shown(method, expected)}") from None


_SELF: Final = Parameter("self", Parameter.POSITIONAL_ONLY)


def _shown(method: str, parameters: Signature | Callable[..., Any]) -> str:
    """Such as 'propose(self, seqs, budgets)', without types."""
    if not isinstance(parameters, Signature):
        parameters = signature(parameters)
    names = [each.replace(annotation=each.empty) for each in parameters.parameters.values()]
    return f"{method}{Signature(names)}".replace("(self, /", "(self")


def _within(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _error(name: str, kind: type, wrong: str) -> DraftError:
    return DraftError(f"draft: {name!r}: {kind.__module__}.{kind.__qualname__} {wrong}")
