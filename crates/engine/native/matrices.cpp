// Puts our kernels into ggml's CPU backend: a type of buffer whose matrices are packed when they are loaded and whose
// products are ours, as ggml's own repacked matrices are; and attention, which ggml asks such types about as about every
// other operation. Rust holds the kernels and hands over their functions; see
// `src/llama/native/matrices.rs`. The headers are those of the ggml that is linked, so that a change of theirs is a
// complaint of the compiler's.

#include "watch.h"

#include <algorithm>
#include <cstring>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu/ggml-cpu-impl.h"
#include "ggml-cpu/traits.h"
#include "ggml-impl.h"
#include "ggml.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef TETHER_SHARED_GGML
#include <dlfcn.h>

// The library that is loaded at run time has its own.
ggml::cpu::tensor_traits::~tensor_traits() {}
ggml::cpu::extra_buffer_type::~extra_buffer_type() {}
#endif

extern "C" {

// As `kernels::Attention` has it.
struct tether_attention {
    size_t          width, heads, kv_heads, queries, cells;
    const int32_t * positions;
    size_t          positions_end;
    float           scale;
    const void * query;
    size_t       query_stride, query_head_stride;
    const void * key;
    size_t       key_stride, key_head_stride;
    const void * value;
    size_t       value_stride, value_head_stride;
    const void * mask;
    size_t       mask_stride;
    void *       output;
    size_t       output_stride;
};

// What Rust gives. A matrix is named by its ggml type, its columns and its rows.
struct tether_matrix_functions {
    bool (*can_pack)(uint32_t type, size_t columns, size_t rows);
    void (*pack)(uint32_t type, size_t columns, size_t rows, const void * source, void * packed);
    size_t (*inputs_bytes)(uint32_t type, size_t columns, size_t rows, size_t count);
    void (*take_in)(uint32_t type, size_t columns, size_t rows, const float * vector, size_t from_block, size_t to_block,
                    size_t index, size_t count, void * inputs);
    void (*multiply)(uint32_t type, size_t columns, size_t rows, const void * packed, const void * inputs, size_t count,
                     size_t from_group, size_t to_group, float * outputs);
    // Returns the numbers that a thread needs beside it all, and 0 where it cannot be computed.
    size_t (*attention_floats)(const tether_attention * attention);
    size_t (*attention_units)(const tether_attention * attention, size_t threads);
    void (*attend)(const tether_attention * attention, size_t unit, size_t threads, float * scratch);
};

bool tether_register_matrices(const tether_matrix_functions * functions);
size_t tether_forget_amx();
}

namespace {

constexpr size_t BLOCK = 32;
constexpr size_t LANES = 16;
// Weights that one thread takes at once: they stay in its second cache while all vectors are multiplied with them.
constexpr size_t CHUNK_BYTES = 256 << 10;
// Parts of a matrix for each thread, so that one that is held up does not hold up the others.
constexpr size_t CHUNKS_PER_THREAD = 8;

tether_matrix_functions ours;

// What we use of ggml's CPU backend, which may have been loaded at run time.
struct {
    std::vector<ggml_backend_buffer_type_t> & (*extra_buffer_types)();
    void (*barrier)(ggml_threadpool *);
    void (*chunk_set)(ggml_threadpool *, int);
    int (*chunk_add)(ggml_threadpool *, int);
} theirs;

bool find_theirs(ggml_backend_reg_t registry) {
#ifdef TETHER_SHARED_GGML
    Dl_info where;
    if (!dladdr(reinterpret_cast<void *>(registry->iface.get_name), &where)) {
        return false;
    }
    void * library = dlopen(where.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (!library) {
        return false;
    }
    auto find = [&](auto & function, const char * name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
        return function != nullptr;
    };
    return find(theirs.extra_buffer_types, "_Z39ggml_backend_cpu_get_extra_buffer_typesv") &&
           find(theirs.barrier, "ggml_barrier") && find(theirs.chunk_set, "ggml_threadpool_chunk_set") &&
           find(theirs.chunk_add, "ggml_threadpool_chunk_add");
#else
    (void) registry;
    theirs = { ggml_backend_cpu_get_extra_buffer_types, ggml_barrier, ggml_threadpool_chunk_set,
               ggml_threadpool_chunk_add };
    return true;
#endif
}

bool can_pack(const ggml_tensor * matrix) {
    return ggml_n_dims(matrix) == 2 && ours.can_pack(matrix->type, matrix->ne[0], matrix->ne[1]);
}

// The product of a packed matrix and vectors. All of ggml's threads come here together.
class matrix_traits : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        const ggml_tensor * matrix = op->src[0];
        size = ours.inputs_bytes(matrix->type, matrix->ne[0], matrix->ne[1], ggml_nrows(op->src[1]));
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const ggml_tensor * matrix  = op->src[0];
        const ggml_tensor * vectors = op->src[1];
        const size_t        columns = matrix->ne[0], rows = matrix->ne[1], count = ggml_nrows(vectors);
        const size_t        thread = params->ith, threads = params->nth;

        // Each thread takes in its share of the blocks of all vectors.
        const size_t blocks = columns / BLOCK;
        const size_t end    = count * blocks * (thread + 1) / threads;
        for (size_t at = count * blocks * thread / threads; at < end;) {
            const size_t index = at / blocks, from = at % blocks;
            const size_t to     = std::min(blocks, from + end - at);
            const size_t plane  = index / vectors->ne[1];
            const char * vector = static_cast<const char *>(vectors->data) + index % vectors->ne[1] * vectors->nb[1] +
                                  plane % vectors->ne[2] * vectors->nb[2] + plane / vectors->ne[2] * vectors->nb[3];
            ours.take_in(matrix->type, columns, rows, reinterpret_cast<const float *>(vector), from, to, index, count,
                         params->wdata);
            at += to - from;
        }
        if (thread == 0) {
            theirs.chunk_set(params->threadpool, params->nth);
        }
        theirs.barrier(params->threadpool);

        const size_t groups      = rows / LANES;
        const size_t group_bytes = ggml_row_size(matrix->type, columns) * LANES;
        const size_t most        = std::max<size_t>(1, CHUNK_BYTES / group_bytes);
        const size_t chunk       = std::clamp<size_t>(groups / (threads * CHUNKS_PER_THREAD), 1, most);
        for (size_t from = thread * chunk; from < groups;) {
            ours.multiply(matrix->type, columns, rows, matrix->data, params->wdata, count, from,
                          std::min(groups, from + chunk), static_cast<float *>(op->data));
            from = theirs.chunk_add(params->threadpool, 1) * chunk;
        }
        return true;
    }
};

