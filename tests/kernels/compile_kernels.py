"""Compile every Triton kernel for Hopper; needs no device. Run as a script, not in a test process:
kernels imported there may belong to the interpreter."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specserve_kernels.triton import attention_kernels, draft_loss, kv, sampler

MODEL = {"NUM_KV_HEADS": 2, "GROUP": 3, "HEAD_DIM": 80, "DIM": 128, "BLOCK_M": 16}
SPLIT = {"BLOCK_SIZE": 16, "BLOCK_N": 32, "TREE_N": 16, "SPLIT": 256}
# Pointers are named by what they point at, every other argument is int32 unless it is named here.
POINTERS = {
    "*i32": "work merges segments tables ids counts",
    "*i64": "words slots src dst seeds positions token_ids best rows",
    "*i1": "sampled prompt_mask",
    "*fp32": "partial_out partial_stats tops noise logits repetition frequency presence "
    "p mass log_p weights loss accepted",
    "fp32": "scale eta",
}
TYPES = {name: type_name for type_name, names in POINTERS.items() for name in names.split()}


def compile_for_hopper(kernel: Any, constants: dict[str, Any], **types: str) -> None:
    names: list[str] = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, TYPES.get(name, "i32"))
        for name in names
    }
    positions = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=positions)
    options = {"enable_fp_fusion": False}
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    size = {"SIZE": 1024}
    for dtype, windowed in (("*bf16", False), ("*fp32", True)):
        tensors = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache", "out", "kv"), dtype)
        attend = {**MODEL, **SPLIT, "WINDOWED": windowed}
        compile_for_hopper(attention_kernels.attend_split, attend, **tensors)
        compile_for_hopper(attention_kernels.merge_splits, {**MODEL, "LANES": 16}, **tensors)
        compile_for_hopper(kv.write_row, {"SIZE": 160, "BLOCK": 256}, **tensors)
        moves = {"NUM_HEADS": 2, "HEAD_DIM": 80, "DIM": 128, "MOVES": 16}
        compile_for_hopper(kv.move_rows, moves, **tensors)
    for kernel in (sampler.noise_of_tokens, sampler.block_argmax, sampler.penalise):
        compile_for_hopper(kernel, size, out="*fp32")
    compile_for_hopper(sampler.first_of_best, {"SIZE": 16})
    for hybrid in (False, True):
        loss = {"SIZE": 2048, "HYBRID": hybrid}
        compile_for_hopper(draft_loss.draft_loss_row, loss, logits="*bf16")


if __name__ == "__main__":
    main()
