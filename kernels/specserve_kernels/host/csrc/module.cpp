// The Python module `_compiled`; `HostCode` in ../__init__.py declares its contents.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "calibration.h"
#include "suffix.h"
#include "token_log.h"
#include "topk_table.h"
#include "tree.h"

namespace py = pybind11;

namespace specserve {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T, class U>
Array<T> array_of(const std::vector<U>& values) {
    Array<T> array(py::ssize_t(values.size()));
    std::copy(values.begin(), values.end(), array.mutable_data());
    return array;
}

// The fields of a DraftTree, in their order.
py::tuple fields_of(const Tree& tree) {
    return py::make_tuple(
        array_of<int32_t>(tree.tokens),
        array_of<int16_t>(tree.parents),
        array_of<float>(tree.path_probs),
        array_of<uint8_t>(tree.drafter_ids));
}

py::tuple build_tree(
    const std::vector<int32_t>& tokens, const std::vector<int>& parents,
    const std::vector<double>& path_probs, uint8_t drafter_id) {
    if (tokens.empty() || parents.size() != tokens.size() || path_probs.size() != tokens.size())
        throw std::invalid_argument("build_tree: expected a root, and as much of everything");
    Tree tree(tokens[0]);
    for (size_t node = 1; node < tokens.size(); ++node) {
        if (parents[node] < 0 || parents[node] >= int(node))
            throw std::invalid_argument("build_tree: a node's parent must come before it");
        tree.add(tokens[node], parents[node], path_probs[node], drafter_id);
    }
    return fields_of(laid_out(tree));
}

// Views of Python DraftTrees, and references that keep their arrays alive.
class Trees {
public:
    explicit Trees(const py::sequence& trees) {
        for (const py::handle tree : trees) add(tree);
    }

    const std::vector<TreeView>& views() const { return views_; }

private:
    template <class T>
    const T* array(const py::handle& tree, const char* name, py::ssize_t size) {
        auto array = py::cast<Array<T>>(tree.attr(name));
        if (array.ndim() != 1 || (size >= 0 && array.size() != size))
            throw std::invalid_argument(std::string("tree arrays differ in length: ") + name);
        kept_.push_back(array);
        return array.data();
    }

    void add(const py::handle& tree) {
        const auto* tokens = array<int32_t>(tree, "tokens", -1);
        const py::ssize_t size = kept_.back().size();
        const auto* parents = array<int16_t>(tree, "parents", size);
        const auto* path_probs = array<float>(tree, "path_probs", size);
        const auto* drafter_ids = array<uint8_t>(tree, "drafter_ids", size);
        views_.push_back({int(size), tokens, parents, path_probs, drafter_ids});
    }

    std::vector<py::array> kept_;
    std::vector<TreeView> views_;
};

// The first `width` of each row's best tokens, and their logits, both [rows, width]. For a token of
// -1 the logit of token 0 is returned.
py::tuple best_logits(const Array<int64_t>& best, const Array<float>& logits, int width) {
    if (best.ndim() != 2 || logits.ndim() != 2 || best.shape(0) != logits.shape(0) ||
        best.shape(1) < width)
        throw std::invalid_argument("best, logits: expected as many rows, and `width` best ones");
    Array<int64_t> tokens({best.shape(0), py::ssize_t(width)});
    Array<float> picked({best.shape(0), py::ssize_t(width)});
    int64_t* token = tokens.mutable_data();
    float* logit = picked.mutable_data();
    for (py::ssize_t row = 0; row < best.shape(0); ++row)
        for (int i = 0; i < width; ++i) {
            *token = best.at(row, i);
            *logit++ = logits.at(row, std::max<int64_t>(*token++, 0));
        }
    return py::make_tuple(tokens, picked);
}

// Per tree the nodes worth verifying, None if these are all of its nodes; see tree.h.
py::list selected_trees(const py::sequence& trees, const std::vector<double>& seconds) {
    const Trees all(trees);
    const std::vector<int> kept = select_nodes(all.views(), seconds);
    py::list result;
    for (size_t index = 0; index < kept.size(); ++index) {
        const TreeView& tree = all.views()[index];
        if (kept[index] == tree.size)
            result.append(py::none());
        else
            result.append(fields_of(pruned(tree, kept[index])));
    }
    return result;
}

// A top-k table in the memory of a numpy array.
class BoundTable {
public:
    BoundTable(
        Array<uint8_t> rows,
        int token_bytes,
        const std::array<float, 256>& probs,
        double steps_per_octave,
        const std::array<float, kOrders>& learning_rate,
        const std::array<double, kOrders>& weight)
        : rows_(std::move(rows)),
          table_(
              rows_.mutable_data(),
              rows_.size(),
              token_bytes,
              {probs, steps_per_octave, learning_rate, weight}) {}

