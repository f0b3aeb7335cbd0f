// Streams and what is submitted to them; waiting and its prohibition during a capture.
#include "stream.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "capture.h"
#include "handles.h"

namespace emulator {

static bool beside_by_default = false;

void configure_beside(bool beside) {
    beside_by_default = beside;
}

static bool is_set(const char* variable) {
    const char* value = std::getenv(variable);
    return value != nullptr && std::strcmp(value, "1") == 0;
}

Mode mode() {
    static const Mode chosen = is_set("PHALANX_EMULATOR_LATE")                           ? Mode::Late
                               : beside_by_default || is_set("PHALANX_EMULATOR_BESIDE") ? Mode::Beside
                                                                                         : Mode::AtOnce;
    return chosen;
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

// A stream's own thread.
static void run_beside(Stream& stream) {
    std::unique_lock<std::mutex> lock(stream.queue_mutex);
    while (true) {
        stream.changed.wait(lock, [&] { return stream.ending || !stream.queue.empty(); });
        if (stream.queue.empty()) {
            return;
        }
        Work work = std::move(stream.queue.front());
        stream.queue.pop_front();
        stream.busy = true;
        lock.unlock();
        work();
        work = nullptr;
        lock.lock();
        stream.busy = false;
        stream.changed.notify_all();
    }
}

// Tells a stream's thread that there is work; starts it for the first. With `queue_mutex`.
static void wake(Stream& stream) {
    if (!stream.runner.joinable()) {
        stream.runner = std::thread([&stream] { run_beside(stream); });
    }
    stream.changed.notify_all();
}

// Waits for a stream's thread until `done`, or until it has nothing to do.
static void await(Stream& stream, const std::function<bool()>& done) {
    std::unique_lock<std::mutex> lock(stream.queue_mutex);
    stream.changed.wait(lock, [&] { return done() || (stream.queue.empty() && !stream.busy); });
}

Stream::~Stream() {
    {
        std::lock_guard<std::mutex> lock(queue_mutex);
        ending = true;
        changed.notify_all();
    }
    if (runner.joinable()) {
        runner.join();
    }
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
    } else if (mode() != Mode::AtOnce) {
        std::lock_guard<std::mutex> lock(stream.queue_mutex);
        stream.queue.push_back(std::move(work));
        if (mode() == Mode::Beside) {
            wake(stream);
        }
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
    if (mode() == Mode::Beside && !stream.legacy) {
        return await(stream, [] { return false; });
    }
    std::lock_guard<std::recursive_mutex> lock(stream.running);
    while (run_one(stream)) {
    }
}

void finish(Mark& mark) {
    if (mark.done) {
        return;
    }
    if (mode() == Mode::Beside && !mark.stream->legacy) {
        return await(*mark.stream, [&] { return mark.done.load(); });
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

EXPORT void emulator_configure(int devices, int beside) {
    configure_devices(devices);
    configure_beside(beside != 0);
}

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

// Work that is not run beside makes progress when it is asked for, so whoever asks until it is done need not ask twice.
EXPORT CUresult cuStreamQuery(CUstream handle) {
    Stream* stream = find_stream(handle);
    if (stream != nullptr && mode() == Mode::Beside && stream->capture == nullptr) {
        std::lock_guard<std::mutex> lock(stream->queue_mutex);
        return stream->queue.empty() && !stream->busy ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    }
    return cuStreamSynchronize(handle);
}
