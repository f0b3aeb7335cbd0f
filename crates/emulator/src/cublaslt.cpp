// libcublasLt for the emulator: one plain matrix multiplication, f32 sums in ascending k, on the stream of the emulated
// driver.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "driver/cuda.h"
#include "driver/handles.h"

namespace {

enum Status : int { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };

enum DataType : int { R_32F = 0, R_16BF = 14 };
const int COMPUTE_32F = 68;
const int COMPUTE_32F_PEDANTIC = 69;
const int EPILOGUE_DEFAULT = 1;

struct Library {};

struct Operation {
    int32_t compute_type = COMPUTE_32F;
    int32_t scale_type = R_32F;
    int32_t pointer_mode = 0;
    int32_t transpose_a = 0;
    int32_t transpose_b = 0;
    int32_t epilogue = EPILOGUE_DEFAULT;
};

// A matrix by columns.
struct Layout {
    int32_t type = R_32F;
    int32_t order = 0;
    uint64_t rows = 0, cols = 0;
    int64_t ld = 0;
    int32_t batches = 1;
    int64_t batch_stride = 0;

    size_t element_bytes() const { return type == R_32F ? 4 : 2; }
};

struct Preference {
    uint64_t workspace_bytes = 0;
};

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

// Algorithms that this library gave out begin with this.
const uint64_t ALGORITHM = 0x7068616c616e78;

// Copies an attribute of exactly that size.
template <class T> int assign(T& field, const void* value, size_t bytes) {
    if (value == nullptr || bytes != sizeof field) {
        return INVALID_VALUE;
    }
    std::memcpy(&field, value, bytes);
    return SUCCESS;
}

struct Operand {
    const char* data;
    Layout layout;
    bool transposed;

    uint64_t rows() const { return transposed ? layout.cols : layout.rows; }
    uint64_t cols() const { return transposed ? layout.rows : layout.cols; }

    float at(int64_t batch, uint64_t row, uint64_t col) const {
        uint64_t in_column = transposed ? col : row, column = transposed ? row : col;
        size_t index = static_cast<size_t>(batch * layout.batch_stride) + column * static_cast<size_t>(layout.ld) + in_column;
        if (layout.type == R_32F) {
            float value;
            std::memcpy(&value, data + 4 * index, 4);
            return value;
        }
        uint16_t half;
        std::memcpy(&half, data + 2 * index, 2);
        uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
};

void store(char* data, const Layout& layout, size_t index, float value) {
    if (layout.type == R_32F) {
        std::memcpy(data + 4 * index, &value, 4);
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t half = value == value ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;
    std::memcpy(data + 2 * index, &half, 2);
}

struct Multiplication {
    Operand a, b, c;
    char* d;
    Layout d_layout;
    float alpha, beta;

    // Tiles of 16 rows of a: their columns of k lie side by side, so that a vector holds one k of all rows.
    void run() const {
        const uint64_t TILE = 16;
        uint64_t depth = a.cols();
        std::vector<float> tile(depth * TILE), column(depth);
        for (int64_t batch = 0; batch < d_layout.batches; batch++) {
            for (uint64_t first = 0; first < a.rows(); first += TILE) {
                uint64_t rows = std::min(TILE, a.rows() - first);
                for (uint64_t row = 0; row < rows; row++) {
                    for (uint64_t k = 0; k < depth; k++) {
                        tile[k * TILE + row] = a.at(batch, first + row, k);
                    }
                }
                for (uint64_t col = 0; col < b.cols(); col++) {
                    for (uint64_t k = 0; k < depth; k++) {
                        column[k] = b.at(batch, k, col);
                    }
                    float sums[TILE] = {};
                    for (uint64_t k = 0; k < depth; k++) {
                        for (uint64_t row = 0; row < TILE; row++) {
                            sums[row] += tile[k * TILE + row] * column[k];
                        }
                    }
                    for (uint64_t row = 0; row < rows; row++) {
                        float value = alpha * sums[row];
                        if (beta != 0.0f) {
                            value += beta * c.at(batch, first + row, col);
                        }
                        size_t index = static_cast<size_t>(batch * d_layout.batch_stride) +
                                       col * static_cast<size_t>(d_layout.ld) + first + row;
                        store(d, d_layout, index, value);
                    }
                }
            }
        }
    }
};

// What of the interface is emulated.
int check(const Operation* operation, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
    using emulator::handles;
    if (!handles<Operation>().knows(const_cast<Operation*>(operation))) {
        return INVALID_VALUE;
    }
    for (const Layout* layout : {a, b, c, d}) {
        if (!handles<Layout>().knows(const_cast<Layout*>(layout)) || layout->ld < static_cast<int64_t>(layout->rows)) {
            return INVALID_VALUE;
        }
        if (layout->order != 0 || (layout->type != R_32F && layout->type != R_16BF)) {
            return NOT_SUPPORTED;
        }
        if (layout->batches != d->batches) {
            return INVALID_VALUE;
        }
    }
    bool plain = (operation->compute_type == COMPUTE_32F || operation->compute_type == COMPUTE_32F_PEDANTIC) &&
                 operation->scale_type == R_32F && operation->pointer_mode == 0 &&
                 operation->epilogue == EPILOGUE_DEFAULT && operation->transpose_a <= 1 && operation->transpose_b <= 1;
    if (!plain || a->type != b->type) {
        return NOT_SUPPORTED;
    }
    Operand left = {nullptr, *a, operation->transpose_a != 0};
    Operand right = {nullptr, *b, operation->transpose_b != 0};
    bool sizes = left.cols() == right.rows() && d->rows == left.rows() && d->cols == right.cols() && c->rows == d->rows &&
                 c->cols == d->cols;
    return sizes ? SUCCESS : INVALID_VALUE;
}

}  // namespace

using emulator::handles;

EXPORT size_t cublasLtGetVersion() {
    return 130000;
}

EXPORT int cublasLtCreate(Library** handle) {
    *handle = handles<Library>().add(std::make_unique<Library>());
    return SUCCESS;
}

EXPORT int cublasLtDestroy(Library* handle) {
    return handles<Library>().remove(handle) != nullptr ? SUCCESS : NOT_INITIALIZED;
}

EXPORT int cublasLtMatmulDescCreate(Operation** handle, int compute_type, int scale_type) {
    auto operation = std::make_unique<Operation>();
    operation->compute_type = compute_type;
    operation->scale_type = scale_type;
    *handle = handles<Operation>().add(std::move(operation));
    return SUCCESS;
}

EXPORT int cublasLtMatmulDescDestroy(Operation* operation) {
    return handles<Operation>().remove(operation) != nullptr ? SUCCESS : INVALID_VALUE;
}

EXPORT int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value, size_t bytes) {
    if (!handles<Operation>().knows(operation)) {
        return INVALID_VALUE;
    }
    switch (attribute) {
        case 0:
            return assign(operation->compute_type, value, bytes);
        case 1:
            return assign(operation->scale_type, value, bytes);
        case 2:
            return assign(operation->pointer_mode, value, bytes);
        case 3:
            return assign(operation->transpose_a, value, bytes);
        case 4:
            return assign(operation->transpose_b, value, bytes);
        case 7:
            return assign(operation->epilogue, value, bytes);
        default:
            return NOT_SUPPORTED;
    }
}

EXPORT int cublasLtMatrixLayoutCreate(Layout** handle, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    auto layout = std::make_unique<Layout>();
    layout->type = type;
    layout->rows = rows;
    layout->cols = cols;
    layout->ld = ld;
    *handle = handles<Layout>().add(std::move(layout));
    return SUCCESS;
}

EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
    return handles<Layout>().remove(layout) != nullptr ? SUCCESS : INVALID_VALUE;
}

