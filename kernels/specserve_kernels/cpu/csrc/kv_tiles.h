// Chunks of K stored as columns and of V stored as rows, and their products with several queries at
// once. Sums run over dimensions or positions in order, independent of the column that holds a key.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "lanes.h"

namespace specserve {

constexpr int kChunk = 64;
constexpr int kMaxColumns = kChunk + kMaxSegmentRows;  // the context's last chunk, and a tree

// How many vectors of columns or dimensions are processed together with kQueries queries: enough
// independent sums to keep the units busy, and few enough for the registers.
template <int kQueries>
constexpr int kVectorsFor = kQueries * 2 * kVectorsTogether <= 8
                                ? std::min(2 * kVectorsTogether, kChunk / kLanes)
                                : kVectorsTogether;

// Values of K or V per 32-bit lane, and the type of the factors that they are multiplied with.
template <typename Element>
constexpr int kPerLane = sizeof(float) / sizeof(Element);
template <typename Element>
using FactorOf = std::conditional_t<kPerLane<Element> == 1, float, Factor>;

template <typename Element>
inline Floats dot(Floats sum, Floats lanes, const FactorOf<Element>* factors) {
    if constexpr (kPerLane<Element> == 1)
        return mul_add(lanes, broadcast(*factors), sum);
    else
        return dot_pairs(sum, lanes, factors);
}

template <typename Element>
inline void store_factors_of(Floats x, FactorOf<Element>* to) {
    if constexpr (kPerLane<Element> == 1)
        store(to, x);
    else
        store_factors(to, x);
}

// K at some slots: one column per slot, kPerLane consecutive dimensions in a lane.
template <typename Element>
class Columns {
   public:
    void load(const Element* keys, int64_t dim, const int64_t* offsets, int count) {
        dim_ = dim;
        for (int from = 0; from < count; from += kLanes) {
            const Element* rows[kLanes];
            for (int i = 0; i < kLanes; ++i)  // columns after the last repeat it
                rows[i] = keys + offsets[std::min(from + i, count - 1)];
            for (int64_t d = 0; d < dim; d += 4 * kPerLane<Element>) {
                Floats columns[4];
                columns_of([&](int i) { return reinterpret_cast<const float*>(rows[i] + d); }, columns);
                for (int i = 0; i < 4; ++i)
                    store(keys_ + (d / kPerLane<Element> + i) * kMaxColumns + from, columns[i]);
            }
        }
    }

    // Scores of kQueries consecutive queries with columns 0 .. count - 1, and arbitrary values for
    // some columns after these. The scores of two queries are `stride` floats apart.
    template <int kQueries>
    void scores(const FactorOf<Element>* q, float scale, int count, float* result,
                int64_t stride) const {
        constexpr int kVectors = kVectorsFor<kQueries>;
        int from = 0;
        for (; from + kVectors * kLanes <= count; from += kVectors * kLanes)
            scores_at<kQueries, kVectors>(q, scale, from, result, stride);
        for (; from < count; from += kLanes) scores_at<kQueries, 1>(q, scale, from, result, stride);
    }

   private:
    template <int kQueries, int kVectors>
    void scores_at(const FactorOf<Element>* q, float scale, int from, float* result,
                   int64_t stride) const {
        Floats sums[kQueries][kVectors];
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors) sums[g][i] = zero_floats();
        for (int64_t d = 0; d < dim_; d += kPerLane<Element>) {
            const float* key = keys_ + d / kPerLane<Element> * kMaxColumns + from;
            Floats keys[kVectors];
            SPECSERVE_EACH(i, kVectors) keys[i] = specserve::load(key + i * kLanes);
            SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
                sums[g][i] = dot<Element>(sums[g][i], keys[i], q + g * dim_ + d);
        }
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            store(result + g * stride + from + i * kLanes, mul(sums[g][i], broadcast(scale)));
    }

    int64_t dim_ = 0;
    alignas(64) float keys_[kMaxHeadDim * kMaxColumns];  // [dim / kPerLane][kMaxColumns]
};

// V of a chunk: one row per kPerLane consecutive positions, which share the lanes.
template <typename Element>
class Values {
   public:
    // Stores positions first .. last - 1 of a chunk; `first` is a multiple of kPerLane.
    void load(const Element* const* values, int64_t dim, int first, int last) {
        dim_ = dim;
        for (int at = first; at < last; at += kPerLane<Element>) {
            float* row = rows_ + at / kPerLane<Element> * dim;
            const Element* next = values[std::min(at + 1, last - 1)];  // after the last: weight 0
            for (int64_t d = 0; d < dim; d += kLanes)
                if constexpr (kPerLane<Element> == 1)
                    store(row + d, specserve::load(values[at] + d));
                else
                    store(row + d, pairs_of(values[at] + d, next + d));
        }
    }

    // Adds the values of positions first .. last - 1, in order, times weights [kQueries][kSplit] to
    // out [kQueries][dim].
    template <int kQueries>
    void add(const FactorOf<Element>* weights, int first, int last, float* out) const {
        constexpr int kVectors = kVectorsFor<kQueries>;
        constexpr int64_t kStep = kVectors * kLanes;
        int64_t d = 0;
        for (; d + kStep <= dim_; d += kStep) add_at<kQueries, kVectors>(weights, first, last, out, d);
        for (; d < dim_; d += kLanes) add_at<kQueries, 1>(weights, first, last, out, d);
    }

   private:
    template <int kQueries, int kVectors>
    void add_at(const FactorOf<Element>* weights, int first, int last, float* out,
                int64_t d) const {
        out += d;
        Floats sums[kQueries][kVectors];
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            sums[g][i] = specserve::load(out + g * dim_ + i * kLanes);
        for (int at = first / kPerLane<Element> * kPerLane<Element>; at < last;
             at += kPerLane<Element>) {
            const float* row = rows_ + at / kPerLane<Element> * dim_ + d;
            Floats value[kVectors];
            SPECSERVE_EACH(i, kVectors) value[i] = specserve::load(row + i * kLanes);
            SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
                sums[g][i] = dot<Element>(sums[g][i], value[i], weights + g * kSplit + at);
        }
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            store(out + g * dim_ + i * kLanes, sums[g][i]);
    }

    int64_t dim_ = 0;
    alignas(64) float rows_[kChunk / kPerLane<Element> * kMaxHeadDim];
};

}  // namespace specserve
