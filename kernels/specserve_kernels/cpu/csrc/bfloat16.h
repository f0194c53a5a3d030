// How K and V are kept.
#pragma once

#include <cstdint>

namespace specserve {

struct bfloat16 {
    uint16_t bits;
};

}  // namespace specserve