// What the thread that evaluates a context leaves in its operations for all threads that compute them, where ggml keeps
// the parameters of an operation and this one has none.
struct mark {
    const int32_t * positions;
    uint32_t        positions_end;
    bool            is_theirs;
};

constexpr size_t MARK_OFFSET = 32;
static_assert(MARK_OFFSET + sizeof(mark) <= sizeof(ggml_tensor::op_params), "there is no place for the mark");

mark mark_of(const ggml_tensor * op) {
    mark it;
    memcpy(&it, reinterpret_cast<const char *>(op->op_params) + MARK_OFFSET, sizeof(it));
    return it;
}

// ggml plans a graph on the thread that evaluates it, before any thread computes. While it computes nothing changes.
void leave_mark(const ggml_tensor * op) {
    if (!tether_current) {
        return;
    }
    mark it;
    memset(&it, 0, sizeof(it));
    it.is_theirs            = !tether_current->with_kernels;
    const ggml_tensor * key = op->src[1];
    for (const auto & [storage, positions] : tether_current->positions) {
        if (storage == key->view_src && positions->size() >= static_cast<size_t>(key->ne[1])) {
            it.positions     = positions->data();
            it.positions_end = static_cast<uint32_t>(positions->size());
        }
    }
    char * to = reinterpret_cast<char *>(const_cast<ggml_tensor *>(op)->op_params) + MARK_OFFSET;
    if (memcmp(to, &it, sizeof(it)) != 0) {
        memcpy(to, &it, sizeof(it));
    }
}

// Attention, where it has nothing that is not common.
class attention_traits : public ggml::cpu::tensor_traits {
    bool work_size(int threads, const ggml_tensor * op, size_t & size) override {
        size = threads * scratch_bytes(of(op));
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const tether_attention attention = of(op);
        if (params->ith == 0) {
            theirs.chunk_set(params->threadpool, params->nth);
        }
        theirs.barrier(params->threadpool);
        void *       scratch = static_cast<char *>(params->wdata) + params->ith * scratch_bytes(attention);
        const size_t units   = ours.attention_units(&attention, params->nth);
        for (size_t unit = params->ith; unit < units; unit = theirs.chunk_add(params->threadpool, 1)) {
            ours.attend(&attention, unit, params->nth, static_cast<float *>(scratch));
        }
        return true;
    }

    // Whole cache lines.
    static size_t scratch_bytes(const tether_attention & attention) {
        return GGML_PAD(ours.attention_floats(&attention) * sizeof(float), 64);
    }

    static tether_attention of(const ggml_tensor * op) {
        const ggml_tensor *query = op->src[0], *key = op->src[1], *value = op->src[2], *mask = op->src[3];
        tether_attention   it = {};
        it.width              = query->ne[0];
        it.heads              = query->ne[2];
        it.kv_heads           = key->ne[2];
        it.queries            = query->ne[1];
        it.cells              = key->ne[1];
        const mark marked     = mark_of(op);
        it.positions          = marked.positions;
        it.positions_end      = marked.positions_end;
        it.scale              = ggml_get_op_params_f32(op, 0);
        it.query              = query->data;
        it.query_stride       = query->nb[1];
        it.query_head_stride  = query->nb[2];
        it.key                = key->data;
        it.key_stride         = key->nb[1];
        it.key_head_stride    = key->nb[2];
        it.value              = value->data;
        it.value_stride       = value->nb[1];
        it.value_head_stride  = value->nb[2];
        it.mask               = mask->data;
        it.mask_stride        = mask->nb[1];
        it.output             = op->data;
        it.output_stride      = op->nb[1];
        return it;
    }

