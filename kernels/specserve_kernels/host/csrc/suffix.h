// Suffix search: a tree of the tokens that followed earlier occurrences of the last tokens. The C++
// version of reference/suffix.py.
#pragma once

#include <cstdint>
#include <vector>

#include "token_log.h"
#include "tree.h"

namespace specserve {

// Explained in reference/suffix.py.
struct SuffixNumbers {
    std::vector<int> sizes;
    int max_matches, max_matched;
    double weight_base, pseudo_count, min_probability;
};

class SuffixSearch {
public:
    explicit SuffixSearch(const SuffixNumbers& numbers) : numbers_(numbers) {}

    // `recent`: the last tokens of the text, as many as a match may have; the last one is the root.
    Tree tree(
        const std::vector<const TokenLog*>& logs,
        const std::vector<int32_t>& recent,
        int max_nodes,
        uint8_t drafter_id) const;

private:
    struct Match {
        double weight;
        int length;
        std::vector<int32_t> followed;
    };

    std::vector<Match> matches(
        const std::vector<const TokenLog*>& logs,
        const std::vector<int32_t>& recent,
        int length) const;

    SuffixNumbers numbers_;
};

}  // namespace specserve
