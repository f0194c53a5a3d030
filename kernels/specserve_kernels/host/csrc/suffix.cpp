#include "suffix.h"

#include <cmath>
#include <numeric>

namespace specserve {

std::vector<SuffixSearch::Match> SuffixSearch::matches(
    const std::vector<const TokenLog*>& logs,
    const std::vector<int32_t>& recent,
    int length) const {
    std::vector<Match> found;
    const int32_t* end = recent.data() + recent.size();
    int known = int(recent.size()) + 1, seen = 0;
    for (const int size : numbers_.sizes) {
        if (size > int(recent.size())) continue;
        for (const TokenLog* log : logs) {
            int position = log->latest(size, end);
            for (int i = 0; i < numbers_.max_matches && position > 0; ++i) {
                const int matched = log->common(position, end, int(recent.size()));
                if (size <= matched && matched < known) {  // longer n-grams have found the others
                    found.push_back({
                        std::pow(numbers_.weight_base, matched),
                        matched,
                        log->follow(position, length),
                    });
                    seen += matched;
                    if (seen >= numbers_.max_matched || int(found.size()) == numbers_.max_matches)
                        return found;
                }
                position = log->earlier(size, position);
            }
        }
        known = size;
    }
    return found;
}

Tree SuffixSearch::tree(
    const std::vector<const TokenLog*>& logs,
    const std::vector<int32_t>& recent,
    int max_nodes,
    uint8_t drafter_id) const {
    const std::vector<Match> matches = this->matches(logs, recent, max_nodes - 1);
    struct Branch {
        int32_t token;
        double weight = 0.0;
        int seen = 0;
        std::vector<int> having = {};  // matches that contain it
    };
    std::vector<int> all(matches.size());
    std::iota(all.begin(), all.end(), 0);
    const auto expand = [&](const std::vector<int>& having, int depth, auto&& add) {
        std::vector<Branch> branches;
        for (const int index : having) {
            const Match& match = matches[index];
            const int32_t token = match.followed[depth];
            if (token == kEnd) continue;
            size_t at = 0;
            while (at < branches.size() && branches[at].token != token) ++at;
            if (at == branches.size()) branches.push_back({token});
            branches[at].weight += match.weight;
            branches[at].seen += match.length + depth;  // `depth` more have matched here
            branches[at].having.push_back(index);
        }
        double total = 0.0;
        for (const Branch& branch : branches) total += branch.weight;
        for (Branch& branch : branches) {
            const double sum = branch.weight * branch.seen / (branch.seen + numbers_.pseudo_count);
            add(branch.token, sum / total, std::move(branch.having));
        }
    };
    return grow_best_first(
        recent.back(), std::move(all), max_nodes, numbers_.min_probability, drafter_id, expand);
}

}  // namespace specserve
