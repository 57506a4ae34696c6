#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <string_view>

namespace lom_client {

/// A short text that never allocates; what is beyond N characters is cut off.
template <std::size_t N>
class Text {
 public:
  Text() = default;
  Text(std::string_view text) : size_(std::min(text.size(), N)) { std::copy_n(text.data(), size_, chars_.data()); }
  Text(const char* text) : Text(std::string_view(text)) {}
  Text(const std::string& text) : Text(std::string_view(text)) {}

  operator std::string_view() const { return {chars_.data(), size_}; }
  std::string_view view() const { return *this; }
  std::string str() const { return std::string(view()); }
  bool empty() const { return size_ == 0; }

  friend bool operator==(const Text& a, const Text& b) { return a.view() == b.view(); }
  friend bool operator!=(const Text& a, const Text& b) { return a.view() != b.view(); }

 private:
  std::array<char, N> chars_{};
  std::size_t size_ = 0;
};

/// A code such as `DEADLINE_EXCEEDED`.
using Reason = Text<48>;
/// A digest or a contract hash; longer ones are refused before they get here.
using Hash = Text<128>;
/// One printable line.
using Detail = Text<300>;

}  // namespace lom_client
