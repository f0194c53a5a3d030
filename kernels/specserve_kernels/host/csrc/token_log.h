// Text that only grows, and where each of its n-grams occurred: the C++ half of
// specserve_drafts/token_log.py.
#pragma once

#include <cstdint>
#include <vector>

namespace specserve {

constexpr int32_t kEnd = -1;  // closes a text in a log of several; no token

class TokenLog {
public:
    explicit TokenLog(const std::vector<int>& sizes);

    int size() const { return int(text_.size()) - 1; }
    void extend(const std::vector<int32_t>& tokens);

    // The position after the latest occurrence that something follows of the n-gram that ends
    // before `end`, and after the one before it; 0: none. `size`: one of the log's.
    int latest(int size, const int32_t* end) const;
    int earlier(int size, int position) const;

    // How many tokens before `position` are the same as before `end`, of the `most` there.
    int common(int position, const int32_t* end, int most) const;

    // The text from `position`; where it ends it goes on with what has just been read.
    std::vector<int32_t> follow(int position, int length) const;

private:
    // Where the n-grams of one size occurred: a hash table of latest positions, told apart by the
    // text itself, and per position the one before it.
    struct Chain {
        int size;
        std::vector<int32_t> latest;  // 0: free; a power of two of them, at most half of them taken
        std::vector<int32_t> earlier;
        int num_taken = 0;
    };

    const Chain& chain(int size) const;
    // The place of the n-gram that ends before `end`: its own or the free one that it may take.
    int32_t& find(Chain& chain, const int32_t* end) const;
    void grow(Chain& chain) const;

    std::vector<int32_t> text_;  // begins with kEnd: no match starts before it
    std::vector<Chain> chains_;
};

}  // namespace specserve
