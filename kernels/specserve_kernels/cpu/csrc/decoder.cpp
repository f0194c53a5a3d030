// The phases of a forward pass. All rows finish a phase before any row enters the next one. Within
// a phase, threads share units of work (rows, panels of outputs, heads). A unit's result depends
// neither on other units of the phase nor on the thread that computes it.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "activations.h"
#include "lanes.h"
#include "norm.h"
#include "team.h"
#include "unembedding.h"
#include "wanted_rows.h"

namespace specserve {
namespace {

constexpr int64_t kUnitsPerThread = 4;  // with fewer, threads share attention by splits
// Upper bounds of the `share` calls: per layer, and for start, end and two moves of wanted rows.
constexpr int64_t kPhasesPerLayer = 9, kMorePhases = 4;

template <typename Element>
class PassOf {
   public:
    PassOf(const Decoder& decoder, const Pass& pass, const Head& head, float* residual,
           int num_threads)
        : d_(decoder),
          pass_(pass),
          residual_{residual, decoder.hidden_size, pass.num_rows},
          wanted_(decoder, pass, head),
          skips_rows_(wanted_.num_rows() < pass.num_rows),
          wanted_residual_(new float[skips_rows_ ? wanted_.num_rows() * decoder.hidden_size : 0]),
          activations_(decoder, pass.num_rows) {
        const Segments& segments = pass.segments;
        int64_t num_units = 0, max_splits = 0;
        for (int64_t segment = 0; segment < segments.num_segments; ++segment) {
            const int64_t rows = segments.cu_rows[segment + 1] - segments.cu_rows[segment];
            num_units += (rows + kMaxUnitRows - 1) / kMaxUnitRows * d_.num_kv_heads;
            max_splits = std::max(max_splits, num_splits(segments, segment));
        }
        if (num_threads == 1 || max_splits == 1 || num_units >= kUnitsPerThread * num_threads) return;
        const int64_t size = partial_size(d_.head_dim);
        parts_.reset(new float[pass.num_rows * d_.num_heads * max_splits * size]);
        partials_ = {parts_.get(), d_.num_heads, max_splits, size};
    }

    void run(Team& team) {
        team.share(pass_.num_rows, [&](int64_t row) {
            if (d_.hidden_norm)
                embed_draft_input(row);
            else
                embed(d_.embed, pass_.input_ids[row], residual_.at(row));
        });
        for (int64_t index = 0; index < d_.num_layers; ++index) layer(team, index);
        team.share(pass_.num_rows, [&](int64_t row) { copy_aux_hidden(row, d_.num_layers); });
    }

   private:
    void layer(Team& team, int64_t index) {
        const Layer& l = d_.layers[index];
        const bool is_draft_input = d_.hidden_norm && index == 0;
        const RowBuffer& qkv_in = is_draft_input ? activations_.qkv_in : activations_.normed;
        team.share(is_draft_input ? 0 : pass_.num_rows, [&](int64_t row) {
            copy_aux_hidden(row, index);
            normalise(residual_.at(row), l.attention_norm, row);
        });
        const int64_t q_size = d_.num_heads * d_.head_dim, kv_size = d_.num_kv_heads * d_.head_dim;
        const int64_t q_units = num_units(l.q), kv_units = num_units(l.k);
        const int64_t plane = pass_.cache.num_slots * kv_size;
        Element* keys = static_cast<Element*>(pass_.cache.kv) + 2 * index * plane;
        Element* values = keys + plane;
        team.share(q_units + 2 * kv_units, [&](int64_t unit) {
            if (pass_.num_rows <= kRowBlock)
                fetch_context(pass_.segments, keys, values, kv_size, unit, q_units + 2 * kv_units);
            if (unit < q_units)
                project(l.q, qkv_in, unit, activations_.heads.get(), activations_.heads_size);
            else if (unit < q_units + kv_units)
                project(l.k, qkv_in, unit - q_units, activations_.heads.get() + q_size,
                        activations_.heads_size);
            else
                project(l.v, qkv_in, unit - q_units - kv_units,
                        activations_.heads.get() + q_size + kv_size, activations_.heads_size);
        });
        team.share(pass_.num_rows, [&](int64_t row) { rotate_and_write_kv(l, row, keys, values); });
        const bool wanted_only = skips_rows_ && index == d_.num_layers - 1;
        const Residual x =
            wanted_only ? Residual{wanted_residual_.get(), d_.hidden_size, wanted_.num_rows()}
                        : residual_;
        if (x.num_rows == 0) return;
        if (wanted_only) move_wanted(team, residual_, x);
        attention(team, l, keys, values, wanted_only);
        team.share(num_units(l.o),
                   [&](int64_t unit) { add(l.o, activations_.attention_out, unit, x); });
        team.share(x.num_rows, [&](int64_t row) { normalise(x.at(row), l.mlp_norm, row); });
        team.share(num_units(l.gate), [&](int64_t unit) { gate(l, unit, x.num_rows); });
        team.share(num_units(l.down), [&](int64_t unit) { add(l.down, activations_.gated, unit, x); });
        if (wanted_only) move_wanted(team, x, residual_);
    }

