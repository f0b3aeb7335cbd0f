// What the driver's results are called.
#include "cuda.h"

struct Words {
    CUresult result;
    const char* name;
    const char* text;
};

#define WORDS_OF(result, text) {result, #result, text}
static const Words WORDS[] = {
    WORDS_OF(CUDA_SUCCESS, "no error"),
    WORDS_OF(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    WORDS_OF(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    WORDS_OF(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    WORDS_OF(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    WORDS_OF(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    WORDS_OF(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    WORDS_OF(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
    WORDS_OF(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    WORDS_OF(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    WORDS_OF(CUDA_ERROR_NOT_READY, "device not ready"),
    WORDS_OF(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled"),
    WORDS_OF(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"),
    WORDS_OF(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    WORDS_OF(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    WORDS_OF(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    WORDS_OF(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    WORDS_OF(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    WORDS_OF(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    WORDS_OF(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    WORDS_OF(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    WORDS_OF(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    WORDS_OF(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
             "attempt to terminate a thread-local capture sequence from another thread"),
};
#undef WORDS_OF

static const Words* find(CUresult result) {
    for (const Words& words : WORDS) {
        if (words.result == result) {
            return &words;
        }
    }
    return nullptr;
}

EXPORT CUresult cuGetErrorName(CUresult result, const char** name) {
    const Words* words = find(result);
    *name = words != nullptr ? words->name : nullptr;
    return words != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult result, const char** text) {
    const Words* words = find(result);
    *text = words != nullptr ? words->text : nullptr;
    return words != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
