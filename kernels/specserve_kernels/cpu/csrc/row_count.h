// Selects code that is compiled for a number of rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "rows.h"

namespace specserve {

// Calls function(n), n being min(num_rows, kRowsTogether) as a type whose `value` is a constant.
template <int kRows = 1, typename Function>
void with_row_count(int64_t num_rows, const Function& function) {
    if constexpr (kRows < kRowsTogether)
        if (num_rows > kRows) return with_row_count<kRows + 1>(num_rows, function);
    function(std::integral_constant<int, kRows>());
}

}  // namespace specserve
