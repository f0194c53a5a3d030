// An append-only text with an index of the positions of its n-grams: the C++ version of
// reference/token_log.py.
#pragma once

#include <cstdint>
#include <vector>

namespace specserve {

constexpr int32_t kEnd = -1;  // ends each text in a log of several; not a token

class TokenLog {
public:
    explicit TokenLog(const std::vector<int>& sizes);

    int size() const { return int(text_.size()) - 1; }
    void extend(const std::vector<int32_t>& tokens);

    // Iterate over the occurrences of an n-gram that are followed by a token, latest first; `size`
    // is one of the log's sizes. Both return the position after an occurrence, 0 if there is none.
    // `latest`: the last occurrence of the n-gram that ends before `end`. `earlier`: the occurrence
    // before the one that ends before `position`.
    int latest(int size, const int32_t* end) const;
    int earlier(int size, int position) const;

    // The number of tokens before `position` that equal those before `end`, at most `most`.
    int common(int position, const int32_t* end, int most) const;

    // `length` tokens from `position`; past the end of the text what was read is repeated.
    std::vector<int32_t> follow(int position, int length) const;

private:
    // The positions of the n-grams of one size: a hash table of the latest positions, whose keys
    // are read from the text, and for every position the one before it with the same n-gram.
    struct Chain {
        int size;
        std::vector<int32_t> latest;  // 0: free; the size is a power of two; at most half is used
        std::vector<int32_t> earlier;
        int num_taken = 0;
    };

    const Chain& chain(int size) const;
    // The table entry of the n-gram that ends before `end`, or the free entry where it belongs.
    int32_t& find(Chain& chain, const int32_t* end) const;
    void grow(Chain& chain) const;

    std::vector<int32_t> text_;  // begins with kEnd, so no match extends before it
    std::vector<Chain> chains_;
};

}  // namespace specserve
