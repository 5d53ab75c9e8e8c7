#pragma once
/// The one exception type of the kernel library.

#include <stdexcept>
#include <string>

namespace qwen1m {

/// A bad argument or a failed launch. `what()` names the argument, the expectation and the value.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
};

}  // namespace qwen1m
