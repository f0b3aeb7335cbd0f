// libnccl for the emulator: ranks are threads of one process. Enough to run what `kernels` asks of it: non-blocking communicators,
// sends, receives and sums of f32 in groups, on the streams of the emulated driver. Work waits on the thread that runs it, so a rank that
// waits for another cannot look up: its wait ends when the other leaves, or after PATIENCE.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "driver/cuda.h"

extern "C" CUresult emulator_submit(CUstream stream, void (*work)(void*), void (*drop)(void*), void* data);

namespace {

enum Status : int { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
const int VERSION = 22800;
const int FLOAT32 = 7;
const int SUM = 0;
const unsigned MAGIC = 0xcafebeef;
const auto PATIENCE = std::chrono::seconds(20);

struct Id {
    char bytes[128];
};

// As of 2.18.
struct Config {
    size_t size;
    unsigned magic;
    unsigned version;
    int blocking;
    int cga_cluster_size;
    int min_ctas;
    int max_ctas;
    const char* net_name;
    int split_share;
};

using Message = std::vector<float>;

// What the ranks of one id share.
struct Group {
    std::mutex mutex;
    std::condition_variable changed;
    int present = 0;
    std::vector<bool> gone;
    std::map<std::pair<int, int>, std::deque<Message>> under_way;  // by sender and receiver

    void send(int from, int to, Message message) {
        std::lock_guard<std::mutex> lock(mutex);
        under_way[{from, to}].push_back(std::move(message));
        changed.notify_all();
    }

    // False if it does not come.
    bool receive(int from, int to, Message* message) {
        std::unique_lock<std::mutex> lock(mutex);
        std::deque<Message>& queue = under_way[{from, to}];
        bool over = changed.wait_for(lock, PATIENCE, [&] { return !queue.empty() || gone[from] || gone[to]; });
        if (!over || queue.empty()) {
            return false;
        }
        *message = std::move(queue.front());
        queue.pop_front();
        return true;
    }

    void leave(int rank) {
        std::lock_guard<std::mutex> lock(mutex);
        gone[rank] = true;
        changed.notify_all();
    }
};

struct Communicator {
    std::shared_ptr<Group> group;
    int rank = 0;
    int size = 0;
    std::mutex mutex;
    int state = SUCCESS;
    int turns_in_progress = 0;

    void fail(int status) {
        std::lock_guard<std::mutex> lock(mutex);
        state = status;
    }

    bool failed() {
        std::lock_guard<std::mutex> lock(mutex);
        return state != SUCCESS;
    }
};

enum class Kind { Send, Receive, Sum };

struct Operation {
    Kind kind;
    const float* source;
    float* target;
    size_t count;
    int peer;
    std::shared_ptr<Communicator> communicator;
    CUstream stream;
};

using Handle = Communicator*;

std::mutex mutex;

// Kept for ever: recorded work may still name them.
std::map<Handle, std::shared_ptr<Communicator>>& communicators() {
    static auto* all = new std::map<Handle, std::shared_ptr<Communicator>>();
    return *all;
}

std::map<uint64_t, std::shared_ptr<Group>>& groups() {
    static auto* all = new std::map<uint64_t, std::shared_ptr<Group>>();
    return *all;
}

thread_local int depth = 0;
thread_local std::vector<Operation> begun;

std::shared_ptr<Communicator> find(Handle handle) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = communicators().find(handle);
    return found != communicators().end() ? found->second : nullptr;
}

// Sends first, so that nobody waits for one who waits.
void run(const std::vector<Operation>& operations) {
    for (const Operation& operation : operations) {
        Communicator& own = *operation.communicator;
        if (own.failed()) {
            return;
        }
        Message message(operation.source, operation.source + (operation.kind == Kind::Receive ? 0 : operation.count));
        for (int rank = 0; rank < own.size; rank++) {
            bool wanted = operation.kind == Kind::Sum ? rank != own.rank : operation.kind == Kind::Send && rank == operation.peer;
            if (wanted) {
                own.group->send(own.rank, rank, message);
            }
        }
    }
    for (const Operation& operation : operations) {
        Communicator& own = *operation.communicator;
        Message sum(operation.kind == Kind::Sum ? operation.count : 0, 0.0f);
        for (int rank = 0; rank < own.size && operation.kind != Kind::Send; rank++) {
            if (operation.kind == Kind::Receive && rank != operation.peer) {
                continue;
            }
            Message message;
            if (operation.kind == Kind::Sum && rank == own.rank) {
                message.assign(operation.source, operation.source + operation.count);
            } else if (!own.group->receive(rank, own.rank, &message)) {
                return own.fail(REMOTE_ERROR);
            }
            if (message.size() != operation.count) {
                return own.fail(INVALID_USAGE);
            }
            if (operation.kind == Kind::Receive) {
                std::copy(message.begin(), message.end(), operation.target);
            }
            for (size_t i = 0; i < sum.size(); i++) {
                sum[i] += message[i];
            }
        }
        if (operation.kind == Kind::Sum) {
            std::copy(sum.begin(), sum.end(), operation.target);
        }
    }
}

int submit() {
    if (begun.empty()) {
        return SUCCESS;
    }
    auto communicator = begun[0].communicator;
    CUstream stream = begun[0].stream;
    auto* operations = new std::vector<Operation>(std::move(begun));
    begun.clear();
    auto work = [](void* data) { run(*static_cast<std::vector<Operation>*>(data)); };
    auto drop = [](void* data) { delete static_cast<std::vector<Operation>*>(data); };
    if (emulator_submit(stream, work, drop, operations) != CUDA_SUCCESS) {
        return INVALID_ARGUMENT;
    }
    std::lock_guard<std::mutex> lock(communicator->mutex);
    communicator->turns_in_progress = 2;
    return IN_PROGRESS;
}

int begin(Kind kind, const void* source, void* target, size_t count, int type, int peer, Handle handle, CUstream stream) {
    auto communicator = find(handle);
    if (communicator == nullptr || type != FLOAT32 || (kind != Kind::Sum && (peer < 0 || peer >= communicator->size))) {
        return INVALID_ARGUMENT;
    }
    begun.push_back({kind, static_cast<const float*>(source), static_cast<float*>(target), count, peer, communicator, stream});
    return depth > 0 ? SUCCESS : submit();
}

int leave(Handle handle) {
    auto communicator = find(handle);
    if (communicator == nullptr) {
        return INVALID_ARGUMENT;
    }
    communicator->group->leave(communicator->rank);
    return SUCCESS;
}

}  // namespace

