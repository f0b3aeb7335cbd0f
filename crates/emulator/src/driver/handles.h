// The handles of one kind that are valid. An unknown handle is an error instead of a crash.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emulator {

template <class T> class Handles {
  public:
    T* add(std::unique_ptr<T> object) {
        T* handle = object.get();
        std::lock_guard<std::mutex> lock(mutex_);
        objects_[handle] = std::move(object);
        return handle;
    }

    bool knows(T* handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        return objects_.count(handle) != 0;
    }

    // Null if it is not valid (any more).
    std::unique_ptr<T> remove(T* handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = objects_.find(handle);
        if (found == objects_.end()) {
            return nullptr;
        }
        std::unique_ptr<T> object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

    std::vector<T*> all() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<T*> handles;
        for (auto& object : objects_) {
            handles.push_back(object.first);
        }
        return handles;
    }

  private:
    std::mutex mutex_;
    std::unordered_map<T*, std::unique_ptr<T>> objects_;
};

// Never destroyed: threads may still use handles while the program ends.
template <class T> Handles<T>& handles() {
    static Handles<T>* all = new Handles<T>();
    return *all;
}

}  // namespace emulator
