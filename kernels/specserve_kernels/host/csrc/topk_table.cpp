#include "topk_table.h"

#include <cmath>
#include <cstring>

namespace specserve {

namespace {

// A tag: the upper bits of a context's state, and two flags.
constexpr uint64_t kNoSalt = 0;
constexpr uint16_t kWritten = 1, kSecondChance = 2, kTagBits = 0xFFFC;

// Hashes of the contexts of 1, 2 ... kOrders tokens.
std::array<uint64_t, kOrders> states_of(uint64_t salt, const Context& context) {
    std::array<uint64_t, kOrders> states;
    uint64_t state = salt;
    for (int order = 0; order < kOrders; ++order) {
        state = (state ^ uint32_t(context[order])) * 0x9E3779B97F4A7C15u;
        state ^= state >> 29;
        states[order] = state;
    }
    return states;
}

uint16_t tag_of(uint64_t state) { return (uint16_t(state >> 48) & kTagBits) | kWritten; }

struct Candidate {
    int32_t token;
    double prob;
};

void add_to(std::vector<Candidate>& mixed, int32_t token, double prob) {
    for (Candidate& candidate : mixed) {
        if (candidate.token != token) continue;
        candidate.prob += prob;
        return;
    }
    mixed.push_back({token, prob});
}

void sort_by_prob(std::vector<Candidate>& mixed) {
    std::stable_sort(mixed.begin(), mixed.end(), [](const Candidate& a, const Candidate& b) {
        return a.prob > b.prob;
    });
    if (mixed.size() > kWidth) mixed.resize(kWidth);
}

}  // namespace

TopKTable::Row TopKTable::read(int64_t row) const {
    const uint8_t* at = rows_ + row * row_bytes_;
    Row read;
    std::memcpy(&read.tag, at, sizeof read.tag);
    at += sizeof read.tag;
    for (uint32_t& token : read.tokens) {
        token = 0;
        std::memcpy(&token, at, token_bytes_);  // little-endian, like the table
        at += token_bytes_;
    }
    std::memcpy(read.prob_steps, at, sizeof read.prob_steps);
    return read;
}

bool TopKTable::find(uint64_t state, Row& row) const {
    row = read(state & (num_rows_ - 1));
    return (row.tag & ~kSecondChance) == tag_of(state);
}

void TopKTable::put(int64_t row, const Row& value) const {
    uint8_t* at = rows_ + row * row_bytes_;
    std::memcpy(at, &value.tag, sizeof value.tag);
    at += sizeof value.tag;
    for (const uint32_t& token : value.tokens) {
        std::memcpy(at, &token, token_bytes_);
        at += token_bytes_;
    }
    std::memcpy(at, value.prob_steps, sizeof value.prob_steps);
}

uint8_t TopKTable::step_of(float prob) const {
    const float steps = float(-numbers_.steps_per_octave) * std::log2(std::max(prob, 1e-9f));
    return uint8_t(std::nearbyint(std::min(std::max(steps, 0.0f), 255.0f)));
}

void TopKTable::write(
    uint64_t salt, const Context& context, const int64_t* tokens, const float* probs) const {
    const auto states = states_of(salt, context);
    const auto without = salt == kNoSalt ? states : states_of(kNoSalt, context);
    for (int order = 0; order < kOrders; ++order) {
        const int64_t index = states[order] & (num_rows_ - 1);
        const uint16_t tag = tag_of(states[order]);
        Row row;
        const bool known = find(states[order], row);
        if (!known && (row.tag & kSecondChance)) {  // its context keeps the row this once
            row.tag &= ~kSecondChance;
            put(index, row);
            continue;
        }
        // If neither is known, `row` gets weight 0.
        const bool known_without_salt = !known && find(without[order], row);
        const float learning_rate = known || known_without_salt ? numbers_.learning_rate[order] : 1.0f;
        float merged_probs[2 * kWidth];
        uint32_t merged_tokens[2 * kWidth];
        int count = kWidth;
        for (int i = 0; i < kWidth; ++i) {
            merged_tokens[i] = uint32_t(tokens[i]);
            merged_probs[i] = learning_rate * probs[i];
        }
        for (int i = 0; i < kWidth; ++i) {
            const float before = (1.0f - learning_rate) * numbers_.probs[row.prob_steps[i]];
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
        std::stable_sort(
            best.begin(), best.begin() + count,
            [&](int a, int b) { return merged_probs[a] > merged_probs[b]; });
        row.tag = known ? tag | kSecondChance : tag;
        for (int i = 0; i < kWidth; ++i) {
            row.tokens[i] = merged_tokens[best[i]];
            row.prob_steps[i] = step_of(merged_probs[best[i]]);
        }
        put(index, row);
    }
}

void TopKTable::learn(
    uint64_t salt,
    const std::array<int64_t, kOrders - 1>& before,
    const TreeView& tree,
    const int64_t* best,
    const float* logits) const {
    std::vector<Context> contexts(tree.size);
    for (int node = 0; node < tree.size; ++node, best += kWidth, logits += kWidth) {
        const int parent = tree.parents[node];
        const int64_t* above = parent < 0 ? before.data() : contexts[parent].data();
        contexts[node] = {tree.tokens[node], above[0], above[1]};
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

void TopKTable::learn_text(const std::vector<int64_t>& tokens) const {
    const float surely[kWidth] = {1.0f};
    Context context{-1, -1, -1};
    for (size_t at = 0; at + 1 < tokens.size(); ++at) {
        context = {tokens[at], context[0], context[1]};
        const int64_t next[kWidth] = {tokens[at + 1]};
        write(kNoSalt, context, next, surely);
    }
}

Tree TopKTable::grow(
    const std::vector<uint64_t>& salts,
    const Context& context,
    int num_known,
    int max_nodes,
    double min_probability,
    uint8_t drafter_id,
    const TopKTable* request_table) const {
    struct Known {
        Context tokens;
        int count;
    };
    std::vector<Candidate> mixed;
    std::vector<std::array<uint64_t, kOrders>> states;
    const auto expand = [&](const Known& known, int, auto&& add) {
        mixed.clear();
        states.clear();
        for (const uint64_t salt : salts) states.push_back(states_of(salt, known.tokens));
        const auto request_states = states_of(kNoSalt, known.tokens);
        double left = 1.0;
        const auto add_row = [&](const TopKTable& table, int order, const Row& row) {
            const double weight = left * table.numbers_.weight[order];
            for (int i = 0; i < kWidth; ++i)
                add_to(mixed, row.tokens[i], weight * double(numbers_.probs[row.prob_steps[i]]));
            left -= weight;
        };
        Row row;
        for (int order = known.count - 1; order >= 0; --order) {
            if (request_table && request_table->find(request_states[order], row))
                add_row(*request_table, order, row);
            for (const auto& of_salt : states) {
                if (!find(of_salt[order], row)) continue;
                add_row(*this, order, row);
                break;
            }
        }
        sort_by_prob(mixed);
        for (const Candidate& next : mixed) {
            const Context& before = known.tokens;
            add(next.token,
                next.prob,
                Known{{next.token, before[0], before[1]}, std::min(known.count + 1, kOrders)});
        }
    };
    return grow_best_first(
        int32_t(context[0]),
        Known{context, num_known},
        max_nodes,
        min_probability,
        drafter_id,
        expand);
}

}  // namespace specserve
