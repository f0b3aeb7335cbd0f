// Streams: what is submitted to one runs in order, either at once on the calling thread, or (PHALANX_EMULATOR_LATE=1) not
// before somebody waits for it, or (PHALANX_EMULATOR_BESIDE=1) on a thread of the stream's own, or (during a capture) whenever
// the recorded graph is launched.
//
// Running late shows what reads a result, or overwrites an input, without having waited. It cannot be used where the host
// waits for a kernel without a call to the driver. Running beside is what a GPU does: the host goes on while a kernel waits.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda.h"
#include "device.h"

namespace emulator {

using Work = std::function<void()>;

// A graph or an executable graph: the recorded work in the order in which it was recorded.
struct Graph {
    std::shared_ptr<std::vector<Work>> nodes = std::make_shared<std::vector<Work>>();
};

// A recording under way. Streams join it by waiting for an event that was recorded in it.
struct Capture {
    unsigned long long id = 0;
    Stream* origin = nullptr;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    std::thread::id thread;
    bool active = true;
    bool valid = true;
    Graph graph;
};

struct Stream : std::enable_shared_from_this<Stream> {
    Device* device = nullptr;
    unsigned flags = 0;
    int priority = 0;
    bool legacy = false;  // the device's default stream

    std::recursive_mutex running;  // held by the thread that runs its work
    std::mutex queue_mutex;
    std::deque<Work> queue;
    std::shared_ptr<Capture> capture;

    // Of a stream that runs beside, with `queue_mutex`.
    std::condition_variable changed;
    std::thread runner;
    bool busy = false;
    bool ending = false;

    bool blocking() const { return (flags & 1) == 0; }
    ~Stream();
};

// The point in a stream that an event was last recorded at.
struct Mark {
    std::shared_ptr<Stream> stream;
    std::atomic<bool> done{false};
    unsigned long long nanoseconds = 0;
};

struct Event {
    unsigned flags = 0;
    std::shared_ptr<Mark> mark;        // null before the first record
    std::shared_ptr<Capture> capture;  // instead of a mark, if it was recorded in one

    bool timed() const { return (flags & 2) == 0; }
};

// The stream of a handle; the current device's default stream for the special ones. Null if invalid.
Stream* find_stream(CUstream handle);

// Runs, queues or records `work`.
CUresult submit(Stream& stream, Work work);
// Runs what is queued.
void finish(Stream& stream);
// Runs what is queued up to the mark.
void finish(Mark& mark);
// Runs what is queued on the device.
void finish_all(Device* device);
// Runs what the default stream waits for by itself: the queues of all streams that were not created as non-blocking.
void finish_blocking(Device* device);

// For calls that a thread must not make while it captures (in relaxed mode it may): the error, and the capture is lost.
// Else success.
CUresult refuse_while_capturing();
// For calls that ask about or wait for a stream, which a capture forbids.
CUresult refuse_captured(Stream& stream);

// When the work of a stream runs.
enum class Mode { AtOnce, Late, Beside };
Mode mode();
void configure_beside(bool beside);

}  // namespace emulator
