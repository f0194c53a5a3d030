// Top-k table: the last tokens of a text -> the most likely next tokens according to the target.
// The C++ version of reference/topk_table.py. It works on the memory of a numpy array.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tree.h"

namespace specserve {

constexpr int kOrders = 3;  // contexts of 1 .. kOrders tokens
constexpr int kWidth = 4;   // next tokens per context

using Context = std::array<int64_t, kOrders>;  // the last token first; -1 before the text

// Explained in reference/topk_table.py.
struct TopKTableNumbers {
    std::array<float, 256> probs;  // probability of each stored step
    double steps_per_octave;       // steps in which a probability halves
    std::array<float, kOrders> learning_rate;  // by order
    std::array<double, kOrders> weight;        // by order
};

class TopKTable {
public:
    // rows: {uint16 tag, tokens[kWidth], uint8 prob_steps[kWidth]} without padding, tokens of 2 or
    // 4 bytes. `num_bytes` holds a power of two of them.
    TopKTable(
        uint8_t* rows, int64_t num_bytes, int token_bytes, const TopKTableNumbers& numbers)
        : rows_(rows),
          token_bytes_(token_bytes),
          row_bytes_(2 + kWidth * (token_bytes + 1)),
          num_rows_(num_bytes / row_bytes_),
          numbers_(numbers) {}

    // Updates the context's rows of all orders. tokens, probs: [kWidth], the best first. A context
    // that is new under this salt starts from the row without salt, if there is one.
    void write(
        uint64_t salt, const Context& context, const int64_t* tokens, const float* probs) const;

    // Writes the context of every node of a tree. before: the tokens before the root, the latest
    // first. best, logits: [num_nodes][kWidth], the best next tokens and their logits; nodes with a
    // token of -1 or a probability that is not finite are skipped.
    void learn(
        uint64_t salt,
        const std::array<int64_t, kOrders - 1>& before,
        const TreeView& tree,
        const int64_t* best,
        const float* logits) const;

    // Writes for every token the next one with probability 1, without salt.
    void learn_text(const std::vector<int64_t>& tokens) const;

    // A tree of the likely paths that continue a context, whose last token is the root. Of several
    // salts the first one with a row for the context counts. `request_table`, if any, is the
    // table of this text alone, without salts; it is mixed in at every order.
    Tree grow(
        const std::vector<uint64_t>& salts,
        const Context& context,
        int num_known,  // number of tokens in the context
        int max_nodes,
        double min_probability,
        uint8_t drafter_id,
        const TopKTable* request_table) const;

private:
    struct Row {
        uint16_t tag;
        uint32_t tokens[kWidth];
        uint8_t prob_steps[kWidth];
    };

    Row read(int64_t row) const;
    bool find(uint64_t state, Row& row) const;
    void put(int64_t row, const Row& value) const;
    uint8_t step_of(float prob) const;

    uint8_t* rows_;
    int64_t token_bytes_, row_bytes_, num_rows_;
    TopKTableNumbers numbers_;
};

}  // namespace specserve
