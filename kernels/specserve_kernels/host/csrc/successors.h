// The last tokens of a text -> what the target held likely next: the C++ half of
// specserve_drafts/successors.py, whose memory it works on.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tree.h"

namespace specserve {

constexpr int kOrders = 3;  // contexts of 1 .. kOrders tokens
constexpr int kWidth = 4;   // successors of each

using Context = std::array<int64_t, kOrders>;  // the last token first; -1 before the text

// The numbers of successors.py, where they are explained.
struct SuccessorNumbers {
    std::array<float, 256> shares;  // of a stored step
    double steps_per_octave;
    std::array<float, kOrders> news;
    std::array<double, kOrders> trust;
};

class SuccessorTable {
public:
    // rows: {uint16 tag, tokens[kWidth], uint8 shares[kWidth]} without padding, tokens of 2 or 4
    // bytes; a power of two of them in `num_bytes`.
    SuccessorTable(
        uint8_t* rows, int64_t num_bytes, int token_bytes, const SuccessorNumbers& numbers)
        : rows_(rows),
          token_bytes_(token_bytes),
          row_bytes_(2 + kWidth * (token_bytes + 1)),
          num_rows_(num_bytes / row_bytes_),
          numbers_(numbers) {}

    // tokens, shares: [kWidth], the best first. What is new under a salt begins with what is known
    // without one.
    void write(
        uint64_t salt, const Context& context, const int64_t* tokens, const float* shares) const;

    // A row per node of a tree. before: the tokens before the root, the latest first. best, logits:
    // [num_nodes][kWidth]; what has no tokens or no numbers is left out.
    void learn(
        uint64_t salt,
        const std::array<int64_t, kOrders - 1>& before,
        const TreeView& tree,
        const int64_t* best,
        const float* logits) const;

    // That every token surely follows those before it; without a salt.
    void learn_text(const std::vector<int64_t>& tokens) const;

    // The likely paths from the last token of a context. What is found under an earlier salt goes
    // before what is found under a later one. `own`, if any, is of the text alone, without salts; it
    // is mixed in at every length of context.
    Tree grow(
        const std::vector<uint64_t>& salts,
        const Context& context,
        int num_known,  // tokens of the context that are there
        int max_nodes,
        double min_probability,
        uint8_t source,
        const SuccessorTable* own) const;

private:
    struct Row {
        uint16_t tag;
        uint32_t tokens[kWidth];
        uint8_t shares[kWidth];
    };

    Row read(int64_t row) const;
    bool find(uint64_t state, Row& row) const;
    void put(int64_t row, const Row& value) const;
    uint8_t step_of(float share) const;

    uint8_t* rows_;
    int64_t token_bytes_, row_bytes_, num_rows_;
    SuccessorNumbers numbers_;
};

}  // namespace specserve
