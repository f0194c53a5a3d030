// Top-k table: the last tokens of a text -> the most likely next tokens according to the target.
// The C++ version of reference/topk_table.py, which explains the parameters.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "tree.h"

namespace specserve {

constexpr int kOrders = 3;  // contexts of 1 .. kOrders tokens
constexpr int kWidth = 4;   // next tokens per context
constexpr uint64_t kNoSalt = 0;

class TopKTable {
   public:
    // rows: {uint16 tag, tokens[kWidth], uint8 prob_steps[kWidth]} without padding, tokens of 2 or
    // 4 bytes. `num_bytes` holds a power of two of them. The caller keeps them alive.
    TopKTable(uint8_t* rows, int64_t num_bytes, int token_bytes,
              const std::array<float, 256>& probs, double steps_per_octave,
              const std::array<float, kOrders>& learning_rate,
              const std::array<double, kOrders>& weight)
        : rows_(rows),
          token_bytes_(token_bytes),
          row_bytes_(2 + kWidth * (token_bytes + 1)),
          num_rows_(num_bytes / row_bytes_),
          probs_(probs),
          steps_per_octave_(steps_per_octave),
          learning_rate_(learning_rate),
          weight_(weight) {}

    // best, logits: [num_nodes][kWidth], the best next tokens and their logits.
    void learn(uint64_t salt, const std::vector<int64_t>& before, const TreeView& tree,
               const int64_t* best, const float* logits) const {
        const Context above_root = context_of(before);
        std::vector<Context> contexts(tree.size);
        for (int node = 0; node < tree.size; ++node, best += kWidth, logits += kWidth) {
            const int parent = tree.parents[node];
            contexts[node] = extended(parent < 0 ? above_root : contexts[parent], tree.tokens[node]);
            float probs[kWidth], sum = 0.0f;
            bool valid = true;
            for (int i = 0; i < kWidth; ++i) {
                sum += probs[i] = std::exp(logits[i] - logits[0]);
                valid = valid && best[i] >= 0 && std::isfinite(probs[i]);
            }
            if (!valid) continue;
            for (float& prob : probs) prob /= sum;
            write(salt, contexts[node], best, probs);
        }
    }

    void learn_text(const std::vector<int64_t>& tokens) const {
        const float surely[kWidth] = {1.0f};
        Context context = context_of({});
        for (size_t at = 0; at + 1 < tokens.size(); ++at) {
            context = extended(context, tokens[at]);
            const int64_t next[kWidth] = {tokens[at + 1]};
            write(kNoSalt, context, next, surely);
        }
    }

    Tree grow(const std::vector<uint64_t>& salts, const std::vector<int64_t>& context,
              int max_nodes, double min_probability, const TopKTable* request_table) const {
        if (context.empty()) throw std::invalid_argument("context: no token");
        struct Known {
            Context tokens;
            int count;
        };
        std::vector<Candidate> mixed;
        std::vector<States> states;
        const auto expand = [&](const Known& known, int, auto&& add) {
            mixed.clear();
            states.clear();
            for (const uint64_t salt : salts) states.push_back(states_of(salt, known.tokens));
            const States request_states = states_of(kNoSalt, known.tokens);
            double left = 1.0;
            const auto add_row = [&](const TopKTable& table, int order, const Row& row) {
                const double weight = left * table.weight_[order];
                for (int i = 0; i < kWidth; ++i)
                    add_to(mixed, row.tokens[i], weight * double(probs_[row.prob_steps[i]]));
                left -= weight;
            };
            Row row;
            for (int order = known.count - 1; order >= 0; --order) {
                if (request_table && request_table->find(request_states[order], row))
                    add_row(*request_table, order, row);
                for (const States& of_salt : states) {
                    if (!find(of_salt[order], row)) continue;
                    add_row(*this, order, row);
                    break;
                }
            }
            keep_best(mixed);
            for (const Candidate& next : mixed)
                add(next.token, next.prob,
                    Known{extended(known.tokens, next.token), std::min(known.count + 1, kOrders)});
        };
        const Known start{context_of(context), std::min(int(context.size()), kOrders)};
        return grow_best_first(int32_t(context[0]), start, max_nodes, min_probability, expand);
    }

   private:
    // A tag: the upper bits of a context's state, and two flags.
    static constexpr uint16_t kWritten = 1, kSecondChance = 2, kTagBits = 0xFFFC;

    using Context = std::array<int64_t, kOrders>;  // the last token first; -1 before the text
    using States = std::array<uint64_t, kOrders>;  // hashes of the contexts of 1, 2, ... tokens

    struct Candidate {
        int32_t token;
        double prob;
    };

    struct Row {
        uint16_t tag;
        uint32_t tokens[kWidth];
        uint8_t prob_steps[kWidth];
    };