    // Copies the wanted rows to a buffer in which they are consecutive, or back.
    void move_wanted(Team& team, const Residual& from, const Residual& to) {
        team.share(wanted_.num_rows(), [&](int64_t index) {
            const int64_t row = wanted_.row(index);
            const bool back = to.x == residual_.x;
            std::memcpy(to.at(back ? row : index), from.at(back ? index : row),
                        d_.hidden_size * sizeof *to.x);
        });
    }

    void copy_aux_hidden(int64_t row, int64_t index) {
        for (int64_t t = 0; t < pass_.num_aux_layers; ++t)
            if (pass_.aux_layers[t] == index)
                std::memcpy(pass_.aux_hidden + (row * pass_.num_aux_layers + t) * d_.hidden_size,
                            residual_.at(row), d_.hidden_size * sizeof(float));
    }

    // The start of a draft head's forward pass; see `Decoder::hidden_norm`.
    void embed_draft_input(int64_t row) {
        const int64_t size = d_.hidden_size;
        thread_local std::vector<float> y;
        y.resize(2 * size);
        const float* hidden_in = pass_.hidden_in + row * size;
        float* token = y.data();
        float* normed = token + size;
        embed(d_.embed, pass_.input_ids[row], token);
        rms_norm(token, d_.layers[0].attention_norm, size, d_.eps, token);
        rms_norm(hidden_in, d_.hidden_norm, size, d_.eps, normed);
        store_row(token, activations_.qkv_in.rows(), row);
        std::memcpy(residual_.at(row), d_.normed_residual ? normed : hidden_in,
                    size * sizeof(float));
    }

    void normalise(const float* x, const float* weight, int64_t row) {
        thread_local std::vector<float> y;
        y.resize(d_.hidden_size);
        rms_norm(x, weight, d_.hidden_size, d_.eps, y.data());
        store_row(y.data(), activations_.normed.rows(), row);
    }

    void project(const Linear& linear, const RowBuffer& rows, int64_t unit, float* y,
                 int64_t stride) {
        multiply_unit(linear, rows.rows(), pass_.num_rows, unit,
                      [&](int64_t row, int64_t column, Floats out) {
                          store(y + row * stride + column, out);
                      });
    }

    void add(const Linear& linear, const RowBuffer& rows, int64_t unit, const Residual& x) {
        multiply_unit(linear, rows.rows(), x.num_rows, unit,
                      [&](int64_t row, int64_t column, Floats out) {
                          float* to = x.at(row) + column;
                          store(to, specserve::add(load(to), out));
                      });
    }

    // SwiGLU (Shazeer 2020): silu(gate) * up, stored at once, since a unit is one group.
    void gate(const Layer& l, int64_t unit, int64_t num_rows) {
        alignas(64) float gates[kRowBlock * kColumns], ups[kRowBlock * kColumns];
        const int64_t column = unit * kColumns;
        for (int64_t top = 0; top < num_rows; top += kRowBlock) {
            const int64_t count = std::min(kRowBlock, num_rows - top);
            const Rows rows = activations_.normed.rows().from(top);
            multiply_unit(l.gate.weight, rows, count, unit, gates);
            multiply_unit(l.up.weight, rows, count, unit, ups);
            for (int64_t row = 0; row < count; ++row) {
                float* g = gates + row * kColumns;
                for (int64_t c = 0; c < kColumns; c += kLanes)
                    store(g + c, swiglu(biased(l.gate, g + c, column + c),
                                        biased(l.up, ups + row * kColumns + c, column + c)));
                store_group(g, activations_.gated.rows(), top + row, unit);
            }
        }
    }

    static Floats biased(const Linear& linear, const float* y, int64_t column) {
        return linear.bias ? specserve::add(load(y), load(linear.bias + column)) : load(y);
    }

    static Floats swiglu(Floats gate, Floats up) {
        const Floats one = broadcast(1.0f), to_minus = broadcast(-1.4426950408889634f);
        return mul(div(gate, specserve::add(one, exp2(mul(gate, to_minus)))), up);
    }

    // Applies q and k norms and rotary embedding to a row, and writes its K and V to its slot.
    void rotate_and_write_kv(const Layer& l, int64_t row, Element* keys, Element* values) {
        const int64_t dim = d_.head_dim, half = dim / 2, kv_size = d_.num_kv_heads * dim;
        const float* cos = d_.cos + pass_.positions[row] * half;
        const float* sin = d_.sin + pass_.positions[row] * half;
        float* heads = activations_.heads.get() + row * activations_.heads_size;
        for (int64_t h = 0; h < d_.num_heads + d_.num_kv_heads; ++h) {
            float* x = heads + h * dim;
            const float* norm = h < d_.num_heads ? l.q_norm : l.k_norm;
            if (norm) rms_norm(x, norm, dim, d_.eps, x);
            rotate(x, cos, sin, half);
        }
        const int64_t slot = pass_.slots[row];
        if (slot < 0) return;
        store_kv(heads + d_.num_heads * dim, kv_size, keys + slot * kv_size);
        store_kv(heads + d_.num_heads * dim + kv_size, kv_size, values + slot * kv_size);
    }

