// The handles of one kind that are valid. An unknown handle is an error instead of a crash. What one thread destroys may be in use by
// another that waits for the whole device, so objects are shared.
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
        objects_[handle] = std::shared_ptr<T>(std::move(object));
        return handle;
    }

    bool knows(T* handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        return objects_.count(handle) != 0;
    }

    // Null if it is not valid (any more).
    std::shared_ptr<T> remove(T* handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = objects_.find(handle);
        if (found == objects_.end()) {
            return nullptr;
        }
        std::shared_ptr<T> object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

    std::vector<std::shared_ptr<T>> all() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<std::shared_ptr<T>> objects;
        for (auto& object : objects_) {
            objects.push_back(object.second);
        }
        return objects;
    }

  private:
    std::mutex mutex_;
    std::unordered_map<T*, std::shared_ptr<T>> objects_;
};

// Never destroyed: threads may still use handles while the program ends.
template <class T> Handles<T>& handles() {
    static Handles<T>* all = new Handles<T>();
    return *all;
}

}  // namespace emulator