EXPORT int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    if (!handles<Layout>().knows(layout)) {
        return INVALID_VALUE;
    }
    switch (attribute) {
        case 0:
            return assign(layout->type, value, bytes);
        case 1:
            return assign(layout->order, value, bytes);
        case 2:
            return assign(layout->rows, value, bytes);
        case 3:
            return assign(layout->cols, value, bytes);
        case 4:
            return assign(layout->ld, value, bytes);
        case 5:
            return assign(layout->batches, value, bytes);
        case 6:
            return assign(layout->batch_stride, value, bytes);
        default:
            return NOT_SUPPORTED;
    }
}

EXPORT int cublasLtMatmulPreferenceCreate(Preference** handle) {
    *handle = handles<Preference>().add(std::make_unique<Preference>());
    return SUCCESS;
}

EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    return handles<Preference>().remove(preference) != nullptr ? SUCCESS : INVALID_VALUE;
}

// Preferences change nothing: there is one algorithm, and it needs no workspace.
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int, const void* value, size_t) {
    return handles<Preference>().knows(preference) && value != nullptr ? SUCCESS : INVALID_VALUE;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(Library* library, const Operation* operation, const Layout* a, const Layout* b,
                                          const Layout* c, const Layout* d, Preference* preference, int requested,
                                          Heuristic* results, int* count) {
    *count = 0;
    if (!handles<Library>().knows(library) || !handles<Preference>().knows(preference) || requested < 1) {
        return INVALID_VALUE;
    }
    if (int refused = check(operation, a, b, c, d)) {
        return refused;
    }
    results[0] = {};
    results[0].algorithm.data[0] = ALGORITHM;
    results[0].waves = 1.0f;
    *count = 1;
    return SUCCESS;
}

EXPORT int cublasLtMatmul(Library* library, const Operation* operation, const void* alpha, const void* a,
                          const Layout* a_layout, const void* b, const Layout* b_layout, const void* beta, const void* c,
                          const Layout* c_layout, void* d, const Layout* d_layout, const Algorithm* algorithm, void*,
                          size_t, CUstream stream) {
    if (!handles<Library>().knows(library)) {
        return NOT_INITIALIZED;
    }
    if (algorithm != nullptr && algorithm->data[0] != ALGORITHM) {
        return INVALID_VALUE;
    }
    if (int refused = check(operation, a_layout, b_layout, c_layout, d_layout)) {
        return refused;
    }
    auto multiplication = std::make_unique<Multiplication>();
    multiplication->a = {static_cast<const char*>(a), *a_layout, operation->transpose_a != 0};
    multiplication->b = {static_cast<const char*>(b), *b_layout, operation->transpose_b != 0};
    multiplication->c = {static_cast<const char*>(c), *c_layout, false};
    multiplication->d = static_cast<char*>(d);
    multiplication->d_layout = *d_layout;
    std::memcpy(&multiplication->alpha, alpha, sizeof(float));
    std::memcpy(&multiplication->beta, beta, sizeof(float));
    CUresult submitted = emulator_submit(
        stream, [](void* data) { static_cast<Multiplication*>(data)->run(); },
        [](void* data) { delete static_cast<Multiplication*>(data); }, multiplication.release());
    return submitted == CUDA_SUCCESS ? SUCCESS : EXECUTION_FAILED;
}