    // `wanted_only`: keeps the output of wanted rows only, and skips segments that have none.
    void attention(Team& team, const Layer& l, const Element* keys, const Element* values,
                   bool wanted_only) {
        const AttentionShape shape{d_.num_kv_heads, d_.num_heads / d_.num_kv_heads, d_.head_dim,
                                   1.0f / std::sqrt(float(d_.head_dim)), l.window};
        const Segments& segments = pass_.segments;
        const AttentionInputs<Element> inputs{
            segments, shape, activations_.heads.get(), activations_.heads_size, keys, values};
        const int64_t num_pieces = parts_ ? partials_.max_splits : 1;
        team.share(num_units(segments, d_.num_kv_heads) * num_pieces, [&](int64_t unit) {
            const int64_t piece = unit % num_pieces;
            const UnitRows rows = unit_rows(segments, d_.num_kv_heads, unit / num_pieces);
            if (rows.first >= rows.last || (wanted_only && !wanted_.has_segment(rows.segment)))
                return;
            if (parts_) {
                if (piece < num_splits(segments, rows.segment))
                    attend_split(inputs, rows, piece, partials_);
                return;
            }
            const int64_t size = shape.group_size * d_.head_dim;
            thread_local std::vector<float> out;
            out.resize(kMaxUnitRows * size);
            attend(inputs, rows, out.data(), size);
            for (int64_t at = rows.first; at < rows.last; ++at) {
                const int64_t row = segments.cu_rows[rows.segment] + at;
                const int64_t index = wanted_only ? wanted_.index_of(row) : row;
                if (index >= 0)
                    store_attention_output(index, rows.kv_head, size,
                                              out.data() + (at - rows.first) * size);
            }
        });
        if (parts_) merge(team, shape, wanted_only);
    }

    void merge(Team& team, const AttentionShape& shape, bool wanted_only) {
        const Segments& segments = pass_.segments;
        const int64_t size = shape.group_size * d_.head_dim;
        const int64_t num_rows = wanted_only ? wanted_.num_rows() : pass_.num_rows;
        team.share(num_rows * d_.num_kv_heads, [&](int64_t unit) {
            const int64_t index = unit / d_.num_kv_heads, kv_head = unit % d_.num_kv_heads;
            const int64_t row = wanted_only ? wanted_.row(index) : index;
            const int32_t* after = std::upper_bound(
                segments.cu_rows, segments.cu_rows + segments.num_segments, int32_t(row));
            thread_local std::vector<float> out;
            out.resize(size);
            for (int64_t g = 0; g < shape.group_size; ++g)
                merge_splits(segments, shape, after - segments.cu_rows - 1, row,
                             kv_head * shape.group_size + g, partials_, out.data() + g * d_.head_dim);
            store_attention_output(index, kv_head, size, out.data());
        });
    }

    // Stores a row's attention output of the query heads that share a KV head.
    void store_attention_output(int64_t row, int64_t kv_head, int64_t size, const float* out) {
        for (int64_t at = 0; at < size; at += kGroup)
            store_group(out + at, activations_.attention_out.rows(), row,
                           (kv_head * size + at) / kGroup);
    }

    const Decoder& d_;
    const Pass& pass_;
    const Residual residual_;
    const WantedRows wanted_;
    const bool skips_rows_;  // not all rows are wanted
    std::unique_ptr<float[]> wanted_residual_;  // of the last layer, if skips_rows_
    Activations activations_;
    std::unique_ptr<float[]> parts_;  // memory of partials_; null: attention is not split
    Partials partials_{};
};

template <typename Element>
void decode_as(const Decoder& decoder, const Pass& pass, const Head& head, float* residual,
               int num_threads) {
    PassOf<Element> body(decoder, pass, head, residual, num_threads);
    Unembedding end(decoder, head, residual);
    const int64_t num_phases =
        kMorePhases + kPhasesPerLayer * decoder.num_layers + Unembedding::kPhases;
    run_team(num_phases, num_threads, [&](Team& team) {
        body.run(team);
        end.run(team);
    });
}

}  // namespace

SPECSERVE_API void specserve_decode(const Decoder& decoder, const Pass& pass, const Head& head,
                                    float* residual, int32_t num_threads) {
    if (pass.cache.is_float)
        decode_as<float>(decoder, pass, head, residual, num_threads);
    else
        decode_as<bfloat16>(decoder, pass, head, residual, num_threads);
}

}  // namespace specserve
