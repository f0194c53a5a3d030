// A draft head over the target's layers (EAGLE-3, Li et al. 2025). Fuses auxiliary hidden states,
// and expands draft trees best-first by path probability, a few nodes of every tree per
// forward pass.
#pragma once

#include <cstdint>

#include "decoder.h"

namespace specserve {

// cpu/draft_head.py fills all structs of this file, field by field; the terms are explained in
// specserve_kernels/draft_head.py.
struct DraftHead {
    const Decoder* decoder;  // hidden_norm is set
    Linear fc;               // auxiliary hidden states -> fused hidden states
    const float* aux_norms;  // [inputs of fc], num_norms norms of equal size
    int64_t num_norms;       // 0: none
    int64_t norm_output;     // the output, from which expansion continues, is normalized
    float logit_scale;
    const int64_t* token_ids;  // [vocab_size] ids of the target
    int64_t vocab_size;
};

struct ExpansionLimits {
    int64_t branching;  // candidates kept per expanded node, at most kMaxCandidates
    int64_t beam;       // nodes of a tree expanded per forward pass
    int64_t max_depth;  // only nodes of a smaller depth are expanded; the root has 0
    double min_probability;  // nodes with a lower path probability are not expanded
};

// One tree to expand. Candidates are ranked by log q at temperature 0, else by log q / T + g.
struct ExpansionTask {
    const int32_t* slot_list;       // of draft inputs before the root, then of nodes
    int64_t num_context;            // draft inputs before the root
    int64_t num_pending;            // the last ones of them, whose K and V are not cached yet
    const int64_t* pending_tokens;  // [num_pending]
    const float* aux_hidden;        // [num_pending + 1][inputs of fc], of these and of the root
    int64_t root;                   // token id
    int64_t position;  // RoPE position of the root's draft input
    int64_t budget;    // nodes, the root included
    float temperature;
    float top_p;
    float min_p;
    int64_t top_k;  // 0: all
    uint64_t seed;
    int64_t noise_position;  // noise position of the root's successors
    // Results: num_nodes nodes, parents before children.
    int64_t num_passes;  // forward passes in which nodes of this tree were expanded
    int64_t num_nodes;
    int64_t* tokens;   // [budget]
    int64_t* parents;  // [budget], -1 for the root
    double* path_probs;  // [budget]
};

}  // namespace specserve
