"""Loads and connects the parts of an engine: model, KV memory, runner, verifier, drafters."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from specserve.cache.manager import KVCacheManager
from specserve.cache.storage import KVSpec, KVStorage
from specserve.config import ConfigError, EngineConfig
from specserve.engine.device import Platform, choose_platform
from specserve.engine.limits import Limits
from specserve.engine.memory import count_blocks
from specserve.models.fields import ModelError
from specserve.models.generation_config import read_default_sampling
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.models.shape import ModelShape
from specserve.runner.runner import Runner
from specserve.sampling import Sampler
from specserve.speculation.cost_model import CostModel
from specserve.speculation.drafter import DraftContext, Drafter, TargetLayers
from specserve.speculation.failures import loading
from specserve.speculation.interface_check import check_drafter, check_kv_spec
from specserve.speculation.registry import create_drafters
from specserve.text import Tokenizer
from specserve.types import SamplingParams
from specserve.verify.prompt_scorer import PromptScorer
from specserve.verify.verifier import Verifier


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What engines with the same settings share: everything but their requests."""

    config: EngineConfig
    platform: Platform
    model: Model
    runner: Runner
    verifier: Verifier
    scorer: PromptScorer
    drafters: Mapping[str, Drafter]
    aux_layers: tuple[int, ...]  # layers of the target whose hidden states the drafters want
    cost_model: CostModel  # not measured yet
    limits: Limits
    default_sampling: SamplingParams  # of a request that gives none

    def new_kv_manager(self) -> KVCacheManager:
        """An empty KV cache of `limits.num_kv_slots` tokens."""
        size, prefix_caching = self.config.cache.block_size, self.config.cache.prefix_caching
        num_blocks = self.limits.num_kv_slots // size
        return KVCacheManager(num_blocks, size, prefix_caching=prefix_caching)

    @property
    def max_context(self) -> int:
        """The most tokens, prompt and output, of one sequence."""
        return min(self.limits.max_model_len, self.limits.num_kv_slots)


def load_parts(
    config: EngineConfig,
    target: Path,
    tokenizer: Tokenizer | None,
    resolve: Callable[[str], Path] = Path,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EngineParts:
    """Load the model in the directory `target` and the drafters, and allocate KV memory.

    `resolve` finds the directory of a draft checkpoint. `on_stage` is told what is being done.
    Raises ConfigError, DraftError or ModelError if the parts do not fit together.
    """
    platform = choose_platform(config.target)
    if config.target.threads is not None:
        torch.set_num_threads(config.target.threads)
    shape = ModelShape.from_dir(target)
    recommended = config.target.generation_config
    default_sampling = read_default_sampling(target, recommended, shape.vocab_size)
    on_stage("preparing the drafters")
    drafters = create_drafters(config.draft.draft, config.draft.options, target, resolve)
    for name, drafter in drafters.items():
        check_drafter(name, drafter, shape.num_layers)
    on_stage("loading the weights")
    model = load_model(
        target,
        kernels=platform.kernels,
        dtype=platform.dtype,
        device=platform.device,
        exact=platform.exact,
        quantization=config.target.quantization,
        packed_kv_dtype=platform.packed_kv_dtype,
    )
    limits, kv_specs = _limits(config, platform, model, drafters, tokenizer)
    on_stage(f"making room for {limits.num_kv_slots} tokens")
    wanted = {layer for drafter in drafters.values() for layer in drafter.aux_layers}
    aux_layers = tuple(sorted(wanted))
    runner = Runner(
        model,
        KVStorage(model.kv_spec, limits.num_kv_slots, platform.device),
        config.cache.block_size,
        platform.device,
        platform.kernels,
        max(1, *(drafter.needs_topk for drafter in drafters.values())),
        aux_layers,
    )
    sampler, ends = Sampler(platform.kernels, platform.device), end_tokens(model.shape, tokenizer)
    verifier = Verifier(sampler, ends, model.shape.vocab_size, tokenizer)
    parts = EngineParts(
        *(config, platform, model, runner, verifier, PromptScorer(model), drafters, aux_layers),
        CostModel(),
        limits,
        default_sampling,
    )
    on_stage("loading the drafters")
    _bind_drafters(parts, kv_specs)
    return parts


def _limits(
    config: EngineConfig,
    platform: Platform,
    model: Model,
    drafters: Mapping[str, Drafter],
    tokenizer: Tokenizer | None,
) -> tuple[Limits, dict[str, KVSpec]]:
    """What the engine can serve, and the KV that drafters need, by name."""
    longest = model.shape.max_position_embeddings
    max_model_len = config.target.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(
            f"max_model_len: {max_model_len} is more than the model was built for; "
            f"use at most {longest}"
        )
    kv_specs = {}
    for name, drafter in drafters.items():
        with loading(name):
            if (spec := check_kv_spec(name, drafter, drafter.kv_spec(model.dtype))) is not None:
                kv_specs[name] = spec
    num_blocks = count_blocks(
        config.cache,
        sum(spec.bytes_per_slot for spec in [model.kv_spec, *kv_specs.values()]),
        max_model_len,
        config.schedule.max_num_seqs,
        platform.device,
    )
    limits = Limits(
        vocab_size=model.shape.vocab_size,
        max_model_len=max_model_len,
        max_position_embeddings=longest,
        num_kv_slots=num_blocks * config.cache.block_size,
        stop_strings=tokenizer is not None,
        drafters=tuple(drafters),
    )
    return limits, kv_specs


def _bind_drafters(parts: EngineParts, kv_specs: Mapping[str, KVSpec]) -> None:
    """Give every drafter its context, and memory for the KV that it needs (`kv_specs`)."""
    config, platform, model = parts.config, parts.platform, parts.model
    layers = TargetLayers(model.embed, model.final_norm, model.unembed, model.packed_embedding)
    for name, drafter in parts.drafters.items():
        kernels, storage = copy(platform.kernels), None
        if (spec := kv_specs.get(name)) is not None:
            storage = KVStorage(spec, parts.limits.num_kv_slots, platform.device)
        context = DraftContext(
            device=platform.device,
            kernels=kernels,
            vocab_size=model.shape.vocab_size,
            block_size=config.cache.block_size,
            sampler=Sampler(kernels, platform.device),
            sampling_state=lambda seq: parts.verifier.state_of(seq.id).copy(),
            storage=storage,
            target=layers,
            load_model=partial(
                load_model,
                kernels=kernels,
                dtype=model.dtype,
                device=platform.device,
                exact=platform.exact,
                quantization=config.target.quantization,
            ),
            step_seconds=parts.cost_model.step_seconds if config.draft.cost_aware else None,
        )
        with loading(name):
            drafter.bind(context)


def end_tokens(shape: ModelShape, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids in config.json and generation_config.json and those that the tokenizer's files name.

    The union, because the files of a fine-tuned model often disagree. Raises `ModelError` if an end
    token of the tokenizer is outside the model's vocabulary.
    """
    if tokenizer is None:
        return shape.eos_token_ids
    for token in tokenizer.eos_ids:
        if token >= shape.vocab_size:
            raise ModelError(
                f"{tokenizer.directory}/tokenizer_config.json: the end token has id {token}, and "
                f"vocab_size is {shape.vocab_size} in config.json; use the tokenizer that belongs "
                f"to the weights"
            )
    return tuple(dict.fromkeys((*shape.eos_token_ids, *tokenizer.eos_ids)))
