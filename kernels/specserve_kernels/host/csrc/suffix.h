// Suffix search: a tree of the tokens that followed earlier occurrences of the last tokens. The C++
// version of reference/suffix.py, which explains the parameters.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "token_log.h"
#include "tree.h"

namespace specserve {

class SuffixSearch {
   public:
    SuffixSearch(const std::vector<int>& sizes, int max_matches, int max_matched,
                 double weight_base, double pseudo_count, double min_probability)
        : sizes_(sizes),
          max_matches_(max_matches),
          max_matched_(max_matched),
          weight_base_(weight_base),
          pseudo_count_(pseudo_count),
          min_probability_(min_probability) {}

    Tree tree(const std::vector<const TokenLog*>& logs, const std::vector<int32_t>& recent,
              int max_nodes) const {
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
                const double sum = branch.weight * branch.seen / (branch.seen + pseudo_count_);
                add(branch.token, sum / total, std::move(branch.having));
            }
        };
        return grow_best_first(recent.back(), std::move(all), max_nodes, min_probability_, expand);
    }

   private:
    struct Match {
        double weight;
        int length;
        std::vector<int32_t> followed;
    };

    std::vector<Match> matches(const std::vector<const TokenLog*>& logs,
                               const std::vector<int32_t>& recent, int length) const {
        std::vector<Match> found;
        const int32_t* end = recent.data() + recent.size();
        int known = int(recent.size()) + 1, seen = 0;
        for (const int size : sizes_) {
            if (size > int(recent.size())) continue;
            for (const TokenLog* log : logs) {
                int position = log->latest(size, end);
                for (int i = 0; i < max_matches_ && position > 0; ++i) {
                    const int matched = log->common(position, end, int(recent.size()));
                    if (size <= matched && matched < known) {  // others: found by longer n-grams
                        found.push_back({std::pow(weight_base_, matched), matched,
                                         log->follow(position, length)});
                        seen += matched;
                        if (seen >= max_matched_ || int(found.size()) == max_matches_)
                            return found;
                    }
                    position = log->earlier(size, position);
                }
            }
            known = size;
        }
        return found;
    }

    std::vector<int> sizes_;
    int max_matches_, max_matched_;
    double weight_base_, pseudo_count_, min_probability_;
};

}  // namespace specserve
