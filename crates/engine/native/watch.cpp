// Finds the positions of the cells in llama.cpp's caches, by which our attention sums. llama.cpp tells them to nobody, so
// this is compiled with its own headers, as `matrices.cpp` is with ggml's.

#include "watch.h"

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama.h"

thread_local const tether_context * tether_current = nullptr;
thread_local bool                   tether_packs   = true;

namespace {

static_assert(sizeof(llama_pos) == sizeof(int32_t), "positions are read as they lie");

// Access is not checked for the arguments of an explicit instantiation, which is how a private member gets a name here.
using positions_member = std::vector<llama_pos> llama_kv_cells::*;
positions_member positions_of_cells();
template <positions_member MEMBER> struct named {
    friend positions_member positions_of_cells() { return MEMBER; }
};
template struct named<&llama_kv_cells::pos>;

void add(tether_context & context, const llama_kv_cache * cache) {
    const std::vector<int32_t> & positions = cache->get_cells(0).*positions_of_cells();
    for (const uint32_t layer : cache->get_layer_ids()) {
        context.positions.emplace_back(cache->get_k_storage(layer), &positions);
    }
}

void add(tether_context & context, const llama_kv_cache_iswa * caches) {
    add(context, caches->get_base());
    add(context, caches->get_swa());
}

}  // namespace

extern "C" {

tether_context * tether_watch(const llama_context * evaluated, bool with_kernels) {
    auto *           context = new tether_context{ with_kernels, {} };
    llama_memory_i * memory  = llama_get_memory(evaluated);
    if (const auto * cache = dynamic_cast<llama_kv_cache *>(memory)) {
        add(*context, cache);
    } else if (const auto * caches = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        add(*context, caches);
    } else if (const auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        add(*context, hybrid->get_mem_attn());
    } else if (const auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        add(*context, hybrid_iswa->get_mem_attn());
    }
    return context;
}

void tether_unwatch(tether_context * context) {
    delete context;
}

// Says which context this thread evaluates from here on; null for none.
void tether_evaluate(const tether_context * context) {
    tether_current = context;
}

// Says whether what this thread loads from here on is to be packed.
void tether_pack(bool packs) {
    tether_packs = packs;
}
}
