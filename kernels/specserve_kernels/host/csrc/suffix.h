// What followed the last tokens wherever they occurred before: the C++ half of
// specserve_drafts/suffix.py.
#pragma once

#include <cstdint>
#include <vector>

#include "token_log.h"
#include "tree.h"

namespace specserve {

// The numbers of suffix.py, where they are explained.
struct SuffixNumbers {
    std::vector<int> sizes;
    int max_matches, enough;
    double longer, doubt, min_probability;
};

class SuffixSearch {
public:
    explicit SuffixSearch(const SuffixNumbers& numbers) : numbers_(numbers) {}

    // `recent`: the text's last tokens, as many as may match.
    Tree tree(
        const std::vector<const TokenLog*>& logs,
        const std::vector<int32_t>& recent,
        int max_nodes,
        uint8_t source) const;

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
