#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

namespace lom_client {

/// Numbers that somebody else keeps: valid as long as they are. From a vector, an array, or a pointer and a count.
template <typename T>
class Span {
 public:
  constexpr Span() = default;
  constexpr Span(T* data, std::size_t size) : data_(data), size_(size) {}
  template <typename Container,
            typename = std::enable_if_t<
                std::is_convertible_v<decltype(std::data(std::declval<Container&>())), T*> &&
                !std::is_same_v<std::decay_t<Container>, Span>>>
  constexpr Span(Container&& container) : data_(std::data(container)), size_(std::size(container)) {}

  constexpr T* data() const { return data_; }
  constexpr std::size_t size() const { return size_; }
  constexpr bool empty() const { return size_ == 0; }
  constexpr T* begin() const { return data_; }
  constexpr T* end() const { return data_ + size_; }
  constexpr T& operator[](std::size_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace lom_client
