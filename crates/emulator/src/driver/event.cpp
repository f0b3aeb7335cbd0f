// Events: points in a stream that others can wait for.
#include <ctime>

#include "handles.h"
#include "stream.h"

using namespace emulator;

static unsigned long long now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<unsigned long long>(time.tv_sec) * 1000000000ull + static_cast<unsigned long long>(time.tv_nsec);
}

EXPORT CUresult cuEventCreate(CUevent* handle, unsigned flags) {
    if (current_device() == nullptr) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    auto event = std::make_unique<Event>();
    event->flags = flags;
    *handle = handles<Event>().add(std::move(event));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
    return handles<Event>().remove(handle) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !handles<Event>().knows(event)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->capture != nullptr) {
        event->mark = nullptr;
        event->capture = stream->capture;
        return stream->capture->valid ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    auto mark = std::make_shared<Mark>();
    mark->stream = stream->shared_from_this();
    event->mark = mark;
    event->capture = nullptr;
    return submit(*stream, [mark] {
        mark->nanoseconds = now();
        mark->done = true;
    });
}

EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned) {
    return cuEventRecord(event, handle);
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    if (!handles<Event>().knows(event)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (event->capture != nullptr) {
        event->capture->valid = false;
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    if (event->mark != nullptr) {
        finish(*event->mark);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventQuery(CUevent event) {
    if (handles<Event>().knows(event) && mode() == Mode::Beside && event->capture == nullptr && event->mark != nullptr) {
        return event->mark->done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    }
    return cuEventSynchronize(event);
}

EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !handles<Event>().knows(event)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (event->capture != nullptr) {
        if (!event->capture->active) {
            return CUDA_ERROR_CAPTURED_EVENT;
        }
        if (stream->capture != nullptr && stream->capture != event->capture) {
            return CUDA_ERROR_STREAM_CAPTURE_MERGE;
        }
        // Recorded work runs in the order of recording: there is nothing to wait for.
        stream->capture = event->capture;
        return event->capture->valid ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    if (event->mark == nullptr) {
        return CUDA_SUCCESS;
    }
    if (stream->capture != nullptr) {
        // A graph cannot wait for what was begun outside of it.
        stream->capture->valid = false;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    std::shared_ptr<Mark> mark = event->mark;
    return submit(*stream, [mark] { finish(*mark); });
}

EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    if (!handles<Event>().knows(start) || !handles<Event>().knows(end) || !start->timed() || !end->timed() ||
        start->mark == nullptr || end->mark == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!start->mark->done || !end->mark->done) {
        return CUDA_ERROR_NOT_READY;
    }
    *milliseconds = static_cast<float>(static_cast<double>(end->mark->nanoseconds) -
                                       static_cast<double>(start->mark->nanoseconds)) / 1e6f;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime(milliseconds, start, end);
}
