// Captures and graphs. A graph is a list: what was recorded runs in the order of recording, which respects all
// dependencies.
#include "capture.h"

#include "handles.h"

namespace emulator {

// The captures that this thread began, other than relaxed ones: they forbid it some calls.
static thread_local std::vector<std::shared_ptr<Capture>> begun_here;
// Those in global mode, which forbid them to every thread.
static std::atomic<int> global_captures{0};

CUresult refuse_while_capturing() {
    if (begun_here.empty() && global_captures == 0) {
        return CUDA_SUCCESS;
    }
    for (auto& capture : begun_here) {
        capture->valid = false;
    }
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult refuse_captured(Stream& stream) {
    if (stream.capture == nullptr) {
        return CUDA_SUCCESS;
    }
    stream.capture->valid = false;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

void abandon_capture(Stream& stream) {
    std::shared_ptr<Capture> capture = stream.capture;
    capture->active = false;
    for (const std::shared_ptr<Stream>& other : handles<Stream>().all()) {
        if (other->capture == capture) {
            other->capture = nullptr;
        }
    }
    for (size_t i = 0; i < begun_here.size(); i++) {
        if (begun_here[i] == capture) {
            begun_here.erase(begun_here.begin() + static_cast<std::ptrdiff_t>(i));
            break;
        }
    }
    if (capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL) {
        global_captures--;
    }
}

}  // namespace emulator

using namespace emulator;

EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    static std::atomic<unsigned long long> ids{1};
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->legacy) {
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream->capture != nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto capture = std::make_shared<Capture>();
    capture->id = ids++;
    capture->origin = stream;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    stream->capture = capture;
    if (mode != CU_STREAM_CAPTURE_MODE_RELAXED) {
        begun_here.push_back(capture);
    }
    if (mode == CU_STREAM_CAPTURE_MODE_GLOBAL) {
        global_captures++;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    *graph = nullptr;
    Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    std::shared_ptr<Capture> capture = stream->capture;
    if (capture == nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (capture->origin != stream) {
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    }
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    }
    abandon_capture(*stream);
    if (!capture->valid) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    *graph = handles<Graph>().add(std::make_unique<Graph>(capture->graph));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, unsigned long long* id) {
    const Stream* stream = find_stream(handle);
    if (stream == nullptr) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *status = stream->capture == nullptr    ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture->valid      ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                            : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    if (id != nullptr && stream->capture != nullptr) {
        *id = stream->capture->id;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    return cuStreamGetCaptureInfo(handle, status, nullptr);
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    if (!handles<Graph>().knows(graph)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *executable = handles<Graph>().add(std::make_unique<Graph>(*graph));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphUpload(CUgraphExec executable, CUstream stream) {
    bool known = handles<Graph>().knows(executable) && find_stream(stream) != nullptr;
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !handles<Graph>().knows(executable)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    std::shared_ptr<std::vector<Work>> nodes = executable->nodes;
    return submit(*stream, [nodes] {
        for (const Work& work : *nodes) {
            work();
        }
    });
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable) {
    return handles<Graph>().remove(executable) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    return handles<Graph>().remove(graph) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Nodes have no properties here; they can only be counted.
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    if (!handles<Graph>().knows(graph)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    size_t total = graph->nodes->size();
    for (size_t i = 0; nodes != nullptr && i < *count; i++) {
        nodes[i] = i < total ? &(*graph->nodes)[i] : nullptr;
    }
    *count = nodes != nullptr && *count < total ? *count : total;
    return CUDA_SUCCESS;
}
