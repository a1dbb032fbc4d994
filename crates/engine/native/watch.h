// What `matrices.cpp` knows of the context that is evaluated on a thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

struct ggml_tensor;

struct tether_context {
    // Whether our kernels evaluate it.
    bool with_kernels;
    // The keys of each layer, and the positions of their cells; -1 where a cell is empty.
    std::vector<std::pair<const ggml_tensor *, const std::vector<int32_t> *>> positions;
};

// The context that this thread evaluates, or null.
extern thread_local const tether_context * tether_current;
// Whether a model that this thread loads is to be packed.
extern thread_local bool tether_packs;
