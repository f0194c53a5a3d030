// The bits of a bfloat16, one of the two storage types of K and V.
#pragma once

#include <cstdint>

namespace specserve {

struct bfloat16 {
    uint16_t bits;
};

}  // namespace specserve
