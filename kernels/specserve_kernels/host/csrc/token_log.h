// An append-only text with an index of the positions of its n-grams: the C++ version of
// reference/token_log.py.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace specserve {

constexpr int32_t kEnd = -1;  // ends each text in a log of several; not a token

class TokenLog {
   public:
    explicit TokenLog(const std::vector<int>& sizes) : text_{kEnd} {
        for (const int size : sizes)
            chains_.push_back({size, std::vector<int32_t>(16, 0), std::vector<int32_t>(size, 0)});
    }

    int size() const { return int(text_.size()) - 1; }

    void extend(const std::vector<int32_t>& tokens) {
        text_.insert(text_.end(), tokens.begin(), tokens.end());
        for (Chain& chain : chains_)
            for (int at = int(chain.earlier.size()); at < int(text_.size()); ++at) {
                if (2 * chain.num_taken >= int(chain.latest.size())) grow(chain);
                int32_t& latest = find(chain, text_.data() + at);
                chain.num_taken += latest == 0;
                chain.earlier.push_back(latest);
                latest = at;
            }
    }

    // Iterate over the occurrences of an n-gram that are followed by a token, latest first; `size`
    // is one of the log's sizes. Both return the position after an occurrence, 0 if there is none.
    // `latest`: the last occurrence of the n-gram that ends before `end`. `earlier`: the occurrence
    // before the one that ends before `position`.
    int latest(int size, const int32_t* end) const {
        return find(const_cast<Chain&>(chain(size)), end);
    }
    int earlier(int size, int position) const { return chain(size).earlier[position]; }

    // The number of tokens before `position` that equal those before `end`, at most `most`.
    int common(int position, const int32_t* end, int most) const {
        int length = 0;
        // The text begins with kEnd, which equals no token, so the loop ends there at the latest.
        while (length < most && text_[position - 1 - length] == end[-1 - length]) ++length;
        return length;
    }

    // `length` tokens from `position`; past the end of the text what was read is repeated.
    std::vector<int32_t> follow(int position, int length) const {
        const int there = std::min(length, int(text_.size()) - position);
        std::vector<int32_t> followed(text_.begin() + position, text_.begin() + position + there);
        for (int i = 0; int(followed.size()) < length; ++i) followed.push_back(followed[i]);
        return followed;
    }

   private:
    // The positions of the n-grams of one size: a hash table of the latest positions, whose keys
    // are read from the text, and for every position the one before it with the same n-gram.
    struct Chain {
        int size;
        std::vector<int32_t> latest;  // 0: free; the size is a power of two; at most half is used
        std::vector<int32_t> earlier;
        int num_taken = 0;
    };

    static uint64_t hash_of(const int32_t* begin, int size) {
        uint64_t state = 0;
        for (int i = 0; i < size; ++i) {
            state = (state ^ uint32_t(begin[i])) * 0x9E3779B97F4A7C15u;  // 2**64 / golden ratio
            state ^= state >> 29;
        }
        return state;
    }

    const Chain& chain(int size) const {
        const auto has_size = [&](const Chain& chain) { return chain.size == size; };
        const auto found = std::find_if(chains_.begin(), chains_.end(), has_size);
        assert(found != chains_.end());
        return *found;
    }

    // The table entry of the n-gram that ends before `end`, or the free entry where it belongs.
    int32_t& find(Chain& chain, const int32_t* end) const {
        const size_t last = chain.latest.size() - 1;
        for (size_t at = hash_of(end - chain.size, chain.size) & last;; at = (at + 1) & last) {
            const int32_t position = chain.latest[at];
            if (position == 0 ||
                std::equal(end - chain.size, end, text_.data() + position - chain.size))
                return chain.latest[at];
        }
    }

    void grow(Chain& chain) const {
        std::vector<int32_t> positions(2 * chain.latest.size(), 0);
        positions.swap(chain.latest);
        for (const int32_t position : positions)
            if (position > 0) find(chain, text_.data() + position) = position;
    }

    std::vector<int32_t> text_;  // begins with kEnd, so no match extends before it
    std::vector<Chain> chains_;
};

}  // namespace specserve