  public:
    static bool can_compute(const ggml_tensor * op) {
        const ggml_tensor *query = op->src[0], *key = op->src[1], *value = op->src[2], *mask = op->src[3];
        const bool         is_plain = mask && !op->src[4] && ggml_get_op_params_f32(op, 1) == 0.0f &&
                              ggml_get_op_params_f32(op, 2) == 0.0f;
        if (!is_plain || query->type != GGML_TYPE_F32 || mask->type != GGML_TYPE_F16) {
            return false;
        }
        for (const ggml_tensor * kept : { key, value }) {
            if (kept->type != GGML_TYPE_F16 || kept->nb[0] != sizeof(ggml_fp16_t) || kept->ne[0] != query->ne[0] ||
                kept->ne[1] != key->ne[1] || kept->ne[2] != key->ne[2] || kept->ne[3] != 1) {
                return false;
            }
        }
        const bool is_one = query->ne[3] == 1 && mask->ne[2] == 1 && mask->ne[3] == 1;
        const bool fits   = query->nb[0] == sizeof(float) && mask->ne[0] == key->ne[1] && mask->ne[1] >= query->ne[1];
        if (!is_one || !fits) {
            return false;
        }
        const tether_attention attention = of(op);
        return ours.attention_floats(&attention) != 0;
    }
};

matrix_traits    products;
attention_traits attentions;

ggml_backend_buffer_type * packed_type();

class packed_matrices : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * vectors = op->src[1];
        return tether_packs && op->op == GGML_OP_MUL_MAT && is_packed(op) && can_pack(op->src[0]) &&
               vectors->type == GGML_TYPE_F32 && vectors->nb[0] == sizeof(float) &&
               (!vectors->buffer || ggml_backend_buft_is_host(vectors->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_MUL_MAT:
                GGML_ASSERT(!is_packed(op) || !op->src[0]->view_src);
                return is_packed(op) ? &products : nullptr;
            case GGML_OP_FLASH_ATTN_EXT:
                leave_mark(op);
                return !mark_of(op).is_theirs && attention_traits::can_compute(op) ? &attentions : nullptr;
            default:
                return nullptr;
        }
    }

    static bool is_packed(const ggml_tensor * op) {
        return op->src[0]->buffer && op->src[0]->buffer->buft == packed_type();
    }
};

packed_matrices matrices;

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor) && "a matrix is packed as a whole");
    ours.pack(tensor->type, tensor->ne[0], tensor->ne[1], data, tensor->data);
}

// All of the weights are read for each token, which is as fast as memory only where their addresses are found quickly.
void use_large_pages(void * base, size_t size) {
#ifdef __linux__
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t     from = GGML_PAD(reinterpret_cast<uintptr_t>(base), PAGE);
    const uintptr_t     to   = (reinterpret_cast<uintptr_t>(base) + size) / PAGE * PAGE;
    if (from < to) {
        madvise(reinterpret_cast<void *>(from), to - from, MADV_HUGEPAGE);
    }
#else
    (void) base, (void) size;
#endif
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        use_large_pages(ggml_backend_buffer_get_base(buffer), size);
        buffer->buft              = type;
        buffer->iface.set_tensor  = set_tensor;
        buffer->iface.get_tensor  = nullptr;
        buffer->iface.cpy_tensor  = nullptr;
    }
    return buffer;
}

ggml_backend_buffer_type * packed_type() {
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type it = {};
        it.iface.get_name           = [](ggml_backend_buffer_type_t) { return "TETHER_PACKED"; };
        it.iface.alloc_buffer       = alloc_buffer;
        it.iface.get_alignment      = [](ggml_backend_buffer_type_t) -> size_t { return 64; };
        it.device                   = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        it.context                  = &matrices;
        return it;
    }();
    return &type;
}

}  // namespace

// Takes the AMX matrices off ggml's list, and returns how many types of matrices are left. GCC before 14 takes
// `_tile_loadconfig` to read 8 of its 64 bytes and leaves the others of ggml's tile configuration unwritten: the first
// product ends the process. Must come before the first model is loaded.
size_t tether_forget_amx() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!device || !find_theirs(ggml_backend_dev_backend_reg(device))) {
        return 0;
    }
    auto & types  = theirs.extra_buffer_types();
    auto   is_amx = [](ggml_backend_buffer_type_t type) { return strcmp(ggml_backend_buft_name(type), "AMX") == 0; };
    types.erase(std::remove_if(types.begin(), types.end(), is_amx), types.end());
    return types.size();
}

// Offers our buffers before all others of the CPU's. Must come before the first model is loaded. Returns false where the
// backend is not as it should be, and nothing has changed.
bool tether_register_matrices(const tether_matrix_functions * functions) {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!device || !find_theirs(ggml_backend_dev_backend_reg(device))) {
        return false;
    }
    ours         = *functions;
    auto & types = theirs.extra_buffer_types();
    types.insert(types.begin(), packed_type());
    return true;
}
