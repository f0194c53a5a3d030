#include "token_log.h"

#include <algorithm>
#include <cassert>
#include <cstddef>

namespace specserve {

namespace {

uint64_t hash_of(const int32_t* begin, int size) {
    uint64_t state = 0;
    for (int i = 0; i < size; ++i) {
        state = (state ^ uint32_t(begin[i])) * 0x9E3779B97F4A7C15u;  // 2**64 / golden ratio
        state ^= state >> 29;
    }
    return state;
}

}  // namespace

TokenLog::TokenLog(const std::vector<int>& sizes) : text_{kEnd} {
    for (const int size : sizes)
        chains_.push_back({size, std::vector<int32_t>(16, 0), std::vector<int32_t>(size, 0)});
}

void TokenLog::extend(const std::vector<int32_t>& tokens) {
    text_.insert(text_.end(), tokens.begin(), tokens.end());
    for (Chain& chain : chains_) {
        for (int position = int(chain.earlier.size()); position < int(text_.size()); ++position) {
            if (2 * chain.num_taken >= int(chain.latest.size())) grow(chain);
            int32_t& latest = find(chain, text_.data() + position);
            chain.num_taken += latest == 0;
            chain.earlier.push_back(latest);
            latest = position;
        }
    }
}

int TokenLog::latest(int size, const int32_t* end) const {
    return find(const_cast<Chain&>(chain(size)), end);
}

int TokenLog::earlier(int size, int position) const { return chain(size).earlier[position]; }

int TokenLog::common(int position, const int32_t* end, int most) const {
    int length = 0;
    // The text begins with kEnd, which equals no token, so the loop ends there at the latest.
    while (length < most && text_[position - 1 - length] == end[-1 - length]) ++length;
    return length;
}

std::vector<int32_t> TokenLog::follow(int position, int length) const {
    const int there = std::min(length, int(text_.size()) - position);
    std::vector<int32_t> followed(text_.begin() + position, text_.begin() + position + there);
    for (int i = 0; int(followed.size()) < length; ++i) followed.push_back(followed[i]);
    return followed;
}

const TokenLog::Chain& TokenLog::chain(int size) const {
    const auto has_size = [&](const Chain& chain) { return chain.size == size; };
    const auto found = std::find_if(chains_.begin(), chains_.end(), has_size);
    assert(found != chains_.end());
    return *found;
}

int32_t& TokenLog::find(Chain& chain, const int32_t* end) const {
    const size_t last = chain.latest.size() - 1;
    for (size_t at = hash_of(end - chain.size, chain.size) & last;; at = (at + 1) & last) {
        const int32_t position = chain.latest[at];
        if (position == 0 ||
            std::equal(end - chain.size, end, text_.data() + position - chain.size))
            return chain.latest[at];
    }
}

void TokenLog::grow(Chain& chain) const {
    std::vector<int32_t> positions(2 * chain.latest.size(), 0);
    positions.swap(chain.latest);
    for (const int32_t position : positions)
        if (position > 0) find(chain, text_.data() + position) = position;
}

}  // namespace specserve