    py::tuple grow(
        const std::vector<uint64_t>& salts,
        const std::vector<int64_t>& context,
        int max_nodes,
        double min_probability,
        uint8_t drafter_id,
        const BoundTable* request_table) const {
        if (context.empty()) throw std::invalid_argument("context: no token");
        Context known{-1, -1, -1};
        const int num_known = std::min(int(context.size()), kOrders);
        std::copy_n(context.begin(), num_known, known.begin());
        return fields_of(table_.grow(
            salts,
            known,
            num_known,
            max_nodes,
            min_probability,
            drafter_id,
            request_table ? &request_table->table_ : nullptr));
    }

    void learn_text(const std::vector<int64_t>& tokens) const { table_.learn_text(tokens); }

    void learn(
        uint64_t salt,
        const std::vector<int64_t>& before,
        const py::object& tree,
        const Array<int64_t>& best,
        const Array<float>& logits) const {
        std::array<int64_t, kOrders - 1> latest{-1, -1};
        std::copy_n(before.begin(), std::min(before.size(), latest.size()), latest.begin());
        const Trees trees(py::make_tuple(tree));
        const TreeView& view = trees.views()[0];
        if (best.size() != view.size * kWidth || logits.size() != view.size * kWidth)
            throw std::invalid_argument("best, logits: expected a row of 4 per node");
        table_.learn(salt, latest, view, best.data(), logits.data());
    }

private:
    Array<uint8_t> rows_;
    TopKTable table_;
};

void bind_calibration(py::module_& module) {
    py::class_<Calibration>(module, "Calibration")
        .def(
            py::init([](int max_depth, double prior_ratio, double prior_weight, double memory) {
                return std::make_unique<Calibration>(
                    CalibrationNumbers{max_depth, prior_ratio, prior_weight, memory});
            }),
            py::kw_only(),
            py::arg("max_depth"),
            py::arg("prior_ratio"),
            py::arg("prior_weight"),
            py::arg("memory"))
        .def(
            "merged",
            [](Calibration& self, bool sampled, const py::sequence& trees, int max_nodes) {
                return fields_of(self.merged(sampled, Trees(trees).views(), max_nodes));
            })
        .def(
            "record_outcome",
            [](Calibration& self,
               bool sampled,
               const py::sequence& trees,
               const std::vector<int32_t>& emitted) {
                self.record_outcome(sampled, Trees(trees).views(), emitted);
            });
}

void bind_trees(py::module_& module) {
    module.def("best_logits", &best_logits);
    module.def("build_tree", &build_tree);
    module.def("select_nodes", &selected_trees);
    module.def("validate", [](const py::object& tree, int vocab_size, int max_nodes) {
        validate(Trees(py::make_tuple(tree)).views()[0], vocab_size, max_nodes);
    });
}

void bind_topk_table(py::module_& module) {
    py::class_<BoundTable>(module, "TopKTable")
        .def(
            py::init<
                Array<uint8_t>,
                int,
                const std::array<float, 256>&,
                double,
                const std::array<float, kOrders>&,
                const std::array<double, kOrders>&>(),
            py::arg("rows").noconvert(),
            py::kw_only(),
            py::arg("token_bytes"),
            py::arg("probs"),
            py::arg("steps_per_octave"),
            py::arg("learning_rate"),
            py::arg("weight"))
        .def("grow", &BoundTable::grow)
        .def("learn", &BoundTable::learn)
        .def("learn_text", &BoundTable::learn_text);
}

void bind_suffix_search(py::module_& module) {
    py::class_<TokenLog>(module, "TokenLog")
        .def(py::init<const std::vector<int>&>())
        .def("__len__", &TokenLog::size)
        .def("extend", &TokenLog::extend);

    py::class_<SuffixSearch>(module, "SuffixSearch")
        .def(
            py::init([](const std::vector<int>& sizes,
                        int max_matches,
                        int max_matched,
                        double weight_base,
                        double pseudo_count,
                        double min_probability) {
                return std::make_unique<SuffixSearch>(SuffixNumbers{
                    sizes, max_matches, max_matched, weight_base, pseudo_count, min_probability});
            }),
            py::arg("sizes"),
            py::kw_only(),
            py::arg("max_matches"),
            py::arg("max_matched"),
            py::arg("weight_base"),
            py::arg("pseudo_count"),
            py::arg("min_probability"))
        .def(
            "tree",
            [](const SuffixSearch& self,
               const std::vector<const TokenLog*>& logs,
               const std::vector<int32_t>& recent,
               int max_nodes,
               uint8_t drafter_id) {
                return fields_of(self.tree(logs, recent, max_nodes, drafter_id));
            });
}

}  // namespace
}  // namespace specserve

PYBIND11_MODULE(_compiled, module) {
    specserve::bind_calibration(module);
    specserve::bind_trees(module);
    specserve::bind_topk_table(module);
    specserve::bind_suffix_search(module);
}