EXPORT int ncclGetVersion(int* version) {
    *version = VERSION;
    return SUCCESS;
}

EXPORT int ncclGetUniqueId(Id* id) {
    static uint64_t next = 1;
    std::lock_guard<std::mutex> lock(mutex);
    std::memset(id, 0, sizeof *id);
    std::memcpy(id, &next, sizeof next);
    next++;
    return SUCCESS;
}

EXPORT int ncclCommInitRankConfig(Handle* handle, int size, Id id, int rank, Config* config) {
    if (config->magic != MAGIC || config->size < sizeof(Config) || config->blocking != 0 || rank < 0 || rank >= size) {
        return INVALID_ARGUMENT;
    }
    uint64_t number;
    std::memcpy(&number, &id, sizeof number);
    auto communicator = std::make_shared<Communicator>();
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Group>& group = groups()[number];
    if (group == nullptr) {
        group = std::make_shared<Group>();
        group->gone.resize(static_cast<size_t>(size));
    }
    communicator->group = group;
    communicator->rank = rank;
    communicator->size = size;
    communicators()[communicator.get()] = communicator;
    *handle = communicator.get();
    std::lock_guard<std::mutex> group_lock(group->mutex);
    group->present++;
    return IN_PROGRESS;
}

EXPORT int ncclCommGetAsyncError(Handle handle, int* state) {
    auto communicator = find(handle);
    if (communicator == nullptr) {
        return INVALID_ARGUMENT;
    }
    {
        std::lock_guard<std::mutex> lock(communicator->group->mutex);
        if (communicator->group->present < communicator->size) {
            *state = IN_PROGRESS;
            return SUCCESS;
        }
    }
    std::lock_guard<std::mutex> lock(communicator->mutex);
    *state = communicator->state;
    if (*state == SUCCESS && communicator->turns_in_progress > 0) {
        communicator->turns_in_progress--;
        *state = IN_PROGRESS;
    }
    return SUCCESS;
}

EXPORT int ncclCommFinalize(Handle handle) {
    return find(handle) != nullptr ? IN_PROGRESS : INVALID_ARGUMENT;
}

EXPORT int ncclCommDestroy(Handle handle) {
    return leave(handle);
}

EXPORT int ncclCommAbort(Handle handle) {
    return leave(handle);
}

EXPORT int ncclAllReduce(const void* source, void* target, size_t count, int type, int op, Handle handle, CUstream stream) {
    return op == SUM ? begin(Kind::Sum, source, target, count, type, 0, handle, stream) : INVALID_ARGUMENT;
}

EXPORT int ncclSend(const void* source, size_t count, int type, int peer, Handle handle, CUstream stream) {
    return begin(Kind::Send, source, nullptr, count, type, peer, handle, stream);
}

EXPORT int ncclRecv(void* target, size_t count, int type, int peer, Handle handle, CUstream stream) {
    return begin(Kind::Receive, nullptr, target, count, type, peer, handle, stream);
}

EXPORT int ncclGroupStart() {
    depth++;
    return SUCCESS;
}

EXPORT int ncclGroupEnd() {
    if (depth == 0) {
        return INVALID_USAGE;
    }
    depth--;
    return depth > 0 ? SUCCESS : submit();
}

EXPORT const char* ncclGetErrorString(int status) {
    switch (status) {
        case SUCCESS:
            return "no error";
        case INVALID_ARGUMENT:
            return "invalid argument";
        case INVALID_USAGE:
            return "invalid usage";
        case REMOTE_ERROR:
            return "remote process exited or there was a network error";
        case IN_PROGRESS:
            return "NCCL operation in progress";
    }
    return "unknown result";
}

EXPORT const char* ncclGetLastError(Handle) {
    return "";
}
