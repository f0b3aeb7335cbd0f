// libnccl for the emulator: ranks are threads or processes of one machine, connected by Unix sockets. Enough to run what `kernels` asks of
// it: non-blocking communicators, sends, receives and sums of f32 in groups, on the streams of the emulated driver. As with NCCL, long
// messages meet: who sends one waits until it was received. Unless streams run
// beside their callers, work waits on the thread that submits it, so a rank that waits for another cannot look up: its wait ends when the
// other leaves or dies, or after PATIENCE.
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "driver/cuda.h"

extern "C" CUresult emulator_submit(CUstream stream, void (*work)(void*), void (*drop)(void*), void* data);

namespace {

enum Status : int { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
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
// Messages of more elements meet. NCCL's own limit depends on how ranks are connected.
const uint64_t MEETING = 1024;
// Sent in place of a length: a message that meets was received.
const uint64_t RECEIVED = ~0ull;

bool read_all(int socket, void* bytes, size_t count) {
    return recv(socket, bytes, count, MSG_WAITALL) == static_cast<ssize_t>(count);
}

bool write_all(int socket, const void* bytes, size_t count) {
    const char* next = static_cast<const char*>(bytes);
    while (count > 0) {
        ssize_t written = send(socket, next, count, MSG_NOSIGNAL);
        if (written <= 0) {
            return false;
        }
        next += written;
        count -= static_cast<size_t>(written);
    }
    return true;
}

// Open as long as somebody knows it.
struct Socket {
    const int number;

    explicit Socket(int open) : number(open) {}
    Socket() : number(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {}
    ~Socket() { close(number); }
};

// Where rank `rank` of the group of this id is reached: a name that goes with its process.
socklen_t name_of(const Id& id, int rank, sockaddr_un* address) {
    std::memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    unsigned long long words[2];
    std::memcpy(words, &id, sizeof words);
    int length = std::snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "emulated-nccl-%016llx%016llx-%d", words[0],
                               words[1], rank);
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(length));
}

// One rank's connections to all others. A thread reads each, so nobody who sends waits for one who sends.
struct Links {
    std::mutex mutex;
    std::condition_variable changed;
    const int rank;
    const int size;
    // By rank; null before they are connected, and when they have ended.
    std::vector<std::shared_ptr<Socket>> sockets;
    std::vector<bool> gone;
    std::vector<std::deque<Message>> under_way;  // by sender
    std::vector<int> unmet;                      // by receiver: messages that it did not receive yet
    std::weak_ptr<Socket> listener;
    bool left = false;

    Links(int own, int ranks) : rank(own), size(ranks), sockets(ranks), gone(ranks), under_way(ranks), unmet(ranks) {}

    bool has_left() {
        std::lock_guard<std::mutex> lock(mutex);
        return left;
    }

    bool complete() {
        std::lock_guard<std::mutex> lock(mutex);
        int missing = 0;
        for (int peer = 0; peer < size; peer++) {
            missing += peer != rank && sockets[peer] == nullptr && !gone[peer];
        }
        return missing == 0;
    }

    void send(int to, const Message& message) {
        std::shared_ptr<Socket> socket;
        {
            std::lock_guard<std::mutex> lock(mutex);
            socket = sockets[to];
            unmet[to] += message.size() > MEETING;
        }
        // To one who is gone it is lost, as it should be.
        uint64_t count = message.size();
        if (socket != nullptr && write_all(socket->number, &count, sizeof count)) {
            write_all(socket->number, message.data(), count * sizeof(float));
        }
    }

    // False if it does not come.
    bool receive(int from, Message* message) {
        std::unique_lock<std::mutex> lock(mutex);
        std::deque<Message>& queue = under_way[from];
        bool over = changed.wait_for(lock, PATIENCE, [&] { return !queue.empty() || gone[from] || left; });
        if (!over || queue.empty()) {
            return false;
        }
        *message = std::move(queue.front());
        queue.pop_front();
        std::shared_ptr<Socket> socket = sockets[from];
        lock.unlock();
        if (socket != nullptr && message->size() > MEETING) {
            write_all(socket->number, &RECEIVED, sizeof RECEIVED);
        }
        return true;
    }

    // Waits until `to` has received what meets; false if it does not.
    bool meet(int to) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait_for(lock, PATIENCE, [&] { return unmet[to] == 0 || gone[to] || left; });
        return unmet[to] == 0;
    }

    void leave() {
        std::lock_guard<std::mutex> lock(mutex);
        left = true;
        for (const auto& socket : sockets) {
            if (socket != nullptr) {
                shutdown(socket->number, SHUT_RDWR);
            }
        }
        if (std::shared_ptr<Socket> waiting = listener.lock()) {
            shutdown(waiting->number, SHUT_RDWR);
        }
        changed.notify_all();
    }