    static Context context_of(const std::vector<int64_t>& tokens) {
        Context context{-1, -1, -1};
        std::copy_n(tokens.begin(), std::min(int(tokens.size()), kOrders), context.begin());
        return context;
    }

    static Context extended(const Context& context, int64_t token) {
        return {token, context[0], context[1]};
    }

    static States states_of(uint64_t salt, const Context& context) {
        States states;
        uint64_t state = salt;
        for (int order = 0; order < kOrders; ++order) {
            state = (state ^ uint32_t(context[order])) * 0x9E3779B97F4A7C15u;
            state ^= state >> 29;
            states[order] = state;
        }
        return states;
    }

    static uint16_t tag_of(uint64_t state) { return (uint16_t(state >> 48) & kTagBits) | kWritten; }

    static void add_to(std::vector<Candidate>& mixed, int32_t token, double prob) {
        for (Candidate& candidate : mixed) {
            if (candidate.token != token) continue;
            candidate.prob += prob;
            return;
        }
        mixed.push_back({token, prob});
    }

    static void keep_best(std::vector<Candidate>& mixed) {
        std::stable_sort(mixed.begin(), mixed.end(), [](const Candidate& a, const Candidate& b) {
            return a.prob > b.prob;
        });
        if (mixed.size() > kWidth) mixed.resize(kWidth);
    }

    bool find(uint64_t state, Row& row) const {
        const uint8_t* at = rows_ + (state & (num_rows_ - 1)) * row_bytes_;
        std::memcpy(&row.tag, at, sizeof row.tag);
        at += sizeof row.tag;
        for (uint32_t& token : row.tokens) {
            token = 0;
            std::memcpy(&token, at, token_bytes_);  // little-endian, like the table
            at += token_bytes_;
        }
        std::memcpy(row.prob_steps, at, sizeof row.prob_steps);
        return (row.tag & ~kSecondChance) == tag_of(state);
    }

    void put(uint64_t state, const Row& row) const {
        uint8_t* at = rows_ + (state & (num_rows_ - 1)) * row_bytes_;
        std::memcpy(at, &row.tag, sizeof row.tag);
        at += sizeof row.tag;
        for (const uint32_t& token : row.tokens) {
            std::memcpy(at, &token, token_bytes_);
            at += token_bytes_;
        }
        std::memcpy(at, row.prob_steps, sizeof row.prob_steps);
    }

    uint8_t step_of(float prob) const {
        const float steps = float(-steps_per_octave_) * std::log2(std::max(prob, 1e-9f));
        return uint8_t(std::nearbyint(std::min(std::max(steps, 0.0f), 255.0f)));
    }

    void write(uint64_t salt, const Context& context, const int64_t* tokens,
               const float* probs) const {
        const States states = states_of(salt, context), without = states_of(kNoSalt, context);
        for (int order = 0; order < kOrders; ++order) {
            Row row;
            const bool known = find(states[order], row);
            if (!known && (row.tag & kSecondChance)) {  // its context keeps the row this once
                row.tag &= ~kSecondChance;
                put(states[order], row);
                continue;
            }
            // If neither is known, `row` gets weight 0.
            const bool known_without_salt = !known && find(without[order], row);
            const float rate = known || known_without_salt ? learning_rate_[order] : 1.0f;
            merge(row, tokens, probs, rate);
            row.tag = tag_of(states[order]) | (known ? kSecondChance : 0);
            put(states[order], row);
        }
    }

    void merge(Row& row, const int64_t* tokens, const float* probs, float learning_rate) const {
        float merged_probs[2 * kWidth];
        uint32_t merged_tokens[2 * kWidth];
        int count = kWidth;
        for (int i = 0; i < kWidth; ++i) {
            merged_tokens[i] = uint32_t(tokens[i]);
            merged_probs[i] = learning_rate * probs[i];
        }
        for (int i = 0; i < kWidth; ++i) {
            const float before = (1.0f - learning_rate) * probs_[row.prob_steps[i]];
            int at = 0;
            while (at < kWidth && merged_tokens[at] != row.tokens[i]) ++at;
            if (at < kWidth) {
                merged_probs[at] += before;
            } else {
                merged_tokens[count] = row.tokens[i];
                merged_probs[count++] = before;
            }
        }
        std::array<int, 2 * kWidth> best;
        for (int i = 0; i < count; ++i) best[i] = i;
        std::stable_sort(best.begin(), best.begin() + count,
                         [&](int a, int b) { return merged_probs[a] > merged_probs[b]; });
        for (int i = 0; i < kWidth; ++i) {
            row.tokens[i] = merged_tokens[best[i]];
            row.prob_steps[i] = step_of(merged_probs[best[i]]);
        }
    }

    uint8_t* rows_;
    int64_t token_bytes_, row_bytes_, num_rows_;
    std::array<float, 256> probs_;
    double steps_per_octave_;
    std::array<float, kOrders> learning_rate_;
    std::array<double, kOrders> weight_;
};

}  // namespace specserve
