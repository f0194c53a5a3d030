// The Python module `_compiled`, which `HostCode` in ../__init__.py declares.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "calibration.h"
#include "suffix.h"
#include "token_log.h"
#include "topk_table.h"
#include "tree.h"

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

namespace pybind11::detail {

// A view of a Python DraftTree, which owns its arrays and never changes.
template <>
class type_caster<specserve::TreeView> {
   public:
    PYBIND11_TYPE_CASTER(specserve::TreeView, const_name("DraftTree"));

    bool load(handle tree, bool) {
        value.size = -1;
        value.tokens = data<int32_t>(tree, "tokens");
        value.parents = data<int16_t>(tree, "parents");
        value.path_probs = data<float>(tree, "path_probs");
        value.drafter_ids = data<uint8_t>(tree, "drafter_ids");
        return true;
    }

   private:
    template <class T>
    const T* data(handle tree, const char* name) {
        const object field = tree.attr(name);
        if (!py::isinstance<Array<T>>(field))
            throw std::invalid_argument(std::string("a tree array has another type: ") + name);
        const auto array = py::reinterpret_borrow<Array<T>>(field);
        if (value.size < 0) value.size = int(array.size());
        if (array.ndim() != 1 || array.size() != value.size)
            throw std::invalid_argument(std::string("tree arrays differ in length: ") + name);
        return array.data();
    }
};

// The fields of a DraftTree, in their order.
template <>
class type_caster<specserve::Tree> {
   public:
    static constexpr auto name = const_name("tuple");

    static handle cast(const specserve::Tree& tree, return_value_policy, handle) {
        return py::make_tuple(array<int32_t>(tree.tokens), array<int16_t>(tree.parents),
                              array<float>(tree.path_probs), array<uint8_t>(tree.drafter_ids))
            .release();
    }

   private:
    template <class T, class U>
    static Array<T> array(const std::vector<U>& values) {
        Array<T> array(py::ssize_t(values.size()));
        std::copy(values.begin(), values.end(), array.mutable_data());
        return array;
    }
};

}  // namespace pybind11::detail

namespace specserve {
namespace {

// See reference/topk_table.py.
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

TopKTable topk_table(Array<uint8_t>& rows, int token_bytes, const std::array<float, 256>& probs,
                     double steps_per_octave, const std::array<float, kOrders>& learning_rate,
                     const std::array<double, kOrders>& weight) {
    return {rows.mutable_data(), rows.size(), token_bytes, probs, steps_per_octave, learning_rate,
            weight};
}

void learn(const TopKTable& table, uint64_t salt, const std::vector<int64_t>& before,
           const TreeView& tree, const Array<int64_t>& best, const Array<float>& logits) {
    if (best.size() != tree.size * kWidth || logits.size() != tree.size * kWidth)
        throw std::invalid_argument("best, logits: expected a row of 4 per node");
    table.learn(salt, before, tree, best.data(), logits.data());
}

}  // namespace
}  // namespace specserve

PYBIND11_MODULE(_compiled, module) {
    using namespace specserve;
    module.def("best_logits", &best_logits);
    module.def("build_tree", &build_tree);
    module.def("select_nodes", &select_nodes);
    module.def("validate", &validate);

    py::class_<Calibration>(module, "Calibration")
        .def(py::init<int, double, double, double>(), py::kw_only(), py::arg("max_depth"),
             py::arg("prior_ratio"), py::arg("prior_weight"), py::arg("memory"))
        .def("merged", &Calibration::merged)
        .def("record_outcome", &Calibration::record_outcome);

    py::class_<TokenLog>(module, "TokenLog")
        .def(py::init<const std::vector<int>&>())
        .def("__len__", &TokenLog::size)
        .def("extend", &TokenLog::extend);

    py::class_<SuffixSearch>(module, "SuffixSearch")
        .def(py::init<const std::vector<int>&, int, int, double, double, double>(),
             py::arg("sizes"), py::kw_only(), py::arg("max_matches"), py::arg("max_matched"),
             py::arg("weight_base"), py::arg("pseudo_count"), py::arg("min_probability"))
        .def("tree", &SuffixSearch::tree);

    py::class_<TopKTable>(module, "TopKTable")
        .def(py::init(&topk_table), py::keep_alive<1, 2>(), py::arg("rows").noconvert(),
             py::kw_only(), py::arg("token_bytes"), py::arg("probs"), py::arg("steps_per_octave"),
             py::arg("learning_rate"), py::arg("weight"))
        .def("grow", &TopKTable::grow)
        .def("learn", &learn)
        .def("learn_text", &TopKTable::learn_text);
}