    // A connection to `peer`: whatever comes, until it ends.
    void attend(int peer, const std::shared_ptr<Socket>& socket) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            sockets[peer] = socket;
            if (left) {
                shutdown(socket->number, SHUT_RDWR);
            }
        }
        uint64_t count;
        while (read_all(socket->number, &count, sizeof count)) {
            if (count == RECEIVED) {
                std::lock_guard<std::mutex> lock(mutex);
                unmet[peer]--;
                changed.notify_all();
                continue;
            }
            Message message(count);
            if (!read_all(socket->number, message.data(), count * sizeof(float))) {
                break;
            }
            std::lock_guard<std::mutex> lock(mutex);
            under_way[peer].push_back(std::move(message));
            changed.notify_all();
        }
        std::lock_guard<std::mutex> lock(mutex);
        sockets[peer] = nullptr;
        gone[peer] = true;
        changed.notify_all();
    }
};

void dial(const std::shared_ptr<Links>& links, const Id& id, int peer) {
    sockaddr_un address;
    socklen_t length = name_of(id, peer, &address);
    auto made = std::make_shared<Socket>();
    while (connect(made->number, reinterpret_cast<sockaddr*>(&address), length) != 0) {
        if (links->has_left()) {
            return;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    write_all(made->number, &links->rank, sizeof links->rank);
    links->attend(peer, made);
}

void answer(const std::shared_ptr<Links>& links, std::shared_ptr<Socket> listener) {
    int peer = -1;
    auto made = std::make_shared<Socket>(accept4(listener->number, nullptr, nullptr, SOCK_CLOEXEC));
    listener = nullptr;
    if (read_all(made->number, &peer, sizeof peer) && peer > links->rank && peer < links->size) {
        links->attend(peer, made);
    }
}

// Connects with the ranks below and waits for those above; all of it on threads that end when the group does. Null if it cannot.
std::shared_ptr<Links> connect_all(const Id& id, int rank, int size) {
    auto links = std::make_shared<Links>(rank, size);
    auto listener = std::make_shared<Socket>();
    sockaddr_un address;
    socklen_t length = name_of(id, rank, &address);
    if (bind(listener->number, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(listener->number, size) != 0) {
        return nullptr;
    }
    links->listener = listener;
    for (int peer = 0; peer < rank; peer++) {
        std::thread(dial, links, id, peer).detach();
    }
    for (int above = rank + 1; above < size; above++) {
        std::thread(answer, links, listener).detach();
    }
    return links;
}

struct Communicator {
    std::shared_ptr<Links> links;
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
        for (int rank = 0; rank < own.links->size; rank++) {
            bool wanted =
                operation.kind == Kind::Sum ? rank != own.links->rank : operation.kind == Kind::Send && rank == operation.peer;
            if (wanted) {
                own.links->send(rank, message);
            }
        }
    }
    for (const Operation& operation : operations) {
        Communicator& own = *operation.communicator;
        Message sum(operation.kind == Kind::Sum ? operation.count : 0, 0.0f);
        for (int rank = 0; rank < own.links->size && operation.kind != Kind::Send; rank++) {
            if (operation.kind == Kind::Receive && rank != operation.peer) {
                continue;
            }
            Message message;
            if (operation.kind == Kind::Sum && rank == own.links->rank) {
                message.assign(operation.source, operation.source + operation.count);
            } else if (!own.links->receive(rank, &message)) {
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
    for (const Operation& operation : operations) {
        Communicator& own = *operation.communicator;
        if (operation.kind == Kind::Send && !own.links->meet(operation.peer)) {
            return own.fail(REMOTE_ERROR);
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
    if (communicator == nullptr || type != FLOAT32 || (kind != Kind::Sum && (peer < 0 || peer >= communicator->links->size))) {
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
    communicator->links->leave();
    return SUCCESS;
}

}  // namespace

EXPORT int ncclGetVersion(int* version) {
    *version = VERSION;
    return SUCCESS;
}

EXPORT int ncclGetUniqueId(Id* id) {
    std::memset(id, 0, sizeof *id);
    return getrandom(id->bytes, 16, 0) == 16 ? SUCCESS : SYSTEM_ERROR;
}

EXPORT int ncclCommInitRankConfig(Handle* handle, int size, Id id, int rank, Config* config) {
    if (config->magic != MAGIC || config->size < sizeof(Config) || config->blocking != 0 || rank < 0 || rank >= size) {
        return INVALID_ARGUMENT;
    }
    auto communicator = std::make_shared<Communicator>();
    communicator->links = connect_all(id, rank, size);
    if (communicator->links == nullptr) {
        return SYSTEM_ERROR;
    }
    std::lock_guard<std::mutex> lock(mutex);
    communicators()[communicator.get()] = communicator;
    *handle = communicator.get();
    return IN_PROGRESS;
}

EXPORT int ncclCommGetAsyncError(Handle handle, int* state) {
    auto communicator = find(handle);
    if (communicator == nullptr) {
        return INVALID_ARGUMENT;
    }
    bool complete = communicator->links->complete();
    std::lock_guard<std::mutex> lock(communicator->mutex);
    *state = complete ? communicator->state : IN_PROGRESS;
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
        case SYSTEM_ERROR:
            return "unhandled system error";
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
