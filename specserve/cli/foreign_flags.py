"""Flags of vLLM, SGLang and llama-server, and what to write instead.

A command that gets one says so, before argparse calls it unrecognised.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Final

from specserve.config import ConfigError
from specserve.types import SamplingParams

# Our flag, and the others' names for it.
_RENAMED: Final = {
    "--draft": "--model-draft -md --draft-model --hf-repo-draft -hfd --spec-type "
    "--speculative-model --speculative-algorithm --speculative-draft-model-path",
    "--generation-config": "--sampling-defaults",
    "--kv-memory": "--kv-cache-memory-bytes",
    "--logit-bias": "-l",
    "--max-model-len": "--ctx-size -c --context-length --n-ctx",
    "--max-nodes": "--draft-max --draft-n --spec-draft-n-max --num-speculative-tokens "
    "--speculative-num-draft-tokens --speculative-num-steps",
    "--max-num-batched-tokens": "--batch-size -b --ubatch-size -ub --chunked-prefill-size "
    "--max-prefill-tokens",
    "--max-num-seqs": "--parallel -np --max-running-requests",
    "--max-tokens": "--predict --n-predict -n --max-new-tokens",
    "--no-prefix-caching": "--no-enable-prefix-caching --disable-radix-cache --no-cache-prompt",
    "--prefix-caching": "--enable-prefix-caching --cache-prompt",
    "--prompt": "-p",
    "--prompts": "--file -f",
    "--repetition-penalty": "--repeat-penalty",
    "--request-timeout": "--timeout -to",
    "--seed": "-s --random-seed",
    "--served-model-name": "--alias -a",
    "--ssl-certfile": "--ssl-cert-file",
    "--ssl-keyfile": "--ssl-key-file",
    "--system": "--system-prompt -sys",
    "--temperature": "--temp",
    "--threads": "-t --threads-batch -tb --n-threads",
}
# What to do, and the flags that it answers. {command}: the command that was called.
_OTHERWISE: Final = {
    "the model has no flag: write {command} MODEL": "--model -m --model-path --hf-repo -hf -hfr",
    "download it, and write {command} FILE.gguf": "--hf-file -hff --model-url -mu --docker-repo "
    "-dr",
    "there is none: download that version, and give its directory": "--revision --code-revision "
    "--tokenizer-revision",
    "there is none: the hub's own variables HF_TOKEN and HF_HOME are read": "--hf-token -hft "
    "--download-dir",
    "there is none: tokenizer and chat template are those of the model's files": "--tokenizer "
    "--tokenizer-path --tokenizer-mode --chat-template --chat-template-file --jinja --no-jinja "
    "--chat-template-content-format --hf-config-path --config-format",
    "there is none: code that comes with a model is never run": "--trust-remote-code",
    "there is none: the format is recognised by the files": "--load-format --model-impl",
    "keys come from the environment or a file: SPECSERVE_API_KEYS or --api-key-file for serve, "
    "SPECSERVE_API_KEY for chat": "--api-key",
    "there is none: --allowed-origins is enough": "--allowed-methods --allowed-headers "
    "--allow-credentials",
    "there is none: the whole model is on one device, which --device names": "-tp --tp --tp-size "
    "--tensor-parallel-size -pp --pp-size --pipeline-parallel-size -dp --dp-size "
    "--data-parallel-size --enable-expert-parallel --distributed-executor-backend --tensor-split "
    "-ts --split-mode -sm --main-gpu -mg",
    "all layers are on one device: write --device cuda or --device cpu": "--gpu-layers -ngl "
    "--n-gpu-layers --gpu-layers-draft -ngld --n-gpu-layers-draft --cpu-moe --n-cpu-moe "
    "--override-tensor -ot --cpu-offload-gb --no-kv-offload -nkvo --device-draft -devd",
    "give an amount instead of a share, such as --kv-memory 20GiB": "--gpu-memory-utilization "
    "--mem-fraction-static --swap-space",
    "there is none: keys and values have the type of --dtype": "--kv-cache-dtype --cache-type-k "
    "-ctk --cache-type-v -ctv",
    "give a directory with these values to --generation-config": "--override-generation-config "
    "--preferred-sampling-params",
    "write --draft NAME or --draft DIRECTORY, and --max-nodes N": "--speculative-config -sc",
    "there is none: a tree is as large as it is worth, up to --max-nodes": "--draft-min "
    "--draft-n-min --spec-draft-n-min --draft-p-min --speculative-eagle-topk",
    "there is none: it is always done": "--enable-chunked-prefill --cont-batching -cb "
    "--flash-attn -fa --metrics --enable-metrics",
    "there is none: leave it out": "--mlock --mmap --no-mmap --numa --webui --no-webui --slots "
    "--props --enforce-eager --compilation-config -O --max-logprobs --attention-backend "
    "--context-shift --no-context-shift --rope-scaling --hf-overrides --task --runner "
    "--root-path --api-server-count --disable-frontend-multiprocessing --prio --poll",
    "there is none: the log has a line every --status-interval seconds": "--verbose -v "
    "--log-disable --disable-log-requests --enable-log-requests --disable-log-stats --log-level "
    "--uvicorn-log-level --disable-uvicorn-access-log",
    "tools and structured output are not supported": "--enable-auto-tool-choice "
    "--tool-call-parser --reasoning-parser --guided-decoding-backend --grammar --json-schema -j",
    "only text is generated, by one model": "--embedding --embeddings --is-embedding --pooling "
    "--rerank --reranking --mmproj --limit-mm-per-prompt --enable-lora --lora --lora-modules "
    "--lora-paths",
}
_SAMPLING: Final = {f"--{name.replace('_', '-')}" for name in SamplingParams.__struct_fields__}
OURS: Final = {flag: ours for ours, flags in _RENAMED.items() for flag in flags.split()}
ADVICE: Final = {flag: advice for advice, flags in _OTHERWISE.items() for flag in flags.split()}


def refuse_foreign_flags(words: Iterable[str], known: Collection[str], command: str) -> None:
    """Raise ConfigError if `words`, the arguments of `command`, have flags of other servers.

    `known`: the flags of the command. `command`: how it is called, such as "specserve serve".
    """
    found = dict(_explained(words, known, command))
    if len(found) == 1:
        ((flag, advice),) = found.items()
        raise ConfigError(f"{flag}: no flag of {command}; {advice}")
    if found:
        lines = "".join(f"\n  {flag}: {advice}" for flag, advice in found.items())
        raise ConfigError(f"these are no flags of {command}:{lines}")


def _explained(
    words: Iterable[str], known: Collection[str], command: str
) -> Iterator[tuple[str, str]]:
    """(flag, what to do) of every flag of other servers; flags may have _ for -."""
    for word in words:
        if word == "--":
            return
        flag = word.partition("=")[0]
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in known:
            continue
        ours = OURS.get(name, name if name in _SAMPLING or name in known else None)
        if ours is None:
            if name in ADVICE:
                yield flag, ADVICE[name].format(command=command)
        elif ours in known:
            yield flag, f"write {ours}"
        elif ours in _SAMPLING:
            yield flag, f"every request sets {ours.removeprefix('--').replace('-', '_')} itself"
        else:
            yield flag, f"other commands have it, as {ours}"
