// A draft head over the target's layers (EAGLE-3, Li et al. 2025): rows out of taps, and trees that
// grow by their most likely paths, a few nodes of every tree at a time.
#pragma once

#include <cstdint>

#include "decoder.h"

namespace specserve {

// Everything here is filled by draft_head.py, field by field.
struct DraftHead {
    const Decoder* decoder;  // with a row_norm
    Linear fc;
    const float* tap_norms;  // [inputs of fc], num_norms of them side by side; 0: none
    int64_t num_norms;
    int64_t norm_output;  // what is gone on from is normed
    float logit_scale;
    const int64_t* token_ids;  // [vocab_size] the target's
    int64_t vocab_size;
};

struct GrowShape {
    int64_t branching;  // candidates kept per node, at most kMaxCandidates
    int64_t beam;       // nodes of a tree looked at per pass
    int64_t max_depth;
    double min_score;  // nodes less likely are not looked at
};

// One tree to grow. Candidates are ranked by log q at temperature 0, else by log q / T + g.
struct Growing {
    const int32_t* lane;    // slots of all pairs before the root, then of the nodes
    int64_t num_context;    // pairs before the root
    int64_t num_waiting;    // the last ones of them, which are not in the cache yet
    const int64_t* waiting; // [num_waiting] their tokens
    const float* taps;      // [num_waiting + 1][inputs of fc], of those pairs and the root's
    int64_t root;
    int64_t position;  // of the root's pair, for RoPE
    int64_t budget;    // nodes, the root included
    float temperature;
    float top_p;
    float min_p;
    int64_t top_k;  // 0: all
    uint64_t seed;
    int64_t draw_position;  // of the root's successors, for the noise
    // What comes out: num_nodes of them, parents first.
    int64_t num_passes;  // in which nodes of it were looked at
    int64_t num_nodes;
    int64_t* tokens;   // [budget]
    int64_t* parents;  // [budget], -1 the root's
    double* scores;    // [budget] probabilities of paths
};

struct DraftCache {
    void* kv;  // as `Pass::kv`
    int64_t num_slots;
    int64_t wide;
};

// taps [num_rows][inputs of fc] -> rows [num_rows][outputs of fc]
void fuse(const DraftHead& head, const float* taps, int64_t num_rows, float* rows, int num_threads);

void grow(const DraftHead& head, const GrowShape& shape, const DraftCache& cache, Growing* trees,
          int64_t num_trees, int num_threads);

}  // namespace specserve
