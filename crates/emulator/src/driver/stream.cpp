// Streams and what is submitted to them; waiting and its prohibition during a capture.
#include "stream.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "capture.h"
#include "handles.h"

namespace emulator {

bool runs_late() {
    static const bool late = [] {
        const char* value = std::getenv("PHALANX_EMULATOR_LATE");
        return value != nullptr && std::strcmp(value, "1") == 0;
    }();
    return late;
}

static Stream* default_stream(Device* device) {
    static std::mutex mutex;
    static auto* streams = new std::map<Device*, std::shared_ptr<Stream>>();
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Stream>& stream = (*streams)[device];
    if (stream == nullptr) {
        stream = std::make_shared<Stream>();
        stream->device = device;
        stream->legacy = true;
    }
    return stream.get();
}

Stream* find_stream(CUstream handle) {
    // 0 and 1 are the default stream, 2 is that of the calling thread; here they are the same.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) {
        return current_device() != nullptr ? default_stream(current_device()) : nullptr;
    }
    return handles<Stream>().knows(handle) ? handle : nullptr;
}

CUresult submit(Stream& stream, Work work) {
    if (stream.capture != nullptr) {
        if (!stream.capture->valid) {
            return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        }
        stream.capture->graph.nodes->push_back(std::move(work));
        return CUDA_SUCCESS;
    }
    if (stream.legacy) {
        finish_blocking(stream.device);
    } else if (runs_late()) {
        std::lock_guard<std::mutex> lock(stream.queue_mutex);
        stream.queue.push_back(std::move(work));
        return CUDA_SUCCESS;
    }
    std::lock_guard<std::recursive_mutex> lock(stream.running);
    work();
    return CUDA_SUCCESS;
}

// Runs the next piece of work; false if there is none.
static bool run_one(Stream& stream) {
    Work work;
    {
        std::lock_guard<std::mutex> lock(stream.queue_mutex);
        if (stream.queue.empty()) {
            return false;
        }
        work = std::move(stream.queue.front());
        stream.queue.pop_front();
    }
    work();
    return true;
}

void finish(Stream& stream) {
    std::lock_guard<std::recursive_mutex> lock(stream.running);
    while (run_one(stream)) {
    }
}

void finish(Mark& mark) {
    if (mark.done) {
        return;
    }
    std::lock_guard<std::recursive_mutex> lock(mark.stream->running);
    while (!mark.done && run_one(*mark.stream)) {
    }
}

static void finish_streams(Device* device, bool all) {
    for (const std::shared_ptr<Stream>& stream : handles<Stream>().all()) {
        if (stream->device == device && stream->capture == nullptr && (all || stream->blocking())) {
            finish(*stream);
        }
    }
}

void finish_all(Device* device) {
    finish_streams(device, true);
}

void finish_blocking(Device* device) {
    finish_streams(device, false);
}

}  // namespace emulator

using namespace emulator;

EXPORT CUresult emulator_submit(CUstream handle, void (*work)(void*), void (*drop)(void*), void* data) {
    std::shared_ptr<void> owned(data, drop);
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    return submit(*stream, [work, owned] { work(owned.get()); });
}

EXPORT CUresult cuLaunchHostFunc(CUstream handle, void (*function)(void*), void* data) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    return submit(*stream, [function, data] { function(data); });
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned flags, int priority) {
    if (current_device() == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (flags > 1) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto stream = std::make_unique<Stream>();
    stream->device = current_device();
    stream->flags = flags;
    stream->priority = std::min(0, std::max(-5, priority));
    *handle = handles<Stream>().add(std::move(stream));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreate(CUstream* handle, unsigned flags) {
    return cuStreamCreateWithPriority(handle, flags, 0);
}

EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
    if (!handles<Stream>().knows(handle)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (handle->capture != nullptr) {
        abandon_capture(*handle);
    }
    finish(*handle);
    handles<Stream>().remove(handle);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    const Stream* stream = find_stream(handle);
    *priority = stream != nullptr ? stream->priority : 0;
    return stream != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    const Stream* stream = find_stream(handle);
    *flags = stream != nullptr ? stream->flags : 0;
    return stream != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (CUresult refused = refuse_captured(*stream)) {
        return refused;
    }
    if (stream->legacy) {
        finish_blocking(stream->device);
    }
    finish(*stream);
    return CUDA_SUCCESS;
}

// Work makes progress when it is asked for, so whoever asks until it is done need not ask twice.
EXPORT CUresult cuStreamQuery(CUstream handle) {
    return cuStreamSynchronize(handle);
}
