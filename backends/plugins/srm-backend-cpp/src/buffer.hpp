// Memory for a kernel's own use, aligned to cache lines. It is taken before threads start: they cannot throw.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace srm {

template <class T> class Buffer {
  public:
    explicit Buffer(long size) : data_(allocate(size)) {}
    T* get() const { return data_.get(); }

  private:
    static constexpr std::align_val_t LINE{64};
    struct Free {
        void operator()(T* p) const { ::operator delete(p, LINE); }
    };
    static T* allocate(long size) {
        return static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), LINE));
    }
    std::unique_ptr<T, Free> data_;
};

}  // namespace srm
